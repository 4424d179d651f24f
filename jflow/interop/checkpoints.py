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


def read_checkpoint(
  path: str | pathlib.Path, *, vae: str | pathlib.Path | None = None, weights: str = "ema"
) -> Checkpoint:
  """Reads a checkpoint, official or jflow.

  Args:
    path: directory, here or in a store (gs://BUCKET/FOLDER; see `remote.fetch`).
    vae: directory of the SDXL-VAE, for an official checkpoint; None: `vae/` inside it, if that exists.
    weights: "ema" or "raw", for a jflow one.

  Raises:
    UserError: it is neither, or something is missing or wrong.
  """
  path = remote.fetch(path) if remote.is_remote(path) else pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"checkpoint {path} is not a directory")
  if official.is_official(path):
    loaded = official.load(path, pathlib.Path(vae) if vae else None)
    return Checkpoint(loaded.config, transfer.nest(loaded.params), path, "chat", loaded.has_vae)
  workdir, step_dir = checkpoint.resolve(path)
  config = checkpoint.read_config(workdir)
  return Checkpoint(
    config=JanusFlowConfig.from_dict(config["model"]),
    params=checkpoint.load_params(step_dir, weights),
    tokenizer=workdir / "tokenizer",
    template=config["data"]["template"],
    has_vae=config.get("has_vae", True),
  )
