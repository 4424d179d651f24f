"""The Linen module of codes: codes in through a table and an MLP, logits of codes out (Janus, arXiv 2410.13848).

Legend: I images, P codes of an image, D embed, E numbers of a code, V rows of the codebook, H W pixels, h w codes of an
image in its place.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.batch import Batch
from jflow.models.config import ModelConfig
from jflow.models.initial import Normal
from jflow.models.layers import Linear, Projector, gelu, parameter
from jflow.objectives import codes as objective


class Context(NamedTuple):
  """The intermediate values of `CodesWriter.write` that its loss needs."""

  codes: jax.Array  # int32[I, P]


def derived(config: ModelConfig, params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """The table of a fresh model: the codebook as the decoder reads it, for VQ-16 its rows at length 1.

  Not in the paper: what the table starts from.
  """
  return {"generation_embed/embed": config.autoencoder.rows(params["vq/codebook"])}


class Embedding(nn.Module):
  """A table of rows, one for each code."""

  rows: int
  features: int

  @nn.compact
  def __call__(self, codes: jax.Array) -> jax.Array:
    """int32[...] -> f32[..., E]."""
    return parameter(self, "embed", Normal(1.0), (self.rows, self.features), (None, None))[codes]


class Head(nn.Module):
  """gen_head: a hidden layer with the exact GELU, then the logits of codes."""

  hidden_dim: int
  codes: int
  dtype: Any

  @nn.compact
  def __call__(self, hidden: jax.Array, combine: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """[..., D] -> f32[..., V]; `combine`: a combination of rows, its weights' sum 1, taken before the last product."""
    x = Linear(self.hidden_dim, ("embed", "mlp"), self.dtype, use_bias=True, name="hidden")(hidden)
    x = gelu(x, "erf") if combine is None else combine(gelu(x, "erf"))
    logits = Linear(self.codes, ("mlp", None), self.dtype, use_bias=True, name="output", result=jnp.float32)
    return logits(x)  # guidance would multiply a rounding


class CodesWriter(nn.Module):
  """The writer of codes; see `generation.base.Writer`.

  Attributes:
    config: the whole model's.
    dtype: compute dtype.
  """

  config: ModelConfig
  dtype: Any

  losses_made = ("codes",)
  patches_from = 0  # the slot of a code is that of its patch
  every_token = ("generation_projector", "generation_head")  # what each code runs, see `unified.for_inference`

  def setup(self) -> None:
    c, dtype = self.config, self.dtype
    gen, codec = c.generation, c.autoencoder
    self.generation_embed = Embedding(codec.codebook_size, codec.code_dim)
    self.generation_projector = Projector(c.language_model.embed_dim, gen.projector_layers, dtype)
    self.generation_head = Head(gen.hidden_dim, codec.codebook_size, dtype)
    self.vq = codec.make(dtype)

  # --- parts -------------------------------------------------------------------------------------------

  def slots(self, codes: jax.Array) -> jax.Array:
    """Embeddings of the slots of codes: int32[...] -> [..., D]."""
    return self.generation_projector(self.generation_embed(codes))

  def logits(self, hidden: jax.Array, combine: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
    """The LLM's output one slot before a code -> its logits, [..., D] -> f32[..., V]; `combine`: see `Head`."""
    return self.generation_head(hidden, combine)

  def encode(self, pixels_IHWC: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> codes int32[I, P], row by row from the top left."""
    return self.vq.encode(pixels_IHWC).reshape(-1, self.config.patches)

  def decode(self, codes_IP: jax.Array) -> jax.Array:
    """Codes -> pixels f32[I, H, W, 3], about [-1, 1], not clipped."""
    side = self.config.latent_size
    return self.vq.decode(codes_IP.reshape(-1, side, side)).astype(jnp.float32)

  # --- training ----------------------------------------------------------------------------------------

  def draw(self, key: jax.Array, batch: Batch, objective: Any) -> None:
    """Nothing is drawn."""

  def example_draws(self, batch: Batch) -> None:
    """Nothing is drawn."""

  def write(self, pixels_IHWC: jax.Array, stored: jax.Array, draws: None) -> tuple[jax.Array, Context]:
    """Embeds the codes of images, which get no gradient; see `Writer.write`."""
    made_ahead = stored.shape[1:] != (0,)
    codes = stored.astype(jnp.int32) if made_ahead else jax.lax.stop_gradient(self.encode(pixels_IHWC))
    return self.slots(codes), Context(codes)

  def losses(
    self, hidden_at: Callable[[int, int], jax.Array], context: Context, written: jax.Array
  ) -> dict[str, jax.Array]:
    """The loss of the codes, each read one slot before its own; see `Writer.losses`."""
    hidden = hidden_at(-1, self.config.patches)
    if self.is_initializing():
      self.logits(hidden[:, :1])
    head, variables = self.generation_head.unbind()  # a bound module must not be used inside a loop
    logits: Any = functools.partial(head.apply, variables)
    return {"codes": objective.loss(logits, hidden, context.codes, written)}

  def initialise(self) -> None:
    """Creates the tokenizer's decoder."""
    self.decode(jnp.zeros((1, self.config.patches), jnp.int32))
