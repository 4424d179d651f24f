"""The frozen autoencoder between pixels and latents: SDXL's AutoencoderKL, and a closed-form stand-in.

Both have the same interface. `encode` returns latents before scaling: the caller multiplies by
`config.scaling` after it and divides before `decode`.

Legend: B images, H x W pixels or latents, C channels, P positions of an image.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.generation.flow.convnext import unpatchify
from jflow.models.config import AutoencoderConfig
from jflow.models.layers import Linear, parameter

_EPSILON = 1e-6  # group norms
_LOG_VARIANCE = (-30.0, 20.0)  # range to which the posterior's log variance is clamped
_REACH = 3  # patch_pca: the decoder predicts a patch from the 3 x 3 latents around it


class Conv(nn.Module):
  """Square convolution, `kernel` f32[size, size, in, out]; the VAE is frozen and small: replicated."""

  features: int
  size: int
  dtype: Any
  stride: int = 1
  padding: tuple[int, int] | None = None  # before and after, on both axes; None keeps the size

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    shape = (self.size, self.size, x_BHWC.shape[-1], self.features)
    kernel = parameter(self, "kernel", nn.initializers.lecun_normal(), shape, (None,) * 4)
    bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), (None,))
    padding = self.padding or (self.size // 2, self.size // 2)
    y_BHWC = jax.lax.conv_general_dilated(
      x_BHWC.astype(self.dtype),
      kernel.astype(self.dtype),
      window_strides=(self.stride, self.stride),
      padding=(padding, padding),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y_BHWC + bias.astype(self.dtype)


class GroupNorm(nn.Module):
  """Normalises each group of consecutive channels over the whole image, computed in f32."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    b, _, _, c = x_BHWC.shape
    scale = parameter(self, "scale", nn.initializers.ones, (c,), (None,))
    bias = parameter(self, "bias", nn.initializers.zeros, (c,), (None,))
    x = x_BHWC.astype(jnp.float32)
    # A channel over its image first, then channels of a group: on a CPU 3 times as fast as over both at once, and
    # closer to the exact mean, since fewer numbers go into one sum.
    of_group = lambda mean_BC: jnp.repeat(
      jnp.mean(mean_BC.reshape(b, self.groups, -1), axis=-1), c // self.groups, axis=-1
    )
    x = x - of_group(jnp.mean(x, axis=(1, 2)))[:, None, None]
    variance_BC = of_group(jnp.mean(jnp.square(x), axis=(1, 2)))
    x = x * (jax.lax.rsqrt(variance_BC + _EPSILON) * scale)[:, None, None] + bias
    return x.astype(self.dtype)


