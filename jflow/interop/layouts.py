"""The published layouts of whole models: a directory's config.json decides which one it has.

A way to write images names its layouts (`generation.base.Family.layouts`); each is one file of this folder.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jflow import registry
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.base import FAMILIES, family
from jflow.interop.fields import Fields
from jflow.interop.safetensors_io import Tensor
from jflow.models.config import ModelConfig
from jflow.models.weights import Entry
from jflow.strict_json import read_object


@dataclasses.dataclass(frozen=True)
class Layout:
  """A published layout: its config.json and its tensors, both ways."""

  name: str  # a value of `convert --from` and `--to`
  family: str  # the `model.generation.kind` that it holds
  title: str  # of the model, for messages
  recognises: Callable[[Mapping[str, Any]], bool]  # whether a config.json is of this layout
  # (its contents, its name for messages, the autoencoder if it is apart and there) -> the model's.
  read_config: Callable[[Mapping[str, Any], str, Any], ModelConfig]
  # (model, type of the weights, tokenizer if there is one) -> config.json; refuses what it cannot hold.
  write_config: Callable[[ModelConfig, str, Any], dict[str, Any]]
  entries: Callable[[ModelConfig, bool], list[Entry]]  # (model, whether the head is the embedding), in the file's order
  check_sizes: Callable[[Fields, ModelConfig, Mapping[str, Tensor], Any], None]  # see `sizes.check`
  language: str  # field of the LLM's section
  is_tied: Callable[[Fields], bool | None]  # whether config.json ties the head to the embedding; None: the file says
  embedding: str  # names of the tensors
  head: str
  checks: Mapping[str, Callable[[Fields, ModelConfig], None]]  # file of the processor -> its check
  files: Callable[[ModelConfig, Tokenizer | None], dict[str, Any]]  # file -> contents, beside config.json
  ignored: Callable[[str], bool] = lambda name: False  # tensors that files may hold and nothing reads
  # Parameters that it has no tensors for, which become zeros.
  unread: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]] = lambda config: {}
  unwritten: Callable[[ModelConfig], list[Entry]] = lambda config: []  # tensors that no parameter is in: zeros
  template: Callable[[Tokenizer | None], str] = lambda tokenizer: "chat"  # of `data.templates`
  vae_apart: bool = False  # whether the autoencoder is a directory of its own
  instead: str = ""  # where safetensors are, for a directory with a pickle


def all_layouts() -> Iterator[Layout]:
  """Yields every layout of every family."""
  for each in FAMILIES.all().values():
    yield from map(registry.load, each.layouts)


def names() -> list[str]:
  """The names of layouts, the values of `convert --from` and `--to`."""
  return list(dict.fromkeys(layout.name for layout in all_layouts()))


def found(directory: pathlib.Path) -> Layout | None:
  """The layout of a directory; None where it is not a published one."""
  path = directory / "config.json"
  values = read_object(path) if path.exists() else {}
  return next((layout for layout in all_layouts() if layout.recognises(values)), None)


def of(config: ModelConfig, name: str) -> Layout:
  """The layout of this name that holds a model.

  Raises:
    UserError: there is none.
  """
  kind = config.generation.kind
  layouts = {layout.name: layout for layout in map(registry.load, family(config.generation).layouts)}
  if name not in layouts or config.language_model.kind != "llama":
    raise UserError(
      f"model.generation.kind={kind!r} and model.language_model.kind={config.language_model.kind!r} have no "
      f"{name} layout; there is {', '.join(layouts) if layouts else 'none'}"
    )
  return layouts[name]
