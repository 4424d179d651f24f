"""Opens a checkpoint of any layout: a published one, or jflow's own."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from jflow.data import templates
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError, need_text_name
from jflow.interop import layouts, native, own_layout, packed, published, remote, transfer
from jflow.interop import vae as diffusers_vae
from jflow.models.config import ModelConfig


class Checkpoint(NamedTuple):
  """A checkpoint in memory."""

  config: ModelConfig
  params: Any  # nested numpy arrays; without "vae" where has_vae is False
  tokenizer: pathlib.Path  # directory with tokenizer.json, if the checkpoint has one
  template: str  # of `data.templates`
  has_vae: bool
  sampling: Mapping[str, Any] = {}  # see `generation.base.own_settings`


class Described(NamedTuple):
  """A checkpoint whose files are consistent, as far as can be checked before its weights are read."""

  config: ModelConfig
  directory: pathlib.Path  # with tokenizer.json, if the checkpoint has one
  tokenizer: Tokenizer | None  # read on request
  template: str
  has_vae: bool
  read_params: Callable[[], Any]  # nested numpy arrays
  sampling: Mapping[str, Any] = {}  # see `generation.base.own_settings`

  def read(self) -> Checkpoint:
    """Reads the weights."""
    return Checkpoint(self.config, self.read_params(), self.directory, self.template, self.has_vae, self.sampling)


def locate(path: str | pathlib.Path) -> pathlib.Path:
  """The directory to read of a checkpoint: a published or packed one itself, or the newest intact step of a workdir.

  The result stays valid while a training run saves newer steps.

  Args:
    path: local directory, one in a store (gs://BUCKET/FOLDER) or on the hub (ORG/NAME@REVISION), see `remote.fetch`,
      or "world" or "world-codes", the models that come with jflow.

  Raises:
    UserError: the path is no checkpoint, or no step is intact.
  """
  path = remote.local(path)
  if not path.is_dir():
    raise UserError(f"checkpoint {path} is not a directory")
  return native.resolve(path)[1] if layouts.found(path) is None and not packed.is_packed(path) else path


def workdir_of(step_dir: pathlib.Path) -> pathlib.Path:
  """The workdir, with configuration and tokenizer, of a step directory from `locate`."""
  return step_dir.parent.parent


def read_checkpoint(
  path: str | pathlib.Path, *, vae: str | pathlib.Path | None = None, weights: str = "ema", whole: bool = True
) -> Checkpoint:
  """Reads a checkpoint of any layout: `describe`, then the weights."""
  return describe(path, vae=vae, weights=weights, whole=whole).read()


def describe(
  path: str | pathlib.Path,
  *,
  vae: str | pathlib.Path | None = None,
  weights: str = "ema",
  tokenizer: bool = False,
  whole: bool = True,
) -> Described:
  """Reads and checks all of a checkpoint except its weights, cheapest checks first.

  Args:
    path: see `locate`.
    vae: directory of the SDXL-VAE, for a checkpoint that holds none; None: the VAE inside it, if there is one.
    weights: "ema" or "raw", for a jflow one.
    tokenizer: whether it must have one that fits the model.
    whole: whether the parameters of a jflow one must match its config.json; callers that take parts compare those.

  Raises:
    UserError: the path is no checkpoint, or something is missing, contradictory, or wrong.
  """
  path = remote.local(path)
  vae = remote.local(vae) if vae else None
  if path.is_dir() and packed.is_packed(path):
    return _describe_packed(path, vae, weights, tokenizer)
  layout = layouts.found(path) if path.is_dir() else None
  if layout is None:
    return _describe_own(path, vae, weights, tokenizer, whole)
  _not_raw(path, weights)
  if tokenizer and not (path / "tokenizer.json").is_file():
    Tokenizer.load(str(path))  # says what is missing
  found = published.describe(layout, path, vae)
  read = lambda: transfer.nest(found.read())
  return Described(found.config, path, found.tokenizer, found.template, found.has_vae, read)


def read_config(path: str | pathlib.Path) -> ModelConfig:
  """The model's configuration, from a checkpoint's config.json alone; uses no device.

  Raises:
    UserError: see `describe`.
  """
  path = remote.local(path)
  if path.is_dir() and not packed.is_packed(path) and (layout := layouts.found(path)) is not None:
    return published.read_config(layout, path)
  return _own_settings(path).config


def sampling_of(path: str | pathlib.Path) -> Mapping[str, Any]:
  """The sampling settings that a checkpoint's config.json sets; none of a published one.

  Raises:
    UserError: see `describe`.
  """
  path = remote.local(path)
  if path.is_dir() and not packed.is_packed(path) and layouts.found(path) is not None:
    return {}
  return _own_settings(path).sampling


def _own_settings(path: pathlib.Path) -> own_layout.Settings:
  """The settings of a packed checkpoint, or of the workdir around a path."""
  return own_layout.read_settings(path if path.is_dir() and packed.is_packed(path) else _workdir_around(path))


def tokenizer_of(path: str | pathlib.Path) -> pathlib.Path:
  """The directory that holds the tokenizer.json of a checkpoint, if it has one; its weights are not read.

  Raises:
    UserError: the path is no checkpoint.
  """
  path = remote.local(path)
  if path.is_dir() and (packed.is_packed(path) or layouts.found(path) is not None):
    return path
  return _workdir_around(path) / "tokenizer"


def _workdir_around(path: pathlib.Path) -> pathlib.Path:
  """The workdir of a path, which is the workdir itself, its checkpoints folder, or a step."""
  around = (path, path.parent, path.parent.parent)
  workdir = next((d for d in around if (d / "checkpoints").is_dir() and (d / "config.json").exists()), None)
  return workdir or workdir_of(locate(path))  # raises with the reason if there is none


def _not_raw(path: pathlib.Path, weights: str) -> None:
  if weights != "ema":
    raise UserError(f"weights={weights!r} must be 'ema': {path} holds one set of weights")


def _describe_packed(path: pathlib.Path, vae: pathlib.Path | None, weights: str, tokenizer: bool) -> Described:
  _not_raw(path, weights)
  settings, tensors = packed.describe(path)
  if vae is not None:
    raise UserError(f"{vae} is not read: {path} holds its own VAE")
  words = None
  if tokenizer:
    words = Tokenizer.load(str(path))
    templates.check_fits(settings.template, words, settings.config)
  read = lambda: transfer.nest(packed.read(tensors))
  return Described(settings.config, path, words, settings.template, settings.has_vae, read, settings.sampling)


def _describe_own(
  path: pathlib.Path, vae: pathlib.Path | None, weights: str, tokenizer: bool, whole: bool
) -> Described:
  workdir = _workdir_around(path)
  settings = own_layout.read_settings(workdir)
  config, words = settings.config, None
  if tokenizer:
    words = Tokenizer.load(str(workdir / "tokenizer"))
    templates.check_fits(settings.template, words, config)
  given = None
  if vae is not None:
    autoencoder, given = diffusers_vae.describe(vae)
    if autoencoder != config.autoencoder:
      raise UserError(f"{vae} must hold the VAE that {path} was trained with: it holds another")
    settings = settings._replace(has_vae=False)
  step = locate(path)
  need_text_name("--checkpoint", step)
  parts = native.param_shapes(step, weights)
  found = {name: x for part in parts.values() for name, x in flatten_dict(part, sep="/").items()}
  if whole:
    own_layout.check_names(settings, found, step)
  own_layout.check_bytes(found, step)
  read = lambda: native.load_params(step, weights) | (transfer.nest(given.read(None)) if given else {})
  has_vae = given is not None or settings.has_vae
  return Described(config, workdir / "tokenizer", words, settings.template, has_vae, read, settings.sampling)