class Resnet(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the channels change."""

  features: int
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    norm = lambda name: GroupNorm(self.groups, self.dtype, name=name)
    y_BHWC = Conv(self.features, 3, self.dtype, name="conv_1")(jax.nn.silu(norm("norm_1")(x_BHWC)))
    y_BHWC = Conv(self.features, 3, self.dtype, name="conv_2")(jax.nn.silu(norm("norm_2")(y_BHWC)))
    if x_BHWC.shape[-1] != self.features:
      x_BHWC = Conv(self.features, 1, self.dtype, name="shortcut")(x_BHWC)
    return x_BHWC + y_BHWC


class MidAttention(nn.Module):
  """Single-head attention over all positions of an image, with a residual."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    b, h, w, c = x_BHWC.shape
    linear = lambda name: Linear(c, (None, None), self.dtype, use_bias=True, name=name)
    x_BPC = GroupNorm(self.groups, self.dtype, name="norm")(x_BHWC).reshape(b, h * w, c)
    q_BPC, k_BPC, v_BPC = linear("query")(x_BPC), linear("key")(x_BPC), linear("value")(x_BPC)
    logits = jnp.einsum("BPC,BQC->BPQ", q_BPC, k_BPC, preferred_element_type=jnp.float32) * c**-0.5
    weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
    y_BPC = linear("output")(jnp.einsum("BPQ,BQC->BPC", weights, v_BPC))
    return x_BHWC + y_BPC.reshape(b, h, w, c)


class Middle(nn.Module):
  """Resnet, attention, resnet at the lowest resolution."""

  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    c = x_BHWC.shape[-1]
    x_BHWC = Resnet(c, self.groups, self.dtype, name="resnet_1")(x_BHWC)
    x_BHWC = MidAttention(self.groups, self.dtype, name="attention")(x_BHWC)
    return Resnet(c, self.groups, self.dtype, name="resnet_2")(x_BHWC)


class Encoder(nn.Module):
  config: AutoencoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """[B, H, W, 3] -> [B, H / factor, W / factor, 2 * latent_channels]."""
    c, dtype = self.config, self.dtype
    x_BHWC = Conv(c.block_channels[0], 3, dtype, name="conv_in")(x_BHWC)
    for i, channels in enumerate(c.block_channels):
      for j in range(c.layers_per_block):
        x_BHWC = Resnet(channels, c.norm_groups, dtype, name=f"down_{i}_resnet_{j}")(x_BHWC)
      if i + 1 < len(c.block_channels):
        down = Conv(channels, 3, dtype, stride=2, padding=(0, 1), name=f"down_{i}_sample")
        x_BHWC = down(x_BHWC)
    x_BHWC = Middle(c.norm_groups, dtype, name="middle")(x_BHWC)
    x_BHWC = jax.nn.silu(GroupNorm(c.norm_groups, dtype, name="norm_out")(x_BHWC))
    return Conv(2 * c.latent_channels, 3, dtype, name="conv_out")(x_BHWC)


class Decoder(nn.Module):
  config: AutoencoderConfig
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """[B, h, w, latent_channels] -> [B, h * factor, w * factor, 3]."""
    c, dtype = self.config, self.dtype
    x_BHWC = Conv(c.block_channels[-1], 3, dtype, name="conv_in")(x_BHWC)
    x_BHWC = Middle(c.norm_groups, dtype, name="middle")(x_BHWC)
    for i, channels in enumerate(reversed(c.block_channels)):
      for j in range(c.layers_per_block + 1):
        x_BHWC = Resnet(channels, c.norm_groups, dtype, name=f"up_{i}_resnet_{j}")(x_BHWC)
      if i + 1 < len(c.block_channels):
        x_BHWC = jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)
        x_BHWC = Conv(channels, 3, dtype, name=f"up_{i}_sample")(x_BHWC)
    x_BHWC = jax.nn.silu(GroupNorm(c.norm_groups, dtype, name="norm_out")(x_BHWC))
    return Conv(3, 3, dtype, name="conv_out")(x_BHWC)


