"""The VAE's posterior of images, as training reads it from disk."""

from typing import Any

import jax
import jax.numpy as jnp

from jflow.models.config import ModelConfig


def encode(model: ModelConfig, vae: Any, pixels_NHWC: jax.Array) -> jax.Array:
  """Mean and log variance of the posterior, not scaled, bfloat16[N, h, w, 2 C]; see `generation.base.Stored`."""
  moments = model.autoencoder.make(jnp.float32).apply({"params": vae}, pixels_NHWC, method="encode")
  return jnp.concatenate(moments, axis=-1).astype(jnp.bfloat16)
