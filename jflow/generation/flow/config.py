"""Sizes of the ConvNeXt encoder and decoder around the LLM, and how training draws times."""

import dataclasses
from typing import Any

from jflow import checks, values
from jflow.errors import UserError
from jflow.models.autoencoders.base import AutoencoderConfig
from jflow.strict_json import shown


@dataclasses.dataclass(frozen=True)
class FlowDraws:
  """The section `objective.draws`: the logit of a training image's time is normal (not in the paper).

  Raises:
    UserError: a deviation that is not positive.
  """

  time_mean: float
  time_std: float

  def __post_init__(self) -> None:
    if not self.time_std > 0:
      raise UserError(f"config.objective.draws.time_std must be above 0, got {self.time_std}")


@dataclasses.dataclass(frozen=True)
class FlowExploration:
  """The section `rl.explore`: how the policy draws a trajectory, see `sde`.

  Attributes:
    steps: of the solver, from noise to data.
    noise: a of `sde`, the level of the noise that steps add.
    window: consecutive steps of a trajectory that draw and are learned from, their place drawn for each batch; the
      others follow the ODE. 0: all but the last.
    guidance: w of eq. 5; 1: none.
    normalised: 1 or 0, whether ratios are without their bias and of one scale at all times, see `sde.log_ratio`.

  Raises:
    UserError: a value out of its range.
  """

  steps: int
  noise: float
  window: int
  guidance: float
  normalised: bool

  def __post_init__(self) -> None:
    for name in ("steps", "window"):  # a section of numbers holds floats
      value: Any = getattr(self, name)
      object.__setattr__(self, name, int(value) if value == int(value) else value)
    wrong = "config.rl.explore."
    checks.need(wrong + "steps", self.steps, values.whole(2, 10_000))
    checks.need(wrong + "noise", self.noise, values.number(above=0.0))
    checks.need(wrong + "window", self.window, values.whole(0, self.steps - 1))
    checks.need(wrong + "guidance", self.guidance, values.guidance)
    if self.normalised not in (0, 1):
      raise UserError(f"{wrong}normalised={self.normalised} must be 1 or 0")
    object.__setattr__(self, "normalised", bool(self.normalised))


@dataclasses.dataclass(frozen=True)
class FlowConfig:
  """The section `model.generation` of a model that writes by rectified flow (g_enc, g_dec)."""

  kind: str  # "flow"
  channels: int  # channels of g_enc and of the sinusoidal time embedding; g_dec works at twice that
  encoder_blocks: int
  decoder_blocks: int
  patch_size: int  # latents per side of a patch
  norm_epsilon: float

  def check(self, model: Any) -> None:
    """Raises UserError where the section does not fit the rest of the model."""
    if self.channels % 2:
      raise UserError(f"model.generation.channels={self.channels} must be even (cosines and sines of the time)")
    if not isinstance(model.autoencoder, AutoencoderConfig):
      raise UserError(
        f"model.autoencoder.kind={shown(getattr(model.autoencoder, 'kind', None))} must be a kind with latents where "
        "model.generation.kind='flow'"
      )
    factor, size = model.autoencoder.factor, model.image_size
    if size % (factor * self.patch_size):
      raise UserError(
        f"image_size={size} must be a multiple of autoencoder factor {factor} x "
        f"model.generation.patch_size={self.patch_size}"
      )
    if model.reader.kind != "siglip" and model.patches != self.written_patches(model):
      raise UserError(
        f"model.reader.kind={shown(model.reader.kind)} reads the {self.written_patches(model)} patches of a written image, "
        f"and SigLIP's image_size and patch_size give {model.patches}: they must be equal"
      )

  def written_patches(self, model: Any) -> int:
    """Patches of latents of a written image."""
    return (model.latent_size // self.patch_size) ** 2
