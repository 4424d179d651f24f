"""Two-way tables between PyTorch's tensor names and jflow's parameter paths: the parts that published layouts share.

The tables of whole models are their families' (generation/*/weights.py); transformers' names for Janus's are a map of
the official ones (interop/janus_transformers.py).

An `Entry` maps a part of a tensor to a part of a parameter. A stack of L layers is one parameter [L, ...] in jflow and
L tensors in PyTorch; a fused qkv is one tensor in PyTorch and three parameters in jflow.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jflow.models.autoencoders.kl import AutoencoderKLConfig
from jflow.models.config import SiglipConfig
from jflow.models.llm.config import LanguageModelConfig

# Kinds of conversion from a tensor to a parameter, each invertible given the tensor's shape.
SAME = "same"
VECTOR = "vector"  # [1, 1, n] -> [n]
TABLE = "table"  # [1, m, n] -> [m, n]
LINEAR = "linear"  # [out, in] -> [in, out]
CONV = "conv"  # [out, in, h, w] -> [h, w, in, out]
PATCH = "patch"  # [out, in, h, w] -> [h * w * in, out]
DEPTHWISE = "depthwise"  # [channels, 1, h, w] -> [h, w, channels]


class Entry(NamedTuple):
  """One part of a tensor and the part of a parameter that it becomes."""

  name: str  # of the tensor in PyTorch
  shape: tuple[int, ...]  # of the whole tensor
  path: str  # of the parameter, keys joined by "/"
  kind: str
  layer: int | None = None  # index into the parameter's axis 0
  part: tuple[int, int] = (0, 1)  # (k, n): the k-th of n equal pieces along the tensor's axis 0

  @property
  def part_shape(self) -> tuple[int, ...]:
    return (self.shape[0] // self.part[1], *self.shape[1:])

  def slice(self, tensor: np.ndarray) -> np.ndarray:
    """The entry's piece of the tensor, a view."""
    k, n = self.part
    rows = self.shape[0] // n
    return tensor[k * rows : (k + 1) * rows]


def to_jflow(kind: str, x: np.ndarray) -> np.ndarray:
  """A piece of a tensor in jflow's layout; a view where the layout allows one."""
  if kind == VECTOR:
    return x.reshape(-1)
  if kind == TABLE:
    return x.reshape(x.shape[-2:])
  if kind == LINEAR:
    return x.T
  if kind == CONV:
    return x.transpose(2, 3, 1, 0)
  if kind == PATCH:
    return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
  if kind == DEPTHWISE:
    return x[:, 0].transpose(1, 2, 0)
  return x


