"""The model `jflow` for lmms-eval, which finds it by an entry point.

Install jflow into lmms-eval's own environment (it needs PyTorch and about fifty packages that jflow does not):

  pip install lmms-eval==0.7.3 && pip install -e .
  python -m lmms_eval --model jflow --model_args checkpoint=JanusFlow-1.3B,cache=scores/lmms --batch_size 16 \\
    --tasks pope,mme
  python -m lmms_eval --model jflow --model_args server=http://127.0.0.1:8000 --tasks pope     # a running `jflow serve`

With cache=DIR each greedy answer is written to disk at once: the same command resumes after a stop, and refuses the
answers of another checkpoint (a server is known by its address only: use another DIR for another model).
lmms-eval's own --use_cache writes only when all answers of all tasks are complete.

The prompts are lmms-eval's own, so its scores differ from those of `evaluate`, which uses VLMEvalKit's prompts.
"""

import base64
import hashlib
import io
import json
import os
import pathlib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from jflow.data import images as pictures
from jflow.errors import UserError
from jflow.evaluation.samples import Samples
from jflow.inference import loading
from jflow.progress import Progress

_TOKENS = 512  # where a task sets no max_new_tokens
_SECONDS = 600  # for one answer of a server
_ROUNDS = 4  # batches whose images are in memory at a time


