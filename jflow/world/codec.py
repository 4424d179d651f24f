"""The closed-form codec that replaces the VAE in the world (kind "patch_pca"): principal components of pixel windows.

Legend: B images, H x W pixels or latents, C channels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.generation.flow.convnext import unpatchify
from jflow.models.autoencoders.base import AutoencoderConfig
from jflow.models.autoencoders.kl import Conv

_LOG_VARIANCE = -30.0  # effectively 0 variance
REACH = 3  # the decoder predicts a patch from the 3 x 3 latents around it


@dataclasses.dataclass(frozen=True)
class PatchPCAConfig(AutoencoderConfig):
  """The sizes of a `PatchPCA`."""

  patch_size: int  # pixels per latent
  window: int  # side of the pixel window that a latent sees

  @property
  def factor(self) -> int:
    return self.patch_size

  def check(self, model: Any) -> None:
    if self.window < self.patch_size:
      raise UserError(f"model.autoencoder.window={self.window} must be at least patch_size={self.patch_size}")

  def make(self, dtype: Any) -> "PatchPCA":
    return PatchPCA(self, dtype)

  def encoder_identity(self) -> tuple[Any, ...]:
    return self.kind, self.latent_channels, self.patch_size, self.window

  def encoder_flops(self, image_size: int) -> float:
    return 2.0 * (image_size // self.patch_size) ** 2 * 3 * self.window**2 * self.latent_channels

  def decoder_flops(self, latent_size: int) -> float:
    return 2.0 * latent_size**2 * REACH**2 * self.latent_channels * 3 * self.patch_size**2


class PatchPCA(nn.Module):
  """Linear codec: principal components of pixel windows.

  A latent encodes a window of `window` pixels around its patch; the decoder predicts a patch from the 3 x 3
  latents around it. Deterministic: the log variance is a constant near 0 variance. Fit with `fit_patch_pca`.
  """

  config: PatchPCAConfig
  dtype: Any

  def setup(self) -> None:
    c = self.config
    self.encoder = Conv(c.latent_channels, c.window, self.dtype, stride=c.patch_size, padding=(0, 0))
    self.decoder = Conv(3 * c.patch_size**2, REACH, self.dtype, padding=(0, 0))

  def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
    """The reconstruction of pixels, encoded and decoded."""
    return self.decode(self.encode(pixels_BHWC)[0])

  def encode(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[B, H, W, 3] in [-1, 1] -> latents f32[B, h, w, latent_channels] and their log variance, -30."""
    latents = self.encoder(pad(pixels_BHWC, *_margins(self.config), jnp)).astype(jnp.float32)
    return latents, jnp.full_like(latents, _LOG_VARIANCE)

  def decode(self, latents_BHWC: jax.Array) -> jax.Array:
    """f32[B, h, w, latent_channels], not scaled -> f32[B, H, W, 3], about [-1, 1], not clipped."""
    y_BHWC = self.decoder(pad(latents_BHWC, REACH // 2, REACH // 2, jnp))
    return unpatchify(y_BHWC, self.config.patch_size).astype(jnp.float32)


def _margins(config: PatchPCAConfig) -> tuple[int, int]:
  """Pixels of a window before and after its patch."""
  extra = config.window - config.patch_size
  return extra // 2, extra - extra // 2


def pad(x_BHWC: Any, before: int, after: int, xp: Any) -> Any:
  """The map padded by repeating its edge."""
  return xp.pad(x_BHWC, ((0, 0), (before, after), (before, after), (0, 0)), mode="edge")


def windows(x_BHWC: np.ndarray, size: int, stride: int) -> np.ndarray:
  """All windows as rows [B * h * w, size * size * C], each in the order row, column, channel."""
  view = np.lib.stride_tricks.sliding_window_view(x_BHWC, (size, size), axis=(1, 2))[:, ::stride, ::stride]
  return view.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size * size * x_BHWC.shape[-1])


def fit_patch_pca(images: np.ndarray, config: PatchPCAConfig) -> dict[str, dict[str, np.ndarray]]:
  """Fits `PatchPCA` in closed form: principal components of the windows, least squares back to the patches.

  Channel k with standard deviation s_k is divided by sqrt(s_k): halfway between plain PCA, where brightness would
  dominate the flow loss, and whitened channels, where noise in the finest detail would weigh as much as the colour of
  an object. Then one factor for all channels makes the variance of `config.scaling` times the latents, averaged over
  channels, equal to 1. Latents have mean 0.

  Args:
    images: uint8[B, H, W, 3]; the number of windows in all should be well above window * window * 3.
    config: of the codec.

  Returns:
    The parameters of `PatchPCA`, f32. The same images give the same bits: signs are fixed.

  Raises:
    UserError: the window is smaller than the patch or wider than the decoder's reach.
  """
  p, k = config.patch_size, config.latent_channels
  if not p <= config.window <= REACH * p:
    raise UserError(f"model.autoencoder.window={config.window} must lie between patch_size={p} and {REACH} times that")
  pixels = images.astype(np.float32) / 127.5 - 1.0
  x = windows(pad(pixels, *_margins(config), np), config.window, p).astype(np.float64)
  mean, vectors, deviation = components(x, k)
  kernel = vectors / np.sqrt(deviation) / (config.scaling * np.sqrt(np.mean(deviation)))

  n, h, w, _ = images.shape
  latents = ((x - mean) @ kernel).reshape(n, h // p, w // p, k)
  f32 = lambda a: np.asarray(a, np.float32)
  return {
    "encoder": {
      "kernel": f32(kernel.reshape(config.window, config.window, 3, k)),
      "bias": f32(-mean @ kernel),
    },
    "decoder": least_squares(latents, pixels, p),
  }


def components(x: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The mean [n] of rows [m, n], their first principal components [n, count] and deviations; signs are fixed."""
  mean = x.mean(axis=0)
  values, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
  values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
  vectors = vectors * np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(count)] < 0, -1.0, 1.0)
  return mean, vectors, np.sqrt(np.maximum(values, 1e-8))


def least_squares(latents: np.ndarray, pixels: np.ndarray, patch: int) -> dict[str, np.ndarray]:
  """The decoder from the 3 x 3 latents around a patch to its pixels, as parameters of a `Conv`."""
  design = windows(pad(latents, REACH // 2, REACH // 2, np), REACH, 1)
  target = windows(pixels, patch, patch).reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2)
  target = target.reshape(-1, 3 * patch * patch).astype(np.float64)
  centre, target_mean = design.mean(axis=0), target.mean(axis=0)
  design = design - centre
  gram = design.T @ design + 1e-6 * len(design) * np.mean(latents**2) * np.eye(design.shape[1])
  back = np.linalg.solve(gram, design.T @ (target - target_mean))
  kernel = back.reshape(REACH, REACH, latents.shape[-1], 3 * patch * patch)
  return {"kernel": np.asarray(kernel, np.float32), "bias": np.asarray(target_mean - centre @ back, np.float32)}
