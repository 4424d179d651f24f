"""The prompts of a run, and those of a step: a pure function of the step.

A step takes the next train.batch_size / rl.group prompts of an order that is drawn anew for each pass over them.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jflow import files, registry
from jflow.config import RunConfig
from jflow.data.prompts import PromptTooLong, generation_prompt
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.base import family
from jflow.strict_json import Malformed, parse, shown

# Name -> function(section data.shapes as a mapping) -> (prompt, metadata) pairs.
BUILT_IN = {"shapes": "jflow.world.prompts:for_rewards"}
_BUCKET = 8  # slots of prompts are a multiple of it

Prompt = tuple[str, Mapping[str, Any]]


class Asked(NamedTuple):
  """The prompts of a step's pictures, those of a group consecutive."""

  tokens: np.ndarray  # int32[I, S], BOS first, padded on the right
  lengths: np.ndarray  # int32[I]
  number: np.ndarray  # int32[I], of the prompt


def read(named: str, shapes: Mapping[str, Any]) -> list[Prompt]:
  """The prompts that `rl.prompts` names, each with its metadata.

  Raises:
    UserError: the file cannot be read, or a line of it is no object with a text "prompt".
  """
  if named in BUILT_IN:
    return registry.load(BUILT_IN[named])(shapes)
  return lines("rl.prompts", pathlib.Path(named))


def lines(field: str, file: pathlib.Path) -> list[Prompt]:
  """The lines of a file of JSON objects, each with its text "prompt"; `field` of the config names the file.

  Raises:
    UserError: the file cannot be read, a line of it is no such object, or it has none.
  """
  try:
    content = files.read_bytes(file).splitlines()
  except FileNotFoundError:
    raise UserError(f"{field}: {file} cannot be read: there is no such file") from None
  except Malformed as error:
    raise UserError(f"{field}: {file} cannot be used: {error}") from None
  out = []
  for number, line in enumerate(content, 1):
    if not line.strip():
      continue
    try:
      row = parse(line)
    except Malformed as error:
      raise UserError(f"{field}: line {number} of {file} is no JSON: {error}") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
      raise UserError(f'{field}: line {number} of {file} must be an object with a text "prompt", got {shown(row)}')
    out.append((text, row))
  if not out:
    raise UserError(f"{field}: {file} holds no prompt")
  return out


class Prompts:
  """The data of a run of reinforcement learning, as `data.pipeline.Pipeline` is of any other."""

  def __init__(
    self,
    config: RunConfig,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    share: Sequence[int],
    group: int,
    named: str,
  ):
    """Tokenises the prompts.

    Args:
      config: of the run.
      prompts: see `read`.
      tokenizer: of the run.
      share: places of the batch that this host's devices hold.
      group: pictures of a prompt.
      named: what the config calls the prompts.

    Raises:
      UserError: a prompt that does not fit the context.
    """
    self._named, self._share, self._seed = named, np.asarray(share, np.int64), config.train.seed
    self._batch, self._group = config.train.batch_size, group
    model = config.model
    slots = family(model.generation).layout.slots(model.written_patches)
    room = model.language_model.max_length - slots
    self.texts, self.metadata = [text for text, _ in prompts], [about for _, about in prompts]
    ids = []
    for text in self.texts:
      try:
        ids.append(generation_prompt(text, config.data.template, tokenizer, room))
      except PromptTooLong as error:
        raise PromptTooLong(f"{named}: of {text[:60]!r}, {error}") from None
    width = -(-max(map(len, ids)) // _BUCKET) * _BUCKET
    self._tokens = np.full((len(ids), width), tokenizer.pad, np.int32)
    for row, one in zip(self._tokens, ids):
      row[: len(one)] = one
    self._lengths = np.asarray([len(one) for one in ids], np.int32)
    self.tokens = self._batch * (width + slots)
    content = json.dumps([self.texts, self.metadata], sort_keys=True, default=_of_picture)
    self._fingerprint = hashlib.sha256(content.encode()).hexdigest()

  def numbers(self, step: int) -> np.ndarray:
    """The prompts of a step's groups, int64[I / group]."""
    count, each = len(self.texts), self._batch // self._group
    places = step * each + np.arange(each)
    orders = {k: np.random.default_rng((self._seed, int(k))).permutation(count) for k in np.unique(places // count)}
    return np.asarray([orders[place // count][place % count] for place in places])

  def batch(self, step: int) -> Asked:
    """This host's share of a step's prompts."""
    number = np.repeat(self.numbers(step), self._group)[self._share].astype(np.int32)
    return Asked(self._tokens[number], self._lengths[number], number)

  def batches(self, start_step: int, stop_step: int) -> Iterator[tuple[Asked, dict[str, Any]]]:
    """Yields the prompts of the steps [start_step, stop_step), with what a run tells of a batch."""
    for step in range(start_step, stop_step):
      asked = self.batch(step)
      fill = float(asked.lengths.mean() / asked.tokens.shape[1])
      packs = {"understanding": 0, "generation": self._batch, "text": 0}
      yield asked, {"packs": packs, "fill": fill, "rejected": {}, "messages": []}

  def identity(self) -> dict[str, list[dict[str, Any]]]:
    """See `Pipeline.identity`."""
    about = {"source": self._named, "weight": 1.0, "records": len(self.texts), "fingerprint": self._fingerprint}
    return {"prompts": [about | {"latents": ""}]}

  def encoders(self) -> dict[str, str]:
    """No images are encoded ahead."""
    return {}

  def report(self) -> list[str]:
    """One line on the prompts."""
    groups = self._batch // self._group
    return [f"prompts {self._named}: {len(self.texts):,}; a step takes {groups:,}, with {self._group} pictures of each"]

  def captions(self, count: int) -> list[str]:
    """The first prompts."""
    return self.texts[:count]

  def waiting_for(self) -> str:
    """No process is waited for."""
    return ""


def _of_picture(x: Any) -> str:
  """A picture by its bytes, so that a folder may move, but not change, under a run."""
  content = x.read_bytes() if isinstance(x, pathlib.Path) else x
  return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else str(x)
