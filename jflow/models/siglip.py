"""The understanding encoder: a SigLIP vision tower, scanned over layers, and its attention pooling head.

Legend: B images, P patches, S queries, D embed, N heads, H head dim, F mlp.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.models.attention import unmasked_attention
from jflow.models.config import SiglipConfig
from jflow.models.initial import Normal
from jflow.models.layers import LayerNorm, Linear, gelu, parameter
from jflow.sharding import constrain, whole


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
  """[B, height, width, C] -> [B, P, patch_size * patch_size * C]; raster order; inside: row, column, channel."""
  s = patch_size
  x = x[:, : x.shape[1] // s * s, : x.shape[2] // s * s]  # whole patches
  b, h, w, c = x.shape
  x = x.reshape(b, h // s, s, w // s, s, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, (h // s) * (w // s), s * s * c)


class Attend(nn.Module):
  """Multi-head attention with biases and without a mask."""

  config: SiglipConfig
  dtype: Any
  kernel: str

  @nn.compact
  def __call__(self, q_BSD: jax.Array, kv_BPD: jax.Array) -> jax.Array:
    c = self.config
    linear = lambda axes, name: Linear(c.embed_dim, axes, self.dtype, use_bias=True, name=name)
    heads = lambda y: y.reshape(*y.shape[:2], c.num_heads, c.embed_dim // c.num_heads)
    q_BSNH = heads(linear(("embed", "heads"), "query")(q_BSD))
    k_BPNH = heads(linear(("embed", "heads"), "key")(kv_BPD))
    v_BPNH = heads(linear(("embed", "heads"), "value")(kv_BPD))
    out = unmasked_attention(q_BSNH, k_BPNH, v_BPNH, self.kernel)
    return linear(("heads", "embed"), "output")(out.reshape(q_BSD.shape))


class Mlp(nn.Module):
  """Two-layer MLP: contract(gelu(expand(x)))."""

  config: SiglipConfig
  dtype: Any

  @nn.compact
  def __call__(self, x_BPD: jax.Array) -> jax.Array:
    c = self.config
    h_BPF = Linear(c.mlp_dim, ("embed", "mlp"), self.dtype, use_bias=True, name="expand")(x_BPD)
    return Linear(c.embed_dim, ("mlp", "embed"), self.dtype, use_bias=True, name="contract")(gelu(h_BPF, c.gelu))


class Block(nn.Module):
  """Pre-norm attention and mlp, each with a residual; the second argument and result serve nn.scan."""

  config: SiglipConfig
  dtype: Any
  kernel: str

  @nn.compact
  def __call__(self, x_BPD: jax.Array, _: None) -> tuple[jax.Array, None]:
    norm = lambda name: LayerNorm(self.config.layer_norm_epsilon, self.dtype, name=name)
    y_BPD = norm("attention_norm")(x_BPD)
    x_BPD = constrain(
      x_BPD + Attend(self.config, self.dtype, self.kernel, name="attention")(y_BPD, y_BPD), "batch", None, None
    )
    y_BPD = norm("mlp_norm")(x_BPD)
    return constrain(x_BPD + Mlp(self.config, self.dtype, name="mlp")(y_BPD), "batch", None, None), None


class Pool(nn.Module):
  """Attention pooling: one learned query reads all patches, then a residual mlp."""

  config: SiglipConfig
  dtype: Any

  @nn.compact
  def __call__(self, features_BPD: jax.Array) -> jax.Array:
    c = self.config
    latent_D = parameter(self, "latent", Normal(c.embed_dim**-0.5), (c.embed_dim,), (None,))
    q_BSD = jnp.broadcast_to(latent_D.astype(self.dtype), (features_BPD.shape[0], 1, c.embed_dim))
    x_BSD = Attend(c, self.dtype, "xla", name="attention")(q_BSD, features_BPD.astype(self.dtype))
    y_BSD = LayerNorm(c.layer_norm_epsilon, self.dtype, name="norm")(x_BSD)
    return (x_BSD + Mlp(c, self.dtype, name="mlp")(y_BSD))[:, 0]


class Siglip(nn.Module):
  """SigLIP vision tower. The pooling head always has parameters: the release carries them unused.

  Attributes:
    remat: whether only the input of each block is kept for the backward pass.
    kernel: as `attention.unmasked` returns it.
  """

  config: SiglipConfig
  dtype: Any
  remat: bool
  kernel: str = "xla"

  def setup(self) -> None:
    c = self.config
    self.patch_embed = Linear(c.embed_dim, (None, "embed"), self.dtype, use_bias=True)
    self.position = parameter(
      self, "position_embed", Normal(c.embed_dim**-0.5), (c.patches, c.embed_dim), (None, "embed")
    )
    block = nn.remat(Block, prevent_cse=False) if self.remat else Block
    self.layers = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=c.num_layers,
      metadata_params={},
    )(c, self.dtype, self.kernel)
    self.norm = LayerNorm(c.layer_norm_epsilon, self.dtype)
    self.head = Pool(c, self.dtype)

  def __call__(self, pixels: jax.Array) -> jax.Array:
    """Returns the features of all patches after the final norm, not pooled.

    Args:
      pixels: f32[B, height, width, 3] in [-1, 1].

    Returns:
      [B, P, D] in `dtype`, patches in raster order.
    """
    x_BPD = self.patch_embed(patchify(pixels, self.config.patch_size))
    position_PD = whole(self.position.astype(self.dtype), None, "embed")
    x_BPD = constrain(x_BPD + position_PD, "batch", None, None)
    x_BPD, _ = self.layers(x_BPD, None)
    features_BPD = self.norm(x_BPD)
    if self.is_initializing():
      self.head(features_BPD)
    return features_BPD

  def pool(self, features_BPD: jax.Array) -> jax.Array:
    """[B, P, D] -> [B, D], the attention pooling head over the features that `__call__` returns."""
    return self.head(features_BPD)
