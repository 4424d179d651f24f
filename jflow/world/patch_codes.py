"""The closed-form tokenizer that replaces VQ-16 in the world (kind "patch_codes"): k-means of patches.

Legend: B images, H x W pixels, h x w codes of an image, E numbers of a code, V rows of the codebook.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.generation.flow.convnext import unpatchify
from jflow.models.autoencoders.base import CodebookConfig
from jflow.models.autoencoders.kl import Conv
from jflow.models.layers import parameter
from jflow.world.codec import REACH, components, least_squares, pad, windows

_ROUNDS = 12  # of Lloyd's algorithm
_PLAIN, _KEPT = 0.02, 10  # largest range of a channel in a patch of one color; each so-manieth of those is fitted to


@dataclasses.dataclass(frozen=True)
class PatchCodesConfig(CodebookConfig):
  """The sizes of a `PatchCodes`."""

  used_in_float32 = "encoder/.*"

  patch_size: int  # pixels per code

  @property
  def factor(self) -> int:
    return self.patch_size

  def check(self, model: Any) -> None:
    if self.code_dim > 3 * self.patch_size**2:
      raise UserError(
        f"model.autoencoder.code_dim={self.code_dim} must be at most the {3 * self.patch_size**2} numbers of a patch"
      )

  def make(self, dtype: Any) -> "PatchCodes":
    return PatchCodes(self, dtype)

  def encoder_identity(self) -> tuple[Any, ...]:
    return self.kind, self.codebook_size, self.code_dim, self.patch_size

  def encoder_flops(self, image_size: int) -> float:
    return 2.0 * (image_size // self.patch_size) ** 2 * self.code_dim * (3 * self.patch_size**2 + self.codebook_size)

  def decoder_flops(self, latent_size: int) -> float:
    return 2.0 * latent_size**2 * REACH**2 * self.code_dim * 3 * self.patch_size**2


class PatchCodes(nn.Module):
  """A patch's principal components, the nearest row of a codebook, and a linear decoder of the 3 x 3 rows around it.

  Fit with `fit_patch_codes`.
  """

  config: PatchCodesConfig
  dtype: Any

  def setup(self) -> None:
    c = self.config
    self.encoder = Conv(c.code_dim, c.patch_size, jnp.float32, stride=c.patch_size, padding=(0, 0))
    shape = (c.codebook_size, c.code_dim)
    self.codebook = parameter(self, "codebook", nn.initializers.normal(1.0), shape, (None, None))
    self.decoder = Conv(3 * c.patch_size**2, REACH, self.dtype, padding=(0, 0))

  def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
    """The reconstruction of pixels, encoded and decoded."""
    return self.decode(self.encode(pixels_BHWC))

  def encode(self, pixels_BHWC: jax.Array) -> jax.Array:
    """f32[B, H, W, 3] in [-1, 1] -> codes int32[B, h, w]; equal distances take the lowest."""
    z_BhwE, rows_VE = self.encoder(pixels_BHWC).astype(jnp.float32), self.codebook.astype(jnp.float32)
    near = jnp.dot(z_BhwE, rows_VE.T, precision="highest") - 0.5 * jnp.sum(jnp.square(rows_VE), axis=-1)
    return jnp.argmax(near, axis=-1).astype(jnp.int32)

  def decode(self, codes_Bhw: jax.Array) -> jax.Array:
    """int32[B, h, w] -> f32[B, H, W, 3], about [-1, 1], not clipped."""
    y_BHWC = self.decoder(pad(self.codebook[codes_Bhw], REACH // 2, REACH // 2, jnp))
    return unpatchify(y_BHWC, self.config.patch_size).astype(jnp.float32)


def fit_patch_codes(images: np.ndarray, config: PatchCodesConfig) -> dict[str, Any]:
  """Fits `PatchCodes`: principal components, k-means of them, least squares from the rows back to the patches.

  Of patches of one color, most of a picture, only some are fitted to: the codebook is for edges.

  Args:
    images: uint8[B, H, W, 3].
    config: of the codec.

  Returns:
    The parameters of `PatchCodes`, f32. The same images give the same bits.

  Raises:
    UserError: the pictures have too few patches for the codebook.
  """
  p, k = config.patch_size, config.code_dim
  pixels = images.astype(np.float32) / 127.5 - 1.0
  x = windows(pixels, p, p).astype(np.float64)
  mean, vectors, deviation = components(x, k)
  kernel = vectors / np.sqrt(np.mean(deviation**2))
  latents = (x - mean) @ kernel
  colors = x.reshape(len(x), -1, 3)
  plain = (colors.max(axis=1) - colors.min(axis=1)).max(axis=1) < _PLAIN
  fitted = latents[~plain | (np.cumsum(plain) % _KEPT == 0)]
  if len(fitted) < config.codebook_size:
    raise UserError(
      f"model.autoencoder.codebook_size={config.codebook_size} must be at most the {len(fitted)} patches that it is "
      "fitted to: more of them with world.fit_images"
    )
  codebook = k_means(fitted, config.codebook_size)
  n, h, w, _ = images.shape
  rows = codebook[_nearest(latents, codebook)].reshape(n, h // p, w // p, k)
  f32 = lambda a: np.asarray(a, np.float32)
  return {
    "encoder": {"kernel": f32(kernel.reshape(p, p, 3, k)), "bias": f32(-mean @ kernel)},
    "codebook": f32(codebook),
    "decoder": least_squares(rows, pixels, p),
  }


def k_means(x: np.ndarray, count: int) -> np.ndarray:
  """The centres [count, n] of rows [m, n] by Lloyd's algorithm, from rows drawn by a fixed seed."""
  centres = x[np.random.default_rng(0).choice(len(x), count, replace=False)]
  for _ in range(_ROUNDS):
    nearest = _nearest(x, centres)
    members = np.bincount(nearest, minlength=count)
    sums = np.stack([np.bincount(nearest, column, minlength=count) for column in x.T], axis=1)
    far = np.argsort(-np.sum(np.square(x - centres[nearest]), axis=1), kind="stable")
    centres = sums / np.maximum(members, 1)[:, None]
    empty = np.flatnonzero(members == 0)
    centres[empty] = x[far[: len(empty)]]
  return centres


def _nearest(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
  """The index of the centre nearest to each row, some thousands at a time."""
  half = 0.5 * np.sum(np.square(centres), axis=1)
  return np.concatenate([np.argmax(part @ centres.T - half, axis=1) for part in np.array_split(x, 1 + len(x) // 8192)])