def to_pytorch(kind: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Undoes `to_jflow`; `shape` is that of the piece."""
  if kind == LINEAR:
    return x.T
  if kind == CONV:
    return x.transpose(3, 2, 0, 1)
  if kind == PATCH:
    return x.reshape(*shape[2:], shape[1], shape[0]).transpose(3, 2, 0, 1)
  if kind == DEPTHWISE:
    return x.transpose(2, 0, 1)[:, None]
  return x.reshape(shape)


def jflow_shape(kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of the result of `to_jflow`."""
  return {
    SAME: lambda: shape,
    VECTOR: lambda: shape[-1:],
    TABLE: lambda: shape[-2:],
    LINEAR: lambda: shape[::-1],
    CONV: lambda: (*shape[2:], shape[1], shape[0]),
    PATCH: lambda: (shape[1] * shape[2] * shape[3], shape[0]),
    DEPTHWISE: lambda: (*shape[2:], shape[0]),
  }[kind]()


def linear(name: str, path: str, out: int, into: int, bias: bool = True, **place: Any) -> Iterator[Entry]:
  yield Entry(f"{name}.weight", (out, into), f"{path}/kernel", LINEAR, **place)
  if bias:
    yield Entry(f"{name}.bias", (out,), f"{path}/bias", SAME, **place)


def norm(name: str, path: str, width: int, bias: bool = True, **place: Any) -> Iterator[Entry]:
  yield Entry(f"{name}.weight", (width,), f"{path}/scale", SAME, **place)
  if bias:
    yield Entry(f"{name}.bias", (width,), f"{path}/bias", SAME, **place)


def _fused(weight: str, bias: str, paths: list[str], width: int, **place: Any) -> Iterator[Entry]:
  for k, path in enumerate(paths):
    part = (k, len(paths))
    yield Entry(weight, (len(paths) * width, width), f"{path}/kernel", LINEAR, part=part, **place)
    yield Entry(bias, (len(paths) * width,), f"{path}/bias", SAME, part=part, **place)


def language_model(c: LanguageModelConfig, prefix: str, tied: bool) -> Iterator[Entry]:
  """The entries of transformers' causal model of the kind, names after `prefix`. `tied`: the head is the embedding."""
  ours = "language_model"
  embed = f"{prefix}model.embed_tokens.weight"
  yield Entry(embed, (c.vocab_size, c.embed_dim), f"{ours}/embed", SAME)
  queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
  for i in range(c.num_layers):
    theirs, layer = f"{prefix}model.layers.{i}", f"{ours}/layers"
    for name, path, out, into in (
      ("self_attn.q_proj", "attention/query", queries, c.embed_dim),
      ("self_attn.k_proj", "attention/key", keys, c.embed_dim),
      ("self_attn.v_proj", "attention/value", keys, c.embed_dim),
      ("self_attn.o_proj", "attention/output", c.embed_dim, queries),
      ("mlp.gate_proj", "mlp/gate", c.mlp_dim, c.embed_dim),
      ("mlp.up_proj", "mlp/up", c.mlp_dim, c.embed_dim),
      ("mlp.down_proj", "mlp/down", c.embed_dim, c.mlp_dim),
    ):
      bias = c.qkv_bias and path in ("attention/query", "attention/key", "attention/value")
      yield from linear(f"{theirs}.{name}", f"{layer}/{path}", out, into, bias=bias, layer=i)
    if c.qk_norm:
      for name, path in (("self_attn.q_norm", "query_norm"), ("self_attn.k_norm", "key_norm")):
        yield from norm(f"{theirs}.{name}", f"{layer}/attention/{path}", c.head_dim, bias=False, layer=i)
    yield from norm(f"{theirs}.input_layernorm", f"{layer}/attention_norm", c.embed_dim, bias=False, layer=i)
    yield from norm(f"{theirs}.post_attention_layernorm", f"{layer}/mlp_norm", c.embed_dim, bias=False, layer=i)
  yield from norm(f"{prefix}model.norm", f"{ours}/norm", c.embed_dim, bias=False)
  head = embed if tied else f"{prefix}lm_head.weight"
  yield Entry(head, (c.vocab_size, c.embed_dim), f"{ours}/head/kernel", LINEAR)


def siglip(c: SiglipConfig, tower: str = "vision_und_enc_model.vision_tower") -> Iterator[Entry]:
  """The entries of the vision tower of a published layout, whose names begin with `tower`."""
  ours, d = "understanding_encoder", c.embed_dim
  qkv = lambda path: [f"{path}/attention/{name}" for name in ("query", "key", "value")]
  yield Entry(f"{tower}.pos_embed", (1, c.patches, d), f"{ours}/position_embed", TABLE)
  patch = (d, 3, c.patch_size, c.patch_size)
  yield Entry(f"{tower}.patch_embed.proj.weight", patch, f"{ours}/patch_embed/kernel", PATCH)
  yield Entry(f"{tower}.patch_embed.proj.bias", (d,), f"{ours}/patch_embed/bias", SAME)
  for i in range(c.num_layers):
    block, layer = f"{tower}.blocks.{i}", f"{ours}/layers"
    yield from norm(f"{block}.norm1", f"{layer}/attention_norm", d, layer=i)
    yield from _fused(f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias", qkv(layer), d, layer=i)
    yield from linear(f"{block}.attn.proj", f"{layer}/attention/output", d, d, layer=i)
    yield from norm(f"{block}.norm2", f"{layer}/mlp_norm", d, layer=i)
    yield from linear(f"{block}.mlp.fc1", f"{layer}/mlp/expand", c.mlp_dim, d, layer=i)
    yield from linear(f"{block}.mlp.fc2", f"{layer}/mlp/contract", d, c.mlp_dim, layer=i)
  yield from norm(f"{tower}.norm", f"{ours}/norm", d)
  pool, head = f"{tower}.attn_pool", f"{ours}/head"
  yield Entry(f"{pool}.latent", (1, 1, d), f"{head}/latent", VECTOR)
  yield from linear(f"{pool}.q", f"{head}/attention/query", d, d)
  yield from _fused(f"{pool}.kv.weight", f"{pool}.kv.bias", qkv(head)[1:], d)
  yield from linear(f"{pool}.proj", f"{head}/attention/output", d, d)
  yield from norm(f"{pool}.norm", f"{head}/norm", d)
  yield from linear(f"{pool}.mlp.fc1", f"{head}/mlp/expand", c.mlp_dim, d)
  yield from linear(f"{pool}.mlp.fc2", f"{head}/mlp/contract", d, c.mlp_dim)


def siglip_transformers(c: SiglipConfig, prefix: str, head: bool) -> Iterator[Entry]:
  """The entries of transformers' SiglipVisionModel; `head`: the file has the pooling head."""
  ours, d = "understanding_encoder", c.embed_dim
  embeddings = f"{prefix}embeddings"
  patch = (d, 3, c.patch_size, c.patch_size)
  yield Entry(f"{embeddings}.patch_embedding.weight", patch, f"{ours}/patch_embed/kernel", PATCH)
  yield Entry(f"{embeddings}.patch_embedding.bias", (d,), f"{ours}/patch_embed/bias", SAME)
  yield Entry(f"{embeddings}.position_embedding.weight", (c.patches, d), f"{ours}/position_embed", SAME)
  for i in range(c.num_layers):
    block, layer = f"{prefix}encoder.layers.{i}", f"{ours}/layers"
    yield from norm(f"{block}.layer_norm1", f"{layer}/attention_norm", d, layer=i)
    for name, path in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "output")):
      yield from linear(f"{block}.self_attn.{name}", f"{layer}/attention/{path}", d, d, layer=i)
    yield from norm(f"{block}.layer_norm2", f"{layer}/mlp_norm", d, layer=i)
    yield from linear(f"{block}.mlp.fc1", f"{layer}/mlp/expand", c.mlp_dim, d, layer=i)
    yield from linear(f"{block}.mlp.fc2", f"{layer}/mlp/contract", d, c.mlp_dim, layer=i)
  yield from norm(f"{prefix}post_layernorm", f"{ours}/norm", d)
  if head:
    pool = f"{prefix}head"
    yield Entry(f"{pool}.probe", (1, 1, d), f"{ours}/head/latent", VECTOR)
    paths = [f"{ours}/head/attention/{name}" for name in ("query", "key", "value")]
    yield from _fused(f"{pool}.attention.in_proj_weight", f"{pool}.attention.in_proj_bias", paths, d)
    yield from linear(f"{pool}.attention.out_proj", f"{ours}/head/attention/output", d, d)
    yield from norm(f"{pool}.layernorm", f"{ours}/head/norm", d)
    yield from linear(f"{pool}.mlp.fc1", f"{ours}/head/mlp/expand", c.mlp_dim, d)
    yield from linear(f"{pool}.mlp.fc2", f"{ours}/head/mlp/contract", d, c.mlp_dim)


