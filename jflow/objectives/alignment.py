"""Representation alignment (REPA, eq. 8): the LLM's features of latents against SigLIP's of the clean image."""

import dataclasses
from collections.abc import Collection
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.batch import WRITE, Batch
from jflow.errors import UserError
from jflow.models.layers import Linear
from jflow.objectives.base import Forward, Part


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
  """The section `model.objectives.alignment`."""

  layer: int  # the LLM's features after this block, counted from 1 (paper section 4.1)
  hidden_dim: int  # hidden width of the head

  def check(self, model: Any) -> None:
    """Raises UserError where the patches of a written image are not those that SigLIP sees."""
    if model.patches != model.written_patches:
      raise UserError(
        f"model.objectives.alignment: a written image has {model.written_patches} patches, a read one {model.patches}: they "
        "must be equal, since eq. 8 compares them one by one; leave the objective out"
      )


def loss(projected: jax.Array, features: jax.Array, mask: jax.Array) -> jax.Array:
  """Minus the sum over masked images of the mean cosine similarity over patches (eq. 8).

  `features`, the understanding encoder's, get no gradient (stop_gradient).

  Args:
    projected: [..., P, E], the head on the LLM's features of the latent tokens.
    features: [..., P, E].
    mask: bool[...] of the images that count.
  """
  features = jax.lax.stop_gradient(features).astype(jnp.float32)
  projected = projected.astype(jnp.float32)
  dot = jnp.sum(projected * features, axis=-1)
  norms = jnp.sqrt(jnp.sum(projected**2, -1) * jnp.sum(features**2, -1) + 1e-12)
  return -jnp.sum(jnp.where(mask, jnp.mean(dot / norms, axis=-1), 0.0))


class AlignmentHead(nn.Module):
  """Three-layer MLP h_phi of REPA (eq. 8): LLM features -> SigLIP width. Training only."""

  hidden: int
  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = jax.nn.silu(Linear(self.hidden, ("embed", "mlp"), self.dtype, use_bias=True, name="linear_1")(x))
    x = jax.nn.silu(Linear(self.hidden, ("mlp", None), self.dtype, use_bias=True, name="linear_2")(x))
    return Linear(self.features, ("mlp", None), self.dtype, use_bias=True, name="linear_3")(x)


class Alignment(nn.Module):
  """The objective; see `objectives.base.Objective`."""

  model: Any
  config: AlignmentConfig
  dtype: Any

  def setup(self) -> None:
    self.alignment_head = AlignmentHead(self.config.hidden_dim, self.model.understanding_encoder.embed_dim, self.dtype)

  def __call__(self, forward: Forward) -> jax.Array:
    """The sum of the loss over written images, f32[]."""
    projected = self.alignment_head(forward.patches(cast("jax.Array", forward.layer)))
    return loss(projected, forward.features, forward.written)

  @staticmethod
  def count(batch: Batch) -> jax.Array:
    """The number of written images, at least 1."""
    return jnp.maximum(jnp.sum(batch.image_kind == WRITE), 1).astype(jnp.float32)


def flops(model: Any, config: AlignmentConfig, trained: Collection[str], work: Any) -> float:
  """FLOPs of the head in one training step; see jflow/models/flops.py."""
  width, features = model.language_model.embed_dim, model.understanding_encoder.embed_dim
  weights = width * config.hidden_dim + config.hidden_dim**2 + config.hidden_dim * features
  return (6 if "alignment_head" in trained else 4) * model.patches * weights * work.written


PART = Part(config=AlignmentConfig, module=Alignment, heads=("alignment_head",), features=True, flops=flops)
