"""A reward behind an address: pictures go out as JSON, scores come back.

The request is a POST of {"images": [base64 of PNG files], "prompts": [...], "metadata": [...]}, the answer
{"scores": [...]}.
"""

import base64
import io
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any

import numpy as np
from PIL import Image

from jflow.errors import UserError
from jflow.strict_json import Malformed, parse

_MOST = 64 * 2**20  # bytes of an answer
_AGAIN = (408, 425, 429)  # statuses below 500 of a server that may answer later
_PAUSE = 1.0  # seconds before the second try; twice as long before each further one


def score(
  address: str,
  timeout: float,
  retries: int,
  images: np.ndarray,
  prompts: Sequence[str],
  metadata: Sequence[Mapping[str, Any]],
) -> list[float]:
  """Asks a server for scores.

  Args:
    address: http:// or https://.
    timeout: seconds that each try waits for a connection, and for more of an answer.
    retries: further tries after one that fails: no connection, no answer in time, one that is cut, a status of 500 or
      more, or of a server that is busy.
    images, prompts, metadata: see `rewards`.

  Raises:
    ConnectionError: no try was answered, or the answer is a refusal.
    ValueError: the answer is no {"scores": [...]}.
  """
  asked = {"images": [_png(image) for image in images], "prompts": list(prompts), "metadata": list(metadata)}
  body = json.dumps(asked, default=str).encode()
  for left in range(retries, -1, -1):
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
      with urllib.request.urlopen(request, timeout=timeout) as answer:
        content = answer.read(_MOST)
        if answer.length:
          raise ConnectionError("the answer is cut or too long")
        return _scores(content)
    except urllib.error.HTTPError as error:
      said = f"status {error.code}"
      if error.code < 500 and error.code not in _AGAIN:
        raise ConnectionError(f"{address} refuses: {said}") from error
    except (OSError, HTTPException) as error:
      said = str(getattr(error, "reason", error))
    if left:
      time.sleep(_PAUSE * 2 ** (retries - left))
  raise ConnectionError(f"{address} gave no scores in {retries + 1} tries: {said}")


def check(address: str) -> None:
  """Checks an address before a run.

  Raises:
    UserError: it names no host, or a port that is none.
  """
  try:
    parts = urllib.parse.urlsplit(address)
    fits = bool(parts.hostname) and parts.port != 0 and not any(x.isspace() for x in address)
  except ValueError:
    fits = False
  if not fits:
    raise UserError(f"rl.rewards must name a server as http://HOST:PORT/PATH, got {address!r}")


def _scores(content: bytes) -> list[float]:
  try:
    read = parse(content)
  except Malformed as error:
    raise ValueError(f"the answer is no JSON: {error}") from None
  found = read.get("scores") if isinstance(read, dict) else None
  if not isinstance(found, list) or not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in found):
    raise ValueError('the answer must be {"scores": [numbers]}')
  return found


def _png(image: np.ndarray) -> str:
  out = io.BytesIO()
  Image.fromarray(image).save(out, "PNG")
  return base64.b64encode(out.getvalue()).decode()
