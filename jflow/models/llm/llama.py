"""The language model: a Llama decoder (RMSNorm, RoPE, SwiGLU, untied head), scanned over layers.

Its config says where another architecture differs from it: biases of q, k and v, norms of q and k, slower rotations.

Legend: B batch, S sequence, D embed, N heads, K kv heads, H head dim, V vocab, L layers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jflow.errors import UserError
from jflow.models import fp8, lora
from jflow.models.attention import packed_attention
from jflow.models.cache import Cache, Prefix
from jflow.models.initial import Normal
from jflow.models.layers import Linear, RMSNorm, parameter, side_by_side, transposed
from jflow.models.llm.base import Output
from jflow.models.llm.config import LanguageModelConfig
from jflow.objectives import next_token
from jflow.sharding import constrain, unbox

# Names of remat policies a config may choose; "none" keeps every activation.
REMAT = {
  "none": None,
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

# Activations of a block that remat="save:NAME,NAME" keeps for the backward pass; the others are recomputed.
SAVABLE = ("query", "key", "value", "attended", "gate", "up")


def remat_policy(name: str) -> Any:
  """The policy of `jax.checkpoint` for a key of REMAT or "save:NAME,..."; None keeps everything.

  Raises:
    UserError: an unknown policy or name.
  """
  if name in REMAT:
    return REMAT[name]
  kind, _, rest = name.partition(":")
  names = tuple(rest.split(","))
  if kind != "save" or not set(names) <= set(SAVABLE):
    raise UserError(
      f"config.compute.remat={name!r} must be one of {', '.join(REMAT)}, or save: and some of {','.join(SAVABLE)}"
    )
  return jax.checkpoint_policies.save_only_these_names(*names)


def rope_tables(
  positions_BS: jax.Array, head_dim: int, theta: float, scales: Any = None
) -> tuple[jax.Array, jax.Array]:
  """cos and sin, f32[B, S, 1, H/2], of position x theta^(-2i/H), times `scales` [H/2] where they are given."""
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  frequency = frequency if scales is None else frequency * scales
  angle = positions_BS[..., None, None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BSNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary embedding in the half-split layout (pairs are i and i + H/2), computed in f32."""
  cos, sin = tables
  a, b = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSNH.dtype)


class Attention(nn.Module):
  config: LanguageModelConfig
  dtype: Any
  kernel: str  # of packed rows, see `packed_attention`
  matmul: str = fp8.DTYPE

  merged = ("query", "key", "value")  # maps of one input, see `layers.side_by_side`

  @nn.compact
  def __call__(self, x_BSD, tables, segments_BS, past):
    """Returns (y_BSD, the past with these positions added); without a `past` a row attends to itself."""
    c = self.config
    linear = lambda features, axes, name, bias=False: Linear(
      features, axes, self.dtype, use_bias=bias, matmul=self.matmul, name=name
    )
    heads = lambda y, n: y.reshape(*y.shape[:2], n, c.head_dim)
    counts = dict(query=c.num_heads, key=c.num_kv_heads, value=c.num_kv_heads)
    axes = lambda name: ("embed", "heads" if name == "query" else "kv_heads")
    mapped = side_by_side(
      self,
      x_BSD,
      {name: count * c.head_dim for name, count in counts.items()},
      lambda features, name: linear(features, axes(name), name, c.qkv_bias),
    )
    q_BSNH, k_BSKH, v_BSKH = (heads(y, n) for y, n in zip(mapped, counts.values(), strict=True))
    if c.qk_norm:
      norm = lambda name: RMSNorm(c.rms_norm_epsilon, self.dtype, name=name)
      q_BSNH, k_BSKH = norm("query_norm")(q_BSNH), norm("key_norm")(k_BSKH)
    q_BSNH, k_BSKH = rotate(q_BSNH, tables), rotate(k_BSKH, tables)
    q_BSNH = constrain(q_BSNH, "batch", None, "heads", None)
    if past is None:
      q_BSNH, k_BSKH = checkpoint_name(q_BSNH, "query"), checkpoint_name(k_BSKH, "key")
      v_BSKH = checkpoint_name(v_BSKH, "value")
      out = packed_attention(q_BSNH, k_BSKH, v_BSKH, segments_BS, self.kernel)
      out, grown = checkpoint_name(out, "attended"), None
    else:
      out, grown = past(q_BSNH, k_BSKH, v_BSKH)
    out = out.reshape(*out.shape[:2], c.num_heads * c.head_dim)
    return linear(c.embed_dim, ("heads", "embed"), "output")(out), grown


