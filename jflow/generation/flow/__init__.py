"""Rectified flow of VAE latents (JanusFlow, paper sections 3.1 and 3.2)."""

from jflow.generation.base import Family
from jflow.generation.flow.config import FlowConfig
from jflow.generation.flow.layout import FlowLayout
from jflow.generation.flow.settings import Settings

FAMILY = Family(
  name="flow",
  config=FlowConfig,
  layout=FlowLayout(),
  settings=Settings,
  writer="jflow.generation.flow.writer:FlowWriter",
  sampler="jflow.generation.flow.sampler:FlowSampler",
  tokens=("image", "generation_start"),
  layouts=("jflow.interop.janusflow:LAYOUT",),
  flops="jflow.generation.flow.flops",
)
