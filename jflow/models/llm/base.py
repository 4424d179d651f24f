"""The protocol of a language model; an architecture is one file beside this one.

`ARCHITECTURES` holds the values of `model.language_model.kind`.

A Linen module with the attributes of `llama.LanguageModel` (config, hidden_layer, dtype, remat, unroll, attention) and
  embed(tokens) -> [..., D]
  __call__(x_BSD, positions_BS, segments_BS, past) -> Output
  logits(hidden) -> f32[..., V]
  next_token(hidden_BSD, targets_BS, mask_BS) -> f32[], the sum of eq. 6
With `unroll` 0 its blocks are separate (`layers_0`, ...), as decoding with a cache needs them; otherwise they are one
scanned stack, `layers`, with axis 0 the layer. Where the class has
  transposed(params) -> params of separate layers as decoding on a GPU reads them fastest
its modules take these too.
"""

import dataclasses
from typing import Any, NamedTuple

from jflow import registry


class Output(NamedTuple):
  """The result of an LLM over a row."""

  hidden: Any  # [B, S, D], after the final norm
  layer: Any  # [B, S, D], the residual stream after block `hidden_layer`; None where no block is asked for
  cache: Any  # Cache | None


@dataclasses.dataclass(frozen=True)
class Architecture:
  """The description of a language model.

  Attributes:
    config: the frozen dataclass of the section `model.language_model`. It has kind, vocab_size, embed_dim, mlp_dim,
      num_layers, num_heads, num_kv_heads, head_dim, rms_norm_epsilon and max_length, which caches, heads and writers
      read.
    module: the Linen module, or "package.module:Class".
    remat: checks a value of `compute.remat`, of which it raises UserError for those that the module does not know;
      or "package.module:function". None: the module knows "none" alone.
    matmul: the values of `compute.matmul` that the module takes as an attribute of that name; without "fp8" it needs
      none.
  """

  config: type
  module: Any
  remat: Any = None
  matmul: tuple[str, ...] = ("dtype",)


ARCHITECTURES = registry.Registry(
  "model.language_model.kind",
  "jflow.llm",
  {name: f"jflow.models.llm.config:{name.upper()}" for name in ("llama", "llama3", "qwen2", "qwen3")},
  needs=("config",),
)
