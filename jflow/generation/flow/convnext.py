"""The ConvNeXt encoder and decoder around the LLM (paper section 3.2), as the release computes them.

Legend: B images, H x W latents or patches, P patches, C channels, D embed (the LLM's).
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.generation.flow.config import FlowConfig
from jflow.models.initial import Normal
from jflow.models.layers import Linear, RMSNorm, gelu, parameter
from jflow.models.siglip import patchify
from jflow.sharding import constrain, whole

_KERNEL = 7  # side of the depthwise kernel
_EXPANSION = 4  # width of a block's mlp over its channels
_TIME_SCALE = 1000.0  # the release feeds 1000 t to the sinusoids
_PERIOD = 10000.0


def time_features(time_B: jax.Array, width: int) -> jax.Array:
  """Sinusoids of 1000 t, cosines first: f32[B] in [0, 1] -> f32[B, width]. `width` is even."""
  half = width // 2
  frequency = jnp.exp(-math.log(_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
  angle = (_TIME_SCALE * time_B.astype(jnp.float32))[:, None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def unpatchify(x_BHWC: jax.Array, patch_size: int) -> jax.Array:
  """[B, H, W, C * s * s] -> [B, H * s, W * s, C]; inside: channel, row, column (PyTorch's PixelShuffle)."""
  b, h, w, c = x_BHWC.shape
  s = patch_size
  x = x_BHWC.reshape(b, h, w, c // (s * s), s, s).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(b, h * s, w * s, c // (s * s))


def convolution(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
  """`depthwise` as XLA's own convolution."""
  return jax.lax.conv_general_dilated(
    x_BHWC,
    kernel[:, :, None],
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=kernel.shape[-1],
  )


def shifted_sum(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
  """The depthwise convolution as a sum of k * k shifted images."""
  k, (h, w) = kernel.shape[0], x_BHWC.shape[1:3]
  padded = jnp.pad(x_BHWC.astype(jnp.float32), ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))
  terms = (padded[:, i : i + h, j : j + w] * kernel[i, j] for i in range(k) for j in range(k))
  return sum(terms, jnp.zeros((), jnp.float32)).astype(x_BHWC.dtype)


def _kernel_gradient(x_BHWC: jax.Array, kernel: jax.Array, dy_BHWC: jax.Array) -> jax.Array:
  """Gradient of the kernel, one tap at a time: its shifted input times `dy`, summed over images and positions."""
  k = kernel.shape[0]
  padded = jnp.pad(x_BHWC, ((0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)))

  def tap(index: jax.Array) -> jax.Array:
    shifted = jax.lax.dynamic_slice(padded, (0, index // k, index % k, 0), x_BHWC.shape)
    return jnp.einsum("BHWC,BHWC->C", shifted, dy_BHWC, preferred_element_type=jnp.float32)

  return jax.lax.map(tap, jnp.arange(k * k)).reshape(kernel.shape).astype(kernel.dtype)


@jax.custom_vjp
def depthwise(x_BHWC: jax.Array, kernel: jax.Array) -> jax.Array:
  """Depthwise convolution: each channel with its own kernel [k, k, C], k odd, zero padding, same size.

  One implementation per platform: on a CPU a sum of shifted images is much faster than XLA's convolution, and for TPU
  the kernel's gradient compiles much faster as a sum by taps.
  """
  return jax.lax.platform_dependent(x_BHWC, kernel, cpu=shifted_sum, default=convolution)


def _depthwise_forward(x_BHWC, kernel):
  return depthwise(x_BHWC, kernel), (x_BHWC, kernel)


def _depthwise_backward(residuals, dy_BHWC):
  convolved = lambda x, k, dy: jax.vjp(convolution, x, k)[1](dy)
  return jax.lax.platform_dependent(
    *residuals,
    dy_BHWC,
    cpu=lambda x, k, dy: (shifted_sum(dy, k[::-1, ::-1]), _kernel_gradient(x, k, dy)),
    tpu=lambda x, k, dy: (convolved(x, k, dy)[0], _kernel_gradient(x, k, dy)),
    default=convolved,
  )


depthwise.defvjp(_depthwise_forward, _depthwise_backward)


class GlobalResponseNorm(nn.Module):
  """(scale n + 1) x + bias, n the L2 norm of a channel over its image over the mean of the channels' norms.

  One image per batch entry: the norm reduces over H and W. Scale and bias start at zero: the identity.
  """

  epsilon: float
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    scale = parameter(self, "scale", nn.initializers.zeros, (x_BHWC.shape[-1],), (None,))
    bias = parameter(self, "bias", nn.initializers.zeros, (x_BHWC.shape[-1],), (None,))
    x = x_BHWC.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)
    # The root of a sum of squares has no gradient where a channel is exactly zero.
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    norm = norm / (jnp.mean(norm, axis=-1, keepdims=True) + self.epsilon)
    return ((scale * norm + 1.0) * x + bias).astype(self.dtype)


class ConvNeXtBlock(nn.Module):
  """Depthwise 7x7, RMSNorm, mlp with global response norm, residual; then scale and shift from the time.

  Differs from the paper, which cites ConvNeXt, and follows the release: RMSNorm in place of LayerNorm, and the
  modulation after the residual sum.
  """

  config: FlowConfig
  dtype: Any

  @nn.compact
  def __call__(self, x_BHWC: jax.Array, time_BD: jax.Array) -> jax.Array:
    channels, epsilon = x_BHWC.shape[-1], self.config.norm_epsilon
    linear = lambda features, axes, name, init=Normal(): Linear(
      features, axes, self.dtype, use_bias=True, kernel_init=init, name=name
    )
    kernel = parameter(
      self,
      "depthwise_kernel",
      Normal(1 / _KERNEL),
      (_KERNEL, _KERNEL, channels),
      (None, None, "channels"),
    )
    bias = parameter(self, "depthwise_bias", nn.initializers.zeros, (channels,), ("channels",))
    y_BHWC = depthwise(x_BHWC, whole(kernel.astype(self.dtype), None, None, "channels"))
    y_BHWC = y_BHWC + whole(bias.astype(self.dtype), "channels")
    y_BHWC = RMSNorm(epsilon, self.dtype, name="norm")(y_BHWC)
    y_BHWC = linear(_EXPANSION * channels, ("channels", "mlp"), "expand")(y_BHWC)
    y_BHWC = gelu(y_BHWC, "erf")
    y_BHWC = GlobalResponseNorm(epsilon, self.dtype, name="response_norm")(y_BHWC)
    x_BHWC = x_BHWC + linear(channels, ("mlp", "channels"), "contract")(y_BHWC)
    modulation = linear(2 * channels, ("embed", "channels"), "modulation", Normal(0.02))
    scale_BC, shift_BC = jnp.split(modulation(jax.nn.silu(time_BD.astype(self.dtype))), 2, axis=-1)
    x_BHWC = x_BHWC * (1.0 + scale_BC[:, None, None]) + shift_BC[:, None, None]
    return constrain(x_BHWC, "batch", None, None, None)


class TimeEmbed(nn.Module):
  """Sinusoids, linear, SiLU, linear: f32[B] in [0, 1] -> [B, D]."""

  config: FlowConfig
  model_width: int
  dtype: Any

  @nn.compact
  def __call__(self, time_B: jax.Array) -> jax.Array:
    linear = lambda axes, name: Linear(self.model_width, axes, self.dtype, use_bias=True, name=name)
    h_BD = linear(("channels", "embed"), "expand")(time_features(time_B, self.config.channels))
    return linear((None, "embed"), "output")(jax.nn.silu(h_BD))


class GenerationEncoder(nn.Module):
  """g_enc: noised latents and time to features for the LLM; it runs at every step of a sampler.

  Attributes:
    model_width: D, the LLM's embed dim.
  """

  config: FlowConfig
  model_width: int
  latent_channels: int
  dtype: Any

  @nn.compact
  def __call__(self, latents_BHWC: jax.Array, time_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encodes z_t.

    Args:
      latents_BHWC: f32[B, H, W, latent_channels], scaled latents; H and W are multiples of the patch size.
      time_B: f32[B] in [0, 1], 0 is noise. One time per image.

    Returns:
      features [B, P, C], P in raster order; skip [B, H / patch, W / patch, C], the same numbers as a map,
      for the decoder; time embedding [B, D]: one token of the LLM and the condition of every block.

    Raises:
      ValueError: latents of another channel count.
    """
    c = self.config
    b, h, w, channels = latents_BHWC.shape
    if channels != self.latent_channels:
      raise ValueError(f"latents have {channels} channels, the model takes {self.latent_channels}")
    time_BD = TimeEmbed(c, self.model_width, self.dtype, name="time_embed")(time_B)
    patches = Linear(c.channels, (None, "channels"), self.dtype, use_bias=True, name="patch_embed")
    x_BPC = patches(patchify(latents_BHWC, c.patch_size))
    x_BHWC = x_BPC.reshape(b, h // c.patch_size, w // c.patch_size, c.channels)
    for i in range(c.encoder_blocks):
      x_BHWC = ConvNeXtBlock(c, self.dtype, name=f"blocks_{i}")(x_BHWC, time_BD)
    return x_BHWC.reshape(b, -1, c.channels), x_BHWC, time_BD


class GenerationDecoder(nn.Module):
  """g_dec: the LLM's output at the latent positions, and the encoder's skip, to the velocity."""

  config: FlowConfig
  model_width: int
  latent_channels: int
  dtype: Any

  @nn.compact
  def __call__(self, x_BPC: jax.Array, skip_BHWC: jax.Array, time_BD: jax.Array) -> jax.Array:
    """Decodes the velocity.

    Args:
      x_BPC: [B, P, C], the projected hidden states of the LLM.
      skip_BHWC: [B, H, W, C] with H W = P, from the encoder.
      time_BD: [B, D], from the encoder.

    Returns:
      f32[B, H * patch, W * patch, latent_channels], velocity of the scaled latents.
    """
    c = self.config
    if time_BD.shape[-1] != self.model_width:
      raise ValueError(f"the time embedding has width {time_BD.shape[-1]}, the model {self.model_width}")
    x_BHWC = RMSNorm(c.norm_epsilon, self.dtype, name="input_norm")(x_BPC).reshape(skip_BHWC.shape)
    x_BHWC = jnp.concatenate([x_BHWC, skip_BHWC.astype(self.dtype)], axis=-1)
    for i in range(c.decoder_blocks):
      x_BHWC = ConvNeXtBlock(c, self.dtype, name=f"blocks_{i}")(x_BHWC, time_BD)
    x_BHWC = RMSNorm(c.norm_epsilon, self.dtype, name="output_norm")(x_BHWC)
    output = Linear(
      self.latent_channels * c.patch_size**2,
      ("channels", None),
      self.dtype,
      use_bias=True,
      kernel_init=Normal(0.02),
      name="output",
    )
    return unpatchify(output(x_BHWC), c.patch_size).astype(jnp.float32)