def conv(name: str, path: str, out: int, into: int, size: int) -> Iterator[Entry]:
  yield Entry(f"{name}.weight", (out, into, size, size), f"{path}/kernel", CONV)
  yield Entry(f"{name}.bias", (out,), f"{path}/bias", SAME)


def resnet(name: str, path: str, out: int, into: int, shortcut: str = "conv_shortcut") -> Iterator[Entry]:
  """A block of two convolutions; `shortcut`: the layout's name of the third, where the width changes."""
  yield from norm(f"{name}.norm1", f"{path}/norm_1", into)
  yield from conv(f"{name}.conv1", f"{path}/conv_1", out, into, 3)
  yield from norm(f"{name}.norm2", f"{path}/norm_2", out)
  yield from conv(f"{name}.conv2", f"{path}/conv_2", out, out, 3)
  if out != into:
    yield from conv(f"{name}.{shortcut}", f"{path}/shortcut", out, into, 1)


def _middle(name: str, path: str, width: int, old: bool) -> Iterator[Entry]:
  yield from resnet(f"{name}.resnets.0", f"{path}/resnet_1", width, width)
  attention, ours = f"{name}.attentions.0", f"{path}/attention"
  yield from norm(f"{attention}.group_norm", f"{ours}/norm", width)
  theirs = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
  for leaf, ours_leaf in zip(theirs, ("query", "key", "value", "output"), strict=True):
    yield from linear(f"{attention}.{leaf}", f"{ours}/{ours_leaf}", width, width)
  yield from resnet(f"{name}.resnets.1", f"{path}/resnet_2", width, width)


def autoencoder_kl(c: AutoencoderKLConfig, old: bool = False) -> list[Entry]:
  """The entries of diffusers' AutoencoderKL; `old`: attention named as before 2023 (query, key, value, proj_attn)."""
  channels, latents, entries = c.block_channels, c.latent_channels, []
  entries += conv("encoder.conv_in", "vae/encoder/conv_in", channels[0], 3, 3)
  into = channels[0]
  for i, out in enumerate(channels):
    for j in range(c.layers_per_block):
      path = f"vae/encoder/down_{i}_resnet_{j}"
      entries += resnet(f"encoder.down_blocks.{i}.resnets.{j}", path, out, into)
      into = out
    if i + 1 < len(channels):
      name = f"encoder.down_blocks.{i}.downsamplers.0.conv"
      entries += conv(name, f"vae/encoder/down_{i}_sample", out, out, 3)
  entries += _middle("encoder.mid_block", "vae/encoder/middle", channels[-1], old)
  entries += norm("encoder.conv_norm_out", "vae/encoder/norm_out", channels[-1])
  entries += conv("encoder.conv_out", "vae/encoder/conv_out", 2 * latents, channels[-1], 3)
  entries += conv("quant_conv", "vae/quant", 2 * latents, 2 * latents, 1)
  entries += conv("post_quant_conv", "vae/post_quant", latents, latents, 1)
  entries += conv("decoder.conv_in", "vae/decoder/conv_in", channels[-1], latents, 3)
  entries += _middle("decoder.mid_block", "vae/decoder/middle", channels[-1], old)
  into = channels[-1]
  for i, out in enumerate(reversed(channels)):
    for j in range(c.layers_per_block + 1):
      path = f"vae/decoder/up_{i}_resnet_{j}"
      entries += resnet(f"decoder.up_blocks.{i}.resnets.{j}", path, out, into)
      into = out
    if i + 1 < len(channels):
      entries += conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", f"vae/decoder/up_{i}_sample", out, out, 3)
  entries += norm("decoder.conv_norm_out", "vae/decoder/norm_out", channels[0])
  entries += conv("decoder.conv_out", "vae/decoder/conv_out", 3, channels[0], 3)
  return entries