class AutoencoderKL(nn.Module):
  """The autoencoder of SDXL. Run it in bf16 or f32: fp16 overflows."""

  config: AutoencoderConfig
  dtype: Any

  def setup(self) -> None:
    c = self.config
    self.encoder = Encoder(c, self.dtype)
    self.quant = Conv(2 * c.latent_channels, 1, self.dtype)
    self.post_quant = Conv(c.latent_channels, 1, self.dtype)
    self.decoder = Decoder(c, self.dtype)

  def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
    """Reconstructs: the decoded mean of the posterior."""
    return self.decode(self.encode(pixels_BHWC)[0])

  def encode(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[B, H, W, 3] in [-1, 1] -> mean, log variance of the posterior, f32[B, h, w, latent_channels]."""
    moments = self.quant(self.encoder(pixels_BHWC)).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_variance, *_LOG_VARIANCE)

  def decode(self, latents_BHWC: jax.Array) -> jax.Array:
    """f32[B, h, w, latent_channels], not scaled -> f32[B, H, W, 3], about [-1, 1], not clipped."""
    return self.decoder(self.post_quant(latents_BHWC)).astype(jnp.float32)


class PatchPCA(nn.Module):
  """Linear codec with the interface of AutoencoderKL: principal components of pixel windows.

  A latent sees a window of `window` pixels around its patch; the decoder predicts a patch from the 3 x 3
  latents around it, which is worth 1 dB over the patch's own latent (8 channels of 4 x 4 pixels).
  Deterministic: the log variance is that of a point. Fit with `fit_patch_pca`.
  """

  config: AutoencoderConfig
  dtype: Any

  def setup(self) -> None:
    c = self.config
    self.encoder = Conv(c.latent_channels, c.window, self.dtype, stride=c.patch_size, padding=(0, 0))
    self.decoder = Conv(3 * c.patch_size**2, _REACH, self.dtype, padding=(0, 0))

  def __call__(self, pixels_BHWC: jax.Array) -> jax.Array:
    """Reconstructs."""
    return self.decode(self.encode(pixels_BHWC)[0])

  def encode(self, pixels_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """f32[B, H, W, 3] in [-1, 1] -> latents f32[B, h, w, latent_channels] and their log variance, -30."""
    latents = self.encoder(_pad(pixels_BHWC, *_margins(self.config), jnp)).astype(jnp.float32)
    return latents, jnp.full_like(latents, _LOG_VARIANCE[0])

  def decode(self, latents_BHWC: jax.Array) -> jax.Array:
    """f32[B, h, w, latent_channels], not scaled -> f32[B, H, W, 3], about [-1, 1], not clipped."""
    y_BHWC = self.decoder(_pad(latents_BHWC, _REACH // 2, _REACH // 2, jnp))
    return unpatchify(y_BHWC, self.config.patch_size).astype(jnp.float32)


def make_autoencoder(config: AutoencoderConfig, dtype: Any) -> AutoencoderKL | PatchPCA:
  """Returns the autoencoder of `config.kind`."""
  kinds: dict[str, Callable[..., AutoencoderKL | PatchPCA]] = {
    "autoencoder_kl": AutoencoderKL,
    "patch_pca": PatchPCA,
  }
  return kinds[config.kind](config, dtype)


def _margins(config: AutoencoderConfig) -> tuple[int, int]:
  """Pixels that a window reaches beyond its patch, before and after."""
  extra = config.window - config.patch_size
  return extra // 2, extra - extra // 2


def _pad(x_BHWC: Any, before: int, after: int, xp: Any) -> Any:
  """Repeats the edge."""
  return xp.pad(x_BHWC, ((0, 0), (before, after), (before, after), (0, 0)), mode="edge")


def _windows(x_BHWC: np.ndarray, size: int, stride: int) -> np.ndarray:
  """All windows as rows: [B * h * w, size * size * C], inside: row, column, channel."""
  view = np.lib.stride_tricks.sliding_window_view(x_BHWC, (size, size), axis=(1, 2))[:, ::stride, ::stride]
  return view.transpose(0, 1, 2, 4, 5, 3).reshape(-1, size * size * x_BHWC.shape[-1])


def fit_patch_pca(images: np.ndarray, config: AutoencoderConfig) -> dict[str, dict[str, np.ndarray]]:
  """Fits `PatchPCA` in closed form: principal components of the windows, least squares back to the patches.

  Channel k with standard deviation s_k is divided by sqrt(s_k): halfway between plain PCA, where the flow
  would see little but brightness, and whitened channels, where noise in the finest detail would weigh as
  much as the colour of an object. Then all channels get the one factor that makes the variance of
  `config.scaling` times the latents, averaged over channels, equal to 1. Latents have mean 0.

  Args:
    images: uint8[N, H, W, 3]; N windows in all should be well above window * window * 3.
    config: kind "patch_pca".

  Returns:
    The parameters of `PatchPCA`, f32. The same images give the same bits: signs are fixed.

  Raises:
    UserError: a window smaller than the patch or wider than the decoder's reach.
  """
  p, k = config.patch_size, config.latent_channels
  if not p <= config.window <= _REACH * p:
    raise UserError(f"model.autoencoder.window={config.window} must lie between patch_size={p} and {_REACH} times that")
  pixels = images.astype(np.float32) / 127.5 - 1.0
  x = _windows(_pad(pixels, *_margins(config), np), config.window, p).astype(np.float64)
  mean = x.mean(axis=0)
  values, vectors = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
  values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
  vectors = vectors * np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(k)] < 0, -1.0, 1.0)
  deviation = np.sqrt(np.maximum(values, 1e-8))
  kernel = vectors / np.sqrt(deviation) / (config.scaling * np.sqrt(np.mean(deviation)))

  n, h, w, _ = images.shape
  latents = ((x - mean) @ kernel).reshape(n, h // p, w // p, k)
  design = _windows(_pad(latents, _REACH // 2, _REACH // 2, np), _REACH, 1)
  target = _windows(pixels, p, p).reshape(-1, p, p, 3).transpose(0, 3, 1, 2).reshape(-1, 3 * p * p).astype(np.float64)
  centre, target_mean = design.mean(axis=0), target.mean(axis=0)
  design = design - centre
  gram = design.T @ design + 1e-6 * len(design) * np.mean(latents**2) * np.eye(design.shape[1])
  back = np.linalg.solve(gram, design.T @ (target - target_mean))
  f32 = lambda a: np.asarray(a, np.float32)
  return {
    "encoder": {
      "kernel": f32(kernel.reshape(config.window, config.window, 3, k)),
      "bias": f32(-mean @ kernel),
    },
    "decoder": {
      "kernel": f32(back.reshape(_REACH, _REACH, k, 3 * p * p)),
      "bias": f32(target_mean - centre @ back),
    },
  }
