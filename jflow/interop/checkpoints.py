"""Opens a checkpoint of either layout: the published one, or jflow's own."""

import pathlib
from typing import Any, NamedTuple

from jflow.errors import UserError
from jflow.interop import official, remote, transfer
from jflow.models.config import JanusFlowConfig
from jflow.training import checkpoint


class Checkpoint(NamedTuple):
  """A checkpoint in memory."""

  config: JanusFlowConfig
  params: Any  # nested numpy arrays; without "vae" where has_vae is False
  tokenizer: pathlib.Path  # directory with tokenizer.json, if the checkpoint has one
  template: str  # "plain" or "chat"
  has_vae: bool


def locate(path: str | pathlib.Path) -> pathlib.Path:
  """Finds what is read of a checkpoint: an official directory itself, of a jflow one the newest intact step.

  What was located once stays the same while a training run saves newer steps.

  Args:
    path: directory, here or in a store (gs://BUCKET/FOLDER; see `remote.fetch`).

  Raises:
    UserError: it is neither, or no step is intact.
  """
  path = remote.fetch(path) if remote.is_remote(path) else pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"checkpoint {path} is not a directory")
  return path if official.is_official(path) else checkpoint.resolve(path)[1]


def workdir_of(step_dir: pathlib.Path) -> pathlib.Path:
  """The workdir, with the configuration and the tokenizer, of a step that `locate` found."""
  return step_dir.parent.parent


def read_checkpoint(
  path: str | pathlib.Path, *, vae: str | pathlib.Path | None = None, weights: str = "ema"
) -> Checkpoint:
  """Reads a checkpoint, official or jflow.

  Args:
    path: see `locate`.
    vae: directory of the SDXL-VAE, for a checkpoint that holds none; None: the VAE inside it, if there is one.
    weights: "ema" or "raw", for a jflow one.

  Raises:
    UserError: it is neither, or something is missing or wrong.
  """
  found = locate(path)
  if official.is_official(found):
    loaded = official.load(found, pathlib.Path(vae) if vae else None)
    return Checkpoint(loaded.config, transfer.nest(loaded.params), found, "chat", loaded.has_vae)
  workdir = workdir_of(found)
  fields = checkpoint.read_config(workdir)
  config = JanusFlowConfig.from_dict(fields["model"])
  given = {}
  if vae:
    autoencoder, flat = official.load_vae(pathlib.Path(vae), None)
    if autoencoder != config.autoencoder:
      raise UserError(f"{vae} holds another VAE than the one that {path} was trained with")
    given = transfer.nest(flat)
  return Checkpoint(
    config=config,
    params=checkpoint.load_params(found, weights) | given,
    tokenizer=workdir / "tokenizer",
    template=fields["data"]["template"],
    has_vae=bool(given) or fields.get("has_vae", True),
  )
