"""The codes of images, made ahead of training."""

from typing import Any

import jax
import jax.numpy as jnp

from jflow.models.config import ModelConfig


def encode(config: ModelConfig, vq: Any, pixels_NHWC: jax.Array) -> jax.Array:
  """f32 pixels in [-1, 1] -> codes uint16[N, P], row by row from the top left."""
  model = config.autoencoder.make(jnp.float32)
  codes: Any = model.apply({"params": vq}, pixels_NHWC, method="encode")
  return codes.reshape(len(codes), -1).astype(jnp.uint16)
