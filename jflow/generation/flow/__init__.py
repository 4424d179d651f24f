"""Rectified flow of VAE latents (JanusFlow, paper sections 3.1 and 3.2)."""

from typing import Any

from jflow.generation.base import Family, Stored
from jflow.generation.flow.config import FlowConfig, FlowDraws, FlowExploration
from jflow.generation.flow.layout import FlowLayout
from jflow.generation.flow.settings import Settings


def _moments(model: Any) -> tuple[int, ...]:
  """(h, w, 2 C), mean and log variance."""
  return (model.latent_size, model.latent_size, 2 * model.autoencoder.latent_channels)


FAMILY = Family(
  name="flow",
  about="rectified flow in a VAE's latents",
  config=FlowConfig,
  layout=FlowLayout(),
  settings=Settings,
  writer="jflow.generation.flow.writer:FlowWriter",
  sampler="jflow.generation.flow.sampler:FlowSampler",
  tokens=("image", "generation_start"),
  layouts=("jflow.interop.janusflow:LAYOUT",),
  parity="jflow.interop.parity_flow:GROUPS",
  flops="jflow.generation.flow.flops",
  stored=Stored(
    name="latents",
    array="moments",
    dtype="bfloat16",
    shape=_moments,
    part="vae",
    weights=("encoder", "quant"),
    encode="jflow.generation.flow.stored:encode",
    about="the mean and log variance of the VAE's posterior (bfloat16, 36 KB at 384)",
  ),
  draws=FlowDraws,
  policy="jflow.generation.flow.policy:FlowPolicy",
  explores=FlowExploration,
)
