"""Comparison of the tokenizer, chat template and image processor with golden outputs of the PyTorch code.

The directory holds tokenizer.json, the images, cases.json (image_size, patch_size, conversations) and
golden.npz with CASE/input_ids, CASE/images_seq_mask and CASE/pixel_values.
"""

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jflow.data import images, templates
from jflow.data.prompts import SYSTEM_PROMPT, chat_prompt, generation_prompt
from jflow.data.tokenizer import SPEAKERS, SPECIAL_TOKENS, Tokenizer, read_files
from jflow.errors import UserError
from jflow.interop import golden
from jflow.interop.comparison import Line, line
from jflow.strict_json import read_object, shown

_SHARED = "../processor/"  # pictures of several golden directories
_LARGEST = 4096  # largest side of an image, in pixels
_COMPONENTS = {
  "input_ids": "tokenizer or chat template",
  "images_seq_mask": "image slots",
  "pixel_values": "image processor",
}


def compare_processor(directory: pathlib.Path, tolerance: float) -> Iterator[Line]:
  """Yields the comparison of every golden array; ids and masks must be identical, pixels
  within `tolerance` each.

  Raises:
    UserError: a file is missing or damaged, cases.json lacks a field, or golden.npz has no array, or one that belongs
      to no case.
  """
  files = read_files(str(directory))
  arrays = golden.read(directory / "golden.npz")
  size, patches, cases = _read_cases(directory)
  _check_names(directory, list(arrays), [case["name"] for case in cases])
  tokenizer = Tokenizer(files, str(directory))
  for case in cases:
    ours = _process(directory, case, tokenizer, size, patches)
    for key, component in _COMPONENTS.items():
      name = f"{case['name']}/{key}"
      if name in arrays:
        found = line(name, component, ours[key], arrays[name], tolerance)
        yield found._replace(passed=found.passed and found.max_error <= tolerance)


def _read_cases(directory: pathlib.Path) -> tuple[int, int, list[dict[str, Any]]]:
  """Reads cases.json: image size, patch size, and the cases; checks every field and that every image exists."""
  path = directory / "cases.json"
  values = read_object(path)

  def need(ok: bool, what: str) -> None:
    if not ok:
      raise UserError(f"{path} does not follow the format: {what}")

  for name in ("image_size", "patch_size"):
    found = values.get(name)
    need(type(found) is int and 1 <= found <= _LARGEST, f"{name} must be in 1..{_LARGEST}, got {shown(found)}")
  cases = values.get("cases")
  need(isinstance(cases, list) and bool(cases), "cases must be a list")
  for i, case in enumerate(cases):
    where = f"cases[{i}]"
    need(isinstance(case, dict) and type(case.get("name")) is str, f"{where} must be an object with a name")
    turns = case.get("conversation")
    need(isinstance(turns, list) and bool(turns), f"{where}.conversation must be a list of turns")
    for turn in turns:
      texts = isinstance(turn, dict) and all(type(turn.get(key)) is str for key in ("role", "content"))
      need(texts, f"{where}.conversation: a turn must have a role and a content, got {shown(turn)}")
      pictures = turn.get("images", [])
      need(isinstance(pictures, list), f"{where}: images must be a list, got {shown(pictures)}")
      for name in pictures:
        need(
          type(name) is str and _is_near(name), f"{where}: a picture is a file here or in {_SHARED}, got {shown(name)}"
        )
        need((directory / name).is_file(), f"{where}: {directory / name} not found")
  return values["image_size"], (values["image_size"] // values["patch_size"]) ** 2, cases


def _is_near(name: str) -> bool:
  """Whether a path is a file's name, or one of the folder that golden files share."""
  return pathlib.PurePath(name).name == name.removeprefix(_SHARED)


def _check_names(directory: pathlib.Path, arrays: list[str], cases: list[str]) -> None:
  """Raises a UserError unless every array belongs to a case, since others would not be compared."""
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
  template = "pro" if turns[0]["role"] == SPEAKERS["user"] else "chat"
  templates.check(template, tokenizer)
  flow = tokenizer.generation_start is not None  # JanusFlow's processor: another tag, and BOI's slot is the image's
  if case.get("generation", case["name"] == "generation"):  # the closing tag is the first slot of the image
    ids = generation_prompt(turns[0]["content"], template, tokenizer)
    return {"input_ids": np.append(ids, tokenizer.generation_start if flow else tokenizer.image_start)}
  messages = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
  prompt = chat_prompt(
    messages,
    len(paths),
    tokenizer,
    patches,
    template,
    system=SYSTEM_PROMPT,
    mark=SPECIAL_TOKENS["image"],
  )
  pixels = [images.for_understanding(images.read(str(path)), size) for path in paths]
  scaled = np.stack(pixels).astype(np.float32) / 127.5 - 1.0 if pixels else np.zeros((0, size, size, 3))
  slots = prompt.image_mask(patches)
  return {
    "input_ids": prompt.tokens,
    "images_seq_mask": slots if flow else slots & (prompt.tokens == tokenizer.image),
    "pixel_values": scaled.transpose(0, 3, 1, 2),
  }