class Mlp(nn.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  config: LanguageModelConfig
  dtype: Any
  matmul: str = fp8.DTYPE

  merged = ("gate", "up")  # maps of one input, see `layers.side_by_side`

  @nn.compact
  def __call__(self, x_BSD):
    c = self.config
    linear = lambda features, axes, name: Linear(
      features, axes, self.dtype, use_bias=False, matmul=self.matmul, name=name
    )
    gate, up = side_by_side(
      self, x_BSD, dict(gate=c.mlp_dim, up=c.mlp_dim), lambda features, name: linear(features, ("embed", "mlp"), name)
    )
    gate, up = checkpoint_name(gate, "gate"), checkpoint_name(up, "up")
    return linear(c.embed_dim, ("mlp", "embed"), "down")(jax.nn.silu(gate) * up)


class Block(nn.Module):
  """Pre-norm attention and MLP, each added to the residual stream; a subclass may define another `mlp`."""

  config: LanguageModelConfig
  hidden_layer: int
  dtype: Any
  kernel: str
  matmul: str = fp8.DTYPE

  mlp = Mlp

  @nn.compact
  def __call__(self, carry, tables, segments_BS, past=None):
    """Returns the carry (residual stream, kept hidden layer, blocks done) and the grown `past`."""
    x_BSD, tap_BSD, layer = carry
    norm = lambda name: RMSNorm(self.config.rms_norm_epsilon, self.dtype, name=name)
    eight: Any = {} if self.matmul == fp8.DTYPE else {"matmul": self.matmul}  # which another `mlp` need not know
    attended, grown = Attention(self.config, self.dtype, self.kernel, name="attention", **eight)(
      norm("attention_norm")(x_BSD), tables, segments_BS, past
    )
    x_BSD = constrain(x_BSD + attended, "batch", None, None)
    x_BSD = constrain(
      x_BSD + self.mlp(self.config, self.dtype, name="mlp", **eight)(norm("mlp_norm")(x_BSD)), "batch", None, None
    )
    layer = layer + 1
    if tap_BSD is not None:
      tap_BSD = jnp.where(layer == self.hidden_layer, x_BSD, tap_BSD)
    return (x_BSD, tap_BSD, layer), grown


class LanguageModel(nn.Module):
  """Decoder over embeddings; ids go in through `embed`, logits come out through `logits`.

  Attributes:
    hidden_layer: the block (counted from 1) whose output is returned as `layer`; 0: none.
    remat: a key of REMAT or "save:NAME,...", see `remat_policy`.
    unroll: layers per iteration of the scan; the parameters do not depend on it. 0: no scan, and each layer
      has parameters of its own (`layers_0`, ...) in place of stacked ones: see `separate_layers`. Decoding needs it:
      a scan copies each layer's weights out of the stack, which costs more than a decoding step itself.
    attention: implementation for packed rows, as `attention.choose` returns it.
    matmul: "dtype", or "fp8" for the seven products of each block, see `fp8`.
  """

  config: LanguageModelConfig
  hidden_layer: int
  dtype: Any
  remat: str
  unroll: int
  attention: str
  matmul: str = fp8.DTYPE

  block = Block

  @classmethod
  def transposed(cls, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of separate layers as decoding on a GPU reads them, see `layers.transposed`."""
    return transposed(params, [Attention.merged, getattr(cls.block.mlp, "merged", ())])

  def setup(self) -> None:
    c = self.config
    # The scale of what blocks and aligners add, which would otherwise drown the tokens of a fresh model.
    shape, axes = (c.vocab_size, c.embed_dim), ("vocab", "embed")
    self.table = parameter(self, "embed", Normal(1.0), shape, axes)
    self.norm = RMSNorm(c.rms_norm_epsilon, self.dtype)
    small = Normal(0.02)
    self.head = Linear(c.vocab_size, ("embed", "vocab"), self.dtype, use_bias=False, kernel_init=small)
    block: Any = self.block
    if self.remat != "none":
      block = nn.remat(block, policy=remat_policy(self.remat), prevent_cse=False)
    if not self.unroll:
      self.layers = [block(c, self.hidden_layer, self.dtype, self.attention, self.matmul) for _ in range(c.num_layers)]
      return
    stack = nn.scan(
      block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=c.num_layers,
      unroll=self.unroll,
      metadata_params={},
    )
    self.layers = stack(c, self.hidden_layer, self.dtype, self.attention, self.matmul)

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Token embeddings: int32[...] -> [..., D]."""
    # Rounded after the lookup, so that the gradients of a repeated token are summed in float32.
    if tokens.ndim != 2:
      return self.table[tokens].astype(self.dtype)
    # A device looks up its columns for all devices that share the table; exchanging results moves less than the table.
    x_BSD = self.table[constrain(tokens, "group", None)].astype(self.dtype)
    x_BSD = constrain(x_BSD, "group", None, "embed")
    return constrain(x_BSD, "batch", None, None)

  def __call__(
    self,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    past: Cache | Prefix | None = None,
  ) -> Output:
    """Runs the stack over embeddings.

    Args:
      x_BSD: input embeddings.
      positions_BS: int32, for RoPE only; the attention mask follows from slots and segments.
      segments_BS: int32; 0 is padding.
      past: None for packed rows; a Cache, which the S positions are written into and which is returned grown;
        or a Prefix, which they attend to and do not change. With a past, all that is not padding is one segment, and
        the layers are separate (`unroll` 0).

    Returns:
      Output with the grown cache, None without one.
    """
    c = self.config
    tables = rope_tables(positions_BS, c.head_dim, c.rope_theta, c.rope_scales())
    x_BSD = constrain(x_BSD.astype(self.dtype), "batch", None, None)
    tap = jnp.zeros_like(x_BSD) if self.hidden_layer else None
    carry, cache = (x_BSD, tap, jnp.zeros((), jnp.int32)), None
    if self.unroll:
      assert past is None, "a cache needs separate layers: unroll=0"
      stack: Any = self.layers
      carry, _ = stack(carry, tables, segments_BS)
    else:
      grown: list[Any] = []
      for i, block in enumerate(self.layers):
        carry, layer = block(carry, tables, segments_BS, past and past.layer(i, segments_BS, self.attention))
        grown.append(layer)
      if isinstance(past, Cache):
        cache = past.grown(grown, segments_BS)
    return Output(self.norm(carry[0]), carry[1], cache)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states: [..., D] -> f32[..., V]."""
    return self.head(hidden).astype(jnp.float32)

  def next_token(self, hidden_BSD: jax.Array, targets_BS: jax.Array, mask_BS: jax.Array) -> jax.Array:
    """The sum over masked positions of -log p(target) (eq. 6); see `next_token.loss`."""
    if self.is_initializing():
      self.logits(hidden_BSD[:, :1])
    kernel_DV = lora.merged(unbox(self.head.variables["params"]))["kernel"]
    return next_token.loss(hidden_BSD, kernel_DV, targets_BS, mask_BS)