class Answers:
  """Answers from a checkpoint in this process, or from a server."""

  def __init__(
    self,
    checkpoint: str | pathlib.Path = "",
    server: str = "",
    batch_size: int = 16,
    vae: str | None = None,
    dtype: str | None = None,
    weights: str = "ema",
    template: str | None = None,
  ):
    """`checkpoint` as for all commands, or `server`, the address of `python -m jflow serve`."""
    if bool(checkpoint) == bool(server):
      raise UserError("model_args: give checkpoint=DIR or server=URL, one of them")
    self._server = server.rstrip("/")
    if not str(batch_size).isdigit() or int(batch_size) < 1:
      raise UserError(f"--batch_size={batch_size} must be a number of at least 1: jflow finds none by itself")
    self.batch_size = int(batch_size)
    if checkpoint:
      self._model = loading.load(checkpoint, vae=vae, dtype=dtype, weights=weights, template=template)

  def answer(self, asked: Sequence[tuple[str, Sequence[Image.Image], dict[str, Any]]]) -> list[str]:
    """Answers (question, images, lmms-eval's generation arguments) in order, each cut at its stop strings."""
    if self._server:
      with ThreadPoolExecutor(self.batch_size) as pool:
        texts = list(pool.map(lambda one: self._ask_server(*one), asked))
    else:
      requests = [
        self._model.request(_unmarked(text), list(images), **sampling(arguments)) for text, images, arguments in asked
      ]
      texts = self._model.understand_batch(requests, self.batch_size)
    return [cut(text, arguments.get("until")) for text, (_, _, arguments) in zip(texts, asked, strict=True)]

  def likelihoods(self, asked: Sequence[tuple[str, Sequence[Image.Image], str]]) -> list[tuple[float, bool]]:
    """Returns (log-probability, whether it is the greedy answer) for each (question, images, answer), in order."""
    if self._server:
      raise UserError("model_args: this task needs likelihoods; give checkpoint=DIR, a server tells none")
    return [self._model.loglikelihood(_unmarked(text), list(images), [one])[0] for text, images, one in asked]

  def _ask_server(self, text: str, images: Sequence[Image.Image], arguments: dict[str, Any]) -> str:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in images]
    content = [*parts, {"type": "text", "text": _unmarked(text)}]
    body = {"messages": [{"role": "user", "content": content}], **sampling(arguments)}
    request = urllib.request.Request(
      f"{self._server}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
      with urllib.request.urlopen(request, timeout=_SECONDS) as response:
        return json.load(response)["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
      raise UserError(f"{self._server} answers {error.code}: {error.read()[:300].decode(errors='replace')}") from error
    except OSError as error:
      raise UserError(f"{self._server} cannot be reached: {error}") from error


def sampling(arguments: dict[str, Any]) -> dict[str, Any]:
  """lmms-eval's generation arguments as jflow's; greedy unless a task sets do_sample or a temperature."""
  out = {"max_tokens": int(arguments.get("max_new_tokens") or _TOKENS), "temperature": 0.0}
  if arguments.get("do_sample") or arguments.get("temperature"):
    out["temperature"] = float(arguments.get("temperature") or 1.0)
    out["top_p"] = float(arguments.get("top_p") or 1.0)
  return out


def cut(text: str, until: Any) -> str:
  """The answer cut before the first stop string."""
  for stop in [until] if isinstance(until, str) else until or ():
    if stop:
      text = text.split(stop)[0]
  return text.strip()


def _unmarked(text: str) -> str:
  """The question without image marks; the images then come before it."""
  return text.replace("<image>", "").strip()


def _data_uri(image: Image.Image) -> str:
  buffer = io.BytesIO()
  image.convert("RGB").save(buffer, "PNG")
  return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class Kept:
  """Cache of answers on disk, so that a stopped run resumes; without a directory it keeps nothing."""

  def __init__(self, directory: str, settings: dict[str, Any]):
    """Opens or creates the directory; `settings`: all that the answers depend on except the requests.

    Raises:
      UserError: the directory holds the answers of another model, or another process writes to it.
    """
    self._samples = Samples(pathlib.Path(str(directory)), settings, flag="cache") if directory else None
    self._found = self._samples.read() if self._samples else {}

  def get(self, key: str) -> Any:
    """The answer to a request, or None."""
    return self._found[key]["answer"] if key in self._found else None

  def add(self, key: str, answer: Any) -> None:
    """Stores an answer, unless its key is empty."""
    if self._samples and key:
      self._found[key] = {"key": key, "answer": answer}
      self._samples.add(self._found[key])

  def close(self) -> None:
    """Releases the directory for other processes."""
    if self._samples:
      self._samples.close()


def key_of(kind: str, task: str, split: str, doc_id: Any, question: str, arguments: Any) -> str:
  """The cache key of a request; empty where the answer is sampled, so that it is sampled anew."""
  if isinstance(arguments, dict) and sampling(arguments)["temperature"] > 0:
    return ""
  asked = hashlib.sha256(json.dumps([question, arguments], sort_keys=True, default=str).encode()).hexdigest()
  return f"{kind} {task} {split} {doc_id} {asked[:16]}"


def images_of(found: Any, where: str) -> list[Image.Image]:
  """The images of a document, opened; an unreadable image is an error, never a question without its image.

  Args:
    found: from the task: PIL images, paths, bytes, dictionaries with "bytes" or "path"; a list of them, one, or None
      where there are no images.
    where: names the document in messages.

  Raises:
    UserError: `found` is of another type, or an image cannot be read.
  """
  if found is None:
    return []
  return [_image(one, where) for one in (found if isinstance(found, (list, tuple)) else [found])]


def _image(one: Any, where: str) -> Image.Image:
  """An image of any of these types, decoded to the same pixels as in the published code."""
  if isinstance(one, dict):
    one = one.get("bytes") or one.get("path")
  if not isinstance(one, (Image.Image, bytes, bytearray, str, os.PathLike)):
    raise UserError(f"{where} gives {type(one).__name__} where an image should be: leave this task out")
  try:
    return pictures.as_published(pathlib.Path(one).read_bytes() if isinstance(one, (str, os.PathLike)) else one)
  except (pictures.ImageError, OSError, ValueError) as error:  # ValueError: a path with a zero byte
    name = f"{len(one)} bytes" if isinstance(one, (bytes, bytearray)) else repr(str(one)[:200])
    raise UserError(f"{where} gives {name}, no image to read: {error}") from None


def base() -> type:
  """lmms-eval's class of models, or `object` where lmms-eval is not installed."""
  try:
    from lmms_eval.api.model import lmms
  except ModuleNotFoundError as error:
    if error.name != "lmms_eval":  # it is there, but lacks something
      raise
    return object
  return lmms


class Model(base()):
  """The model class that lmms-eval calls; lmms-eval fills its `task_dict`."""

  is_simple = True

  def __init__(self, cache: str = "", **arguments: Any):
    """Loads the checkpoint, or connects to a server.

    Args:
      cache: directory for the answers; see the top of this file.
      arguments: those of `Answers`; lmms-eval's device and max_batch_size are ignored.
    """
    super().__init__()
    arguments = {k: v for k, v in arguments.items() if k not in ("device", "max_batch_size")}
    if arguments.get("checkpoint"):  # of a training run the same step for the model and for the name of its answers
      from jflow.interop import checkpoints

      arguments["checkpoint"] = checkpoints.locate(arguments["checkpoint"])
    self.answers = Answers(**arguments)
    self._kept = Kept(cache, _settings(arguments) if cache else {})

  def close(self) -> None:
    """Releases the cache for other processes."""
    self._kept.close()

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    """Answers requests (context, generation arguments, images, document, task, split)."""
    read = lambda context, arguments, *_: (context, dict(arguments))
    ask = lambda asked: self.answers.answer([(text, images, arguments) for text, arguments, images in asked])
    return self._all("generate_until", requests, read, ask)

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    """Scores requests (context, answer, images, document, task, split)."""

    def read(context: str, target: Any, _: Any, doc_id: Any, task: str, split: str) -> tuple[str, str]:
      return context, target(self.task_dict[task][split][doc_id]) if callable(target) else target

    def ask(asked: list) -> list[tuple[float, bool]]:
      scored = self.answers.likelihoods([(text, images, answer) for text, answer, images in asked])
      return [(float(value), bool(greedy)) for value, greedy in scored]

    return [tuple(scored) for scored in self._all("loglikelihood", requests, read, ask)]

  def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
    """Unsupported: no benchmark of the paper has several rounds."""
    raise NotImplementedError("jflow answers single questions in lmms-eval")

  def _all(self, kind: str, requests: Sequence[Any], read: Callable, ask: Callable[[list], Sequence[Any]]) -> list[Any]:
    """Answers in the order of the requests, computed a few batches at a time to bound the images in memory.

    Args:
      kind: of the requests.
      requests: lmms-eval's, with `args`.
      read: args -> (question, arguments or answer).
      ask: [(question, arguments or answer, images)] -> answers.
    """
    asked = [read(*request.args) for request in requests]
    keys = [
      key_of(kind, task, split, doc_id, *one)
      for one, (*_, doc_id, task, split) in zip(asked, (request.args for request in requests))
    ]
    answers = [self._kept.get(key) for key in keys]
    missing = [i for i, answer in enumerate(answers) if answer is None]
    size = _ROUNDS * self.answers.batch_size
    with Progress(len(keys), len(keys) - len(missing), kind, "requests") as bar:
      for at in range(0, len(missing), size):
        group = missing[at : at + size]
        made = ask([(*asked[i], self._images(*requests[i].args[2:])) for i in group])
        for i, answer in zip(group, made, strict=True):
          answers[i] = answer
          self._kept.add(keys[i], answer)
        bar.count(len(group))
    return answers

  def _images(self, visual: Any, doc_id: Any, task: str, split: str) -> list[Image.Image]:
    """The images of a document; lmms-eval gives a function, or none where there are no images."""
    found = visual(self.task_dict[task][split][doc_id]) if callable(visual) else visual
    return images_of(found, f"task {task}, document {doc_id} of {split},")


def _settings(arguments: dict[str, Any]) -> dict[str, Any]:
  """All that answers depend on except the requests."""
  if arguments.get("server"):
    return {"server": arguments["server"].rstrip("/")}
  from jflow.evaluation.report import fingerprint

  weights = arguments.get("weights") or "ema"
  checkpoint = fingerprint(arguments["checkpoint"], weights, arguments.get("vae"))
  template = {"template": arguments["template"]} if arguments.get("template") else {}
  dtype = arguments.get("dtype") or loading.usual_dtype()
  return {"fingerprint": checkpoint, "weights": weights, "dtype": dtype, **template}
