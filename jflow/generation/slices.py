"""Decoding of many images a few at a time, since the activations of an autoencoder are wider than its images."""

from typing import Any

import jax
import jax.numpy as jnp

_PIXELS = 8 * 384 * 384  # decoded at once; a decoder's widest activations take 3 GB for them in f32


def at_once(image_size: int) -> int:
  """The number of images that are decoded at a time."""
  return max(1, _PIXELS // image_size**2)


def decoded(model: Any, params: Any, written: jax.Array, most: int = 0) -> jax.Array:
  """Images of latents or codes [I, ...] by the model's writer, at most `most` at a time; 0: as `at_once` says."""
  decode = lambda part: model.bind({"params": params}).writer.decode(part)
  n, most = len(written), most or at_once(model.config.image_size)
  if n <= most:
    return decode(written)
  cut = n - n % most
  pixels = jax.lax.map(decode, written[:cut].reshape(-1, most, *written.shape[1:]))
  pixels = pixels.reshape(cut, *pixels.shape[2:])
  return jnp.concatenate([pixels, decode(written[cut:])]) if cut < n else pixels
