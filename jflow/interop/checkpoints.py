"""Opens a checkpoint of either layout: the published one, or jflow's own."""

import json
import pathlib
from typing import Any, NamedTuple

from jflow.errors import UserError
from jflow.models.config import JanusFlowConfig
from jflow.training import checkpoint


class Checkpoint(NamedTuple):
  """A checkpoint in memory."""

  config: JanusFlowConfig
  params: Any  # nested numpy arrays
  tokenizer: pathlib.Path  # directory with tokenizer.json
  template: str  # "plain" or "chat"
  has_vae: bool


def is_official(path: pathlib.Path) -> bool:
  """Whether a directory has the published layout: a config.json with a `language_config`."""
  file = path / "config.json"
  if not file.is_file():
    return False
  try:
    return "language_config" in json.loads(file.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise UserError(f"{file} is not readable JSON: {error}") from error


def read_checkpoint(path: str | pathlib.Path, *, vae: str | pathlib.Path | None = None, weights: str = "ema") -> Checkpoint:
  """Reads a checkpoint, official or jflow.

  Args:
    path: directory.
    vae: directory of the SDXL-VAE, for an official checkpoint.
    weights: "ema" or "raw", for a jflow one.

  Raises:
    UserError: it is neither, or something is missing or wrong.
  """
  path = pathlib.Path(path)
  if not path.is_dir():
    raise UserError(f"checkpoint {path} is not a directory")
  if is_official(path):
    from jflow.interop.convert import read_official

    return read_official(path, vae)
  workdir, step_dir = checkpoint.resolve(path)
  config = checkpoint.read_config(workdir)
  return Checkpoint(
    config=JanusFlowConfig.from_dict(config["model"]),
    params=checkpoint.load_params(step_dir, weights),
    tokenizer=workdir / "tokenizer",
    template=config["data"]["template"],
    has_vae=config.get("has_vae", True),
  )
