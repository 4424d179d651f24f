"""Decoding of many images a few at a time, since the activations of an autoencoder are wider than its images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

_PIXELS = 8 * 384 * 384  # decoded at once; a decoder's widest activations take 3 GB for them in f32


def at_once(image_size: int) -> int:
  """The number of images that are decoded at a time."""
  return max(1, _PIXELS // image_size**2)


def decoded(decode: Callable[[jax.Array], jax.Array], written: jax.Array, most: int) -> jax.Array:
  """Images of latents or codes [I, ...], at most `most` at a time."""
  n = len(written)
  if n <= most:
    return decode(written)
  cut = n - n % most
  pixels = jax.lax.map(decode, written[:cut].reshape(-1, most, *written.shape[1:]))
  pixels = pixels.reshape(cut, *pixels.shape[2:])
  return jnp.concatenate([pixels, decode(written[cut:])]) if cut < n else pixels
