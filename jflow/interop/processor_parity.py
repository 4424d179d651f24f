"""Compares the tokenizer, the chat template and the image processor with golden outputs of the PyTorch code.

The directory holds tokenizer.json, the images, cases.json (image_size, patch_size, conversations) and
golden.npz with CASE/input_ids, CASE/images_seq_mask and CASE/pixel_values.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jflow.data import examples, images
from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from jflow.errors import UserError
from jflow.interop.comparison import Line, line, read_golden
from jflow.interop.safetensors_io import read_json

_COMPONENTS = {
  "input_ids": "tokenizer or chat template",
  "images_seq_mask": "image slots",
  "pixel_values": "image processor",
}


def compare_processor(directory: pathlib.Path, tolerance: float) -> Iterator[Line]:
  """Yields the comparison of every golden array; ids and masks must be identical, pixels
  within `tolerance` each.

  Raises:
    UserError: a file is missing or damaged, cases.json lacks a field, or golden.npz holds no array of its cases, or
      one of none of them.
  """
  tokenizer = Tokenizer.load(str(directory))
  golden = read_golden(directory / "golden.npz")
  values = read_json(directory / "cases.json")
  try:
    size = int(values["image_size"])
    patches = (size // int(values["patch_size"])) ** 2
    _check_names(directory, list(golden), [case["name"] for case in values["cases"]])
    for case in values["cases"]:
      ours = _process(directory, case, tokenizer, size, patches)
      for key, component in _COMPONENTS.items():
        name = f"{case['name']}/{key}"
        if name in golden:
          found = line(name, component, ours[key], golden[name], tolerance)
          yield found._replace(passed=found.passed and found.max_error <= tolerance)
  except (KeyError, TypeError, ValueError) as error:
    raise UserError(f"{directory / 'cases.json'} does not follow the format ({error!r})") from None


def _check_names(directory: pathlib.Path, arrays: list[str], cases: list[str]) -> None:
  """Raises a UserError unless every array belongs to a case: one that none names would pass unseen."""
  if not arrays:
    raise UserError(f"{directory / 'golden.npz'} holds no arrays")
  known = {f"{case}/{key}" for case in cases for key in _COMPONENTS}
  others = [name for name in arrays if name not in known]
  if others:
    raise UserError(
      f"{directory / 'golden.npz'} holds {others[0]}, which no case of cases.json has: its arrays are CASE/"
      f"{', CASE/'.join(_COMPONENTS)}"
    )


def _process(
  directory: pathlib.Path, case: Mapping[str, Any], tokenizer: Tokenizer, size: int, patches: int
) -> dict[str, np.ndarray]:
  turns = case["conversation"]
  paths = [directory / name for turn in turns for name in turn.get("images", ())]
  if case["name"].startswith("generation"):  # the release closes its prompt with the tag that T replaces
    ids = examples.generation_prompt(turns[0]["content"], "chat", tokenizer)
    return {"input_ids": np.append(ids, tokenizer.generation_start)}
  messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
  prompt = examples.chat_prompt(
    messages,
    len(paths),
    tokenizer,
    patches,
    system=examples.SYSTEM_PROMPT,
    mark=SPECIAL_TOKENS["image"],
  )
  pixels = [images.for_understanding(images.read(str(path)), size) for path in paths]
  scaled = np.stack(pixels).astype(np.float32) / 127.5 - 1.0 if pixels else np.zeros((0, size, size, 3))
  return {
    "input_ids": prompt.tokens,
    "images_seq_mask": prompt.image_mask(patches),
    "pixel_values": scaled.transpose(0, 3, 1, 2),
  }
