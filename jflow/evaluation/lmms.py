"""lmms-eval reads and scores with jflow: a model `jflow` that lmms-eval finds by an entry point.

Install jflow into lmms-eval's own environment (it needs PyTorch and some fifty packages, jflow needs none of them):

  pip install lmms-eval==0.7.3 && pip install -e .
  python -m lmms_eval --model jflow --model_args checkpoint=JanusFlow-1.3B --batch_size 16 --tasks pope,mme
  python -m lmms_eval --model jflow --model_args server=http://127.0.0.1:8000 --tasks pope     # a running `jflow serve`

The prompts are lmms-eval's own, so its scores differ from those of `evaluate`, which has the prompts of VLMEvalKit.
"""

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from jflow.errors import UserError

_TOKENS = 512  # where a task sets no max_new_tokens
_SECONDS = 600  # for one answer of a server


def manifest() -> Any:
  """The entry point of the group `lmms_eval.models`."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(model_id="jflow", simple_class_path="jflow.evaluation.lmms.Model")


class Answers:
  """Asks a checkpoint in this process, or a server."""

  def __init__(
    self, checkpoint: str = "", server: str = "", batch_size: int = 16, vae: str | None = None,
    dtype: str | None = None, weights: str = "ema",
  ):  # fmt: skip
    """`checkpoint` as for all commands, or `server`, the address of `python -m jflow serve`."""
    if bool(checkpoint) == bool(server):
      raise UserError("model_args: give checkpoint=DIR or server=URL, one of them")
    self._server, self._batch_size = server.rstrip("/"), int(batch_size)
    if checkpoint:
      import jflow

      self._model = jflow.load(checkpoint, vae=vae, dtype=dtype, weights=weights)

  def answer(self, asked: Sequence[tuple[str, Sequence[Image.Image], dict[str, Any]]]) -> list[str]:
    """Answers (question, images, lmms-eval's generation arguments) in order, each cut at its stop strings."""
    if self._server:
      with ThreadPoolExecutor(self._batch_size) as pool:
        texts = list(pool.map(lambda one: self._ask_server(*one), asked))
    else:
      requests = [
        self._model.request(_unmarked(text), list(images), **sampling(arguments))
        for text, images, arguments in asked
      ]
      texts = self._model.understand_batch(requests, self._batch_size)
    return [cut(text, arguments.get("until")) for text, (_, _, arguments) in zip(texts, asked, strict=True)]

  def likelihoods(self, asked: Sequence[tuple[str, Sequence[Image.Image], str]]) -> list[tuple[float, bool]]:
    """(log-probability, whether it is the greedy answer) of (question, images, answer), in order."""
    if self._server:
      raise UserError("model_args: this task needs likelihoods; give checkpoint=DIR, a server tells none")
    return [self._model.loglikelihood(_unmarked(text), list(images), [one])[0] for text, images, one in asked]

  def _ask_server(self, text: str, images: Sequence[Image.Image], arguments: dict[str, Any]) -> str:
    parts: list[dict[str, Any]] = [
      {"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in images
    ]
    content = [*parts, {"type": "text", "text": _unmarked(text)}]
    body = {"messages": [{"role": "user", "content": content}], **sampling(arguments)}
    request = urllib.request.Request(
      f"{self._server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
      with urllib.request.urlopen(request, timeout=_SECONDS) as response:
        return json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
      raise UserError(
        f"{self._server} answers {error.code}: {error.read()[:300].decode(errors='replace')}"
      ) from error
    except OSError as error:
      raise UserError(f"{self._server} cannot be reached: {error}") from error


def sampling(arguments: dict[str, Any]) -> dict[str, Any]:
  """lmms-eval's generation arguments as jflow's: greedy unless a task asks for sampling."""
  out = {"max_tokens": int(arguments.get("max_new_tokens") or _TOKENS), "temperature": 0.0}
  if arguments.get("do_sample") or arguments.get("temperature"):
    out["temperature"] = float(arguments.get("temperature") or 1.0)
    out["top_p"] = float(arguments.get("top_p") or 1.0)
  return out


def cut(text: str, until: Any) -> str:
  """The answer up to the first of the stop strings."""
  for stop in [until] if isinstance(until, str) else until or ():
    if stop:
      text = text.split(stop)[0]
  return text.strip()


def _unmarked(text: str) -> str:
  """Without marks, all images stand before the question."""
  return text.replace("<image>", "").strip()


def _data_uri(image: Image.Image) -> str:
  buffer = io.BytesIO()
  image.convert("RGB").save(buffer, "PNG")
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _images(model: Any, visual: Any, doc_id: int, task: str, split: str) -> list[Image.Image]:
  """The images of a document; lmms-eval gives a function, or none where there are no images."""
  images = visual(model.task_dict[task][split][doc_id]) if callable(visual) else visual
  return [image for image in images or () if isinstance(image, Image.Image)]


def _base() -> type:
  """lmms-eval's class of models, or `object` where it is not installed."""
  try:
    from lmms_eval.api.model import lmms
  except ImportError:
    return object
  return lmms


class Model(_base()):
  """What lmms-eval calls. Its `task_dict` is filled by lmms-eval."""

  is_simple = True

  def __init__(self, **arguments: Any):
    """`arguments`: those of `Answers`; lmms-eval's own device and max_batch_size are jflow's own business."""
    super().__init__()
    self._answers = Answers(**{k: v for k, v in arguments.items() if k not in ("device", "max_batch_size")})

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Answers requests (context, generation arguments, images, document, task, split)."""
    asked = []
    for request in requests:
      context, arguments, visual, doc_id, task, split = request.args
      asked.append((context, _images(self, visual, doc_id, task, split), dict(arguments)))
    return self._answers.answer(asked)

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Scores requests (context, answer, images, document, task, split)."""
    asked = []
    for request in requests:
      context, target, visual, doc_id, task, split = request.args
      if callable(target):
        target = target(self.task_dict[task][split][doc_id])
      asked.append((context, _images(self, visual, doc_id, task, split), target))
    return self._answers.likelihoods(asked)

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    """Not offered: no benchmark of the paper has several rounds."""
    raise NotImplementedError("jflow answers single questions in lmms-eval")
