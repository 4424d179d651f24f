"""The unified model: one LLM, a reader of images and a writer of images.

Legend: B rows, S sequence, M images of a row, I images (places for images in training), K slots per image, P patches, C
channels, D embed, E SigLIP's width, V vocab, H W pixels.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow import registry
from jflow.batch import READ, WRITE, Batch
from jflow.generation.base import family
from jflow.models import attention, fp8, kernels, lora
from jflow.models.cache import Cache, Prefix
from jflow.models.compaction import Capacity, Chosen
from jflow.models.config import ModelConfig
from jflow.models.layers import transposed
from jflow.models.llm.base import ARCHITECTURES, Output
from jflow.models.readers import Reader
from jflow.models.siglip import Siglip
from jflow.objectives.base import OBJECTIVES, Forward
from jflow.sharding import constrain


def normalise(pixels_u8: jax.Array) -> jax.Array:
  """uint8 [0, 255] -> f32 [-1, 1], the range of reading and writing."""
  return pixels_u8.astype(jnp.float32) / 127.5 - 1.0


class UnifiedModel(nn.Module):
  """An LLM with a reader, a writer and objectives. It has only the `params` collection, and every method is pure.

  The reader, the writer and the objectives share this module's scope: their parameters are siblings of the LLM's.

  Attributes:
    config: sizes.
    dtype: compute dtype; parameters stay f32 where they are trained.
    remat: what the LLM's blocks keep for the backward pass, see `llama.remat_policy`; SigLIP's keep their inputs
      alone, or everything for "none".
    unroll: LLM layers per scan iteration; 0: separate layers, see `for_inference`.
    attention: implementation for packed rows, as `attention.choose` returns it; "fused", see `for_inference`.
    capacity: the most images that `losses` has room for; more give NaN. None: room for all that fit the rows.
    matmul: of the LLM's blocks in training: "dtype", or "fp8", see `fp8`.
  """

  config: ModelConfig
  dtype: Any
  remat: str
  unroll: int
  attention: str
  capacity: Capacity | None = None
  matmul: str = fp8.DTYPE

  def setup(self) -> None:
    c, dtype = self.config, self.dtype
    eight: Any = {} if self.matmul == fp8.DTYPE else {"matmul": self.matmul}  # which an architecture need not know
    self.language_model = _language_model(c)(
      c.language_model, c.hidden_layer, dtype, self.remat, self.unroll, self.attention, **eight
    )
    encoder = c.understanding_encoder
    kernel = attention.unmasked(self.attention, dtype, encoder.embed_dim // encoder.num_heads)
    self.understanding_encoder = Siglip(encoder, dtype, self.remat != "none", kernel)
    self.writer = make_writer(c, dtype)
    nn.share_scope(self, self.writer)
    self.reader = Reader(c, self.writer, dtype)
    nn.share_scope(self, self.reader)
    self.objectives = {name: _objective(name)(c, own, dtype) for name, own in c.objectives}
    for objective in self.objectives.values():
      nn.share_scope(self, objective)

  # --- parts -------------------------------------------------------------------------------------------

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Token embeddings: int32[...] -> [..., D]."""
    return self.language_model.embed(tokens)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states: [..., D] -> f32[..., V]."""
    return self.language_model.logits(hidden)

  def assemble(self, tokens_BS: jax.Array, slots_BZD: jax.Array, image_index_BS: jax.Array) -> jax.Array:
    """The LLM's input [B, S, D] of rows that only read images.

    Args:
      tokens_BS: int32.
      slots_BZD: the slots of all images of a row, Z = M K.
      image_index_BS: int32 into Z; -1 where a token stands.
    """
    seen_BS = image_index_BS >= 0
    if self.config.reader.start == "token":  # the token before the patches keeps its embedding
      seen_BS &= image_index_BS % (1 + self.config.patches) > 0
    images_BSD = jnp.take_along_axis(slots_BZD, jnp.maximum(image_index_BS, 0)[..., None], axis=1)
    return jnp.where(seen_BS[..., None], images_BSD, self.embed(tokens_BS))

  def backbone(
    self,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    past: Cache | Prefix | None = None,
  ) -> Output:
    """The LLM over embeddings; see `llama.LanguageModel.__call__`."""
    return self.language_model(x_BSD, positions_BS, segments_BS, past)

  def features(self, pixels_IHWC: jax.Array) -> jax.Array:
    """SigLIP's features (f_enc) of pixels in [-1, 1], [I, P, E]."""
    return self.understanding_encoder(pixels_IHWC)

  def read(self, pixels_IHWC: jax.Array) -> jax.Array:
    """Embeddings [I, K, D] of the slots of images to read, from pixels in [-1, 1]."""
    if self.config.reader.kind == "siglip":
      return self.reader.slots(self.features(pixels_IHWC))
    return self.reader.slots(self.reader.latent_features(self.writer.posterior(pixels_IHWC)[0]))

  # --- training ----------------------------------------------------------------------------------------

  def losses(self, batch: Any, draws: Any, wanted: tuple[str, ...]) -> dict[str, jax.Array]:
    """Loss sums of packed rows by name: eq. 6 ("text"), the writer's, and those of `config.objectives`.

    Args:
      batch: a `Batch`; also a microbatch or a shard, since only sums are returned.
      draws: randomness of the same rows, see `Writer.draw`.
      wanted: names of the losses to compute.

    Returns:
      name -> f32[].
    """
    kinds_BM, most = jnp.asarray(batch.image_kind), self.capacity or Capacity(None, None, None)
    reads, writes = kinds_BM == READ, kinds_BM == WRITE
    by_siglip = self.config.reader.kind == "siglip"
    compared = any(OBJECTIVES.get(name).features for name in set(wanted) & set(self.objectives))
    read = Chosen(reads, most.read)
    written = Chosen(writes, most.written) if by_siglip else Chosen(reads | writes, most.all)
    seen = Chosen(reads | writes, most.all) if by_siglip and compared else read if by_siglip else written
    features: Any = None
    if by_siglip or compared or self.is_initializing():
      features = self.features(normalise(seen.take(batch.images)))

    pixels = constrain(normalise(written.take(batch.images)), "batch", None, None, None)
    made, context = self.writer.write(pixels, written.take(batch.stored), jax.tree.map(written.take, draws))
    latents = lambda: self.reader.latent_features(read.of(written, context.mean))
    slots = self.reader.slots(read.of(seen, features) if by_siglip else latents())
    tokens, index, positions, segments = map(
      jnp.asarray, (batch.tokens, batch.image_index, batch.positions, batch.segment_ids)
    )
    k = max(slots.shape[1], made.shape[1])
    image, inside = index // k, index % k  # -1 stays -1
    at_kind = lambda mask: (image >= 0) & jnp.take_along_axis(mask, jnp.maximum(image, 0), axis=1)
    at_read, at_written = at_kind(reads), at_kind(writes)
    if self.config.reader.start == "token":  # the token before the patches keeps its embedding
      at_read &= inside > 0
    images_BSD = read.spread(slots, jnp.where(at_read, image, -1), inside)
    images_BSD += written.spread(made, jnp.where(at_written, image, -1), inside)
    x_BSD = jnp.where((at_read | at_written)[..., None], images_BSD, self.embed(tokens))
    out = self.backbone(x_BSD, positions, segments)

    sums = {}
    if "text" in wanted:
      sums["text"] = self.language_model.next_token(out.hidden, batch.targets, batch.loss_mask)
    at = lambda x_BSD, first, count: written.at(x_BSD, batch.image_start, first, count)
    counted = written.take(writes)
    if set(wanted) & set(self.writer.losses_made):
      losses = self.writer.losses(lambda first, count: at(out.hidden, first, count), context, counted)
      sums |= {name: value for name, value in losses.items() if name in wanted}
    patches = lambda x_BSD: at(x_BSD, self.writer.patches_from, self.config.written_patches)
    features = written.of(seen, features) if compared else None
    forward = Forward(batch, out.hidden, out.layer, features, counted, patches, written.take)
    sums |= {name: objective(forward) for name, objective in self.objectives.items() if name in wanted}
    if self.capacity:  # never a wrong number
      fits = read.fits & written.fits & seen.fits
      if most.segments is not None:
        fits &= jnp.max(segments) <= most.segments
      sums = {name: jnp.where(fits, value, jnp.nan) for name, value in sums.items()}
    return sums

  def initialise(self, batch: Any, draws: Any) -> None:
    """Uses every parameter once, so that `init` with this method creates them all."""
    self.losses(batch, draws, loss_names(self.config))
    self.writer.initialise()


def _cast_at_use(path: tuple[str, ...], config: ModelConfig) -> bool:
  """Whether a layer casts a parameter where it uses it: kernels and the embedding table, but for some of the codec."""
  codec, stored = config.autoencoder, family(config.generation).stored
  if codec and stored and path[0] == stored.part and re.fullmatch(codec.used_in_float32, "/".join(path[1:])):
    return False
  return path[-1].endswith("kernel") or path[-1] == "embed"


def cast_matrices(params: dict[str, Any], dtype: Any, config: ModelConfig) -> dict[str, Any]:
  """Casts the parameters that a layer casts where it uses them (kernels, the embedding table); leaves may be boxed."""
  flat = flatten_dict(params)
  cast = lambda leaf: jax.tree.map(lambda x: x.astype(dtype, copy=False), leaf)
  return unflatten_dict({path: cast(x) if _cast_at_use(path, config) else x for path, x in flat.items()})


def cast_for_inference(params: dict[str, Any], dtype: Any, config: ModelConfig, above: tuple[str, ...] = ()) -> None:
  """Casts nested parameters as `for_inference` does, in place and one by one, which keeps the peak of memory low."""
  for name, x in params.items():
    if isinstance(x, dict):
      cast_for_inference(x, dtype, config, (*above, name))
    elif _cast_at_use((*above, name), config):
      params[name] = x.astype(dtype, copy=False)


def _writer(config: ModelConfig) -> Any:
  """The Linen class of the writer that `generation.kind` names."""
  return registry.load(family(config.generation).writer)


def _language_model(config: ModelConfig) -> Any:
  """The Linen class of the LLM that `language_model.kind` names."""
  return registry.load(ARCHITECTURES.get(config.language_model.kind).module)


def _objective(name: str) -> Any:
  """The Linen class of an objective."""
  return registry.load(OBJECTIVES.get(name).module)


def make_writer(config: ModelConfig, dtype: Any) -> Any:
  """The writer of a model without parameters, for `Writer.draw`."""
  return _writer(config)(config, dtype)


def loss_names(config: ModelConfig) -> tuple[str, ...]:
  """The names of all losses of a model."""
  return ("text", *_writer(config).losses_made, *(name for name, _ in config.objectives))


def loss_counts(config: ModelConfig, batch: Batch) -> dict[str, jax.Array]:
  """The number of terms of each loss sum of a batch, at least 1: tokens that carry loss, images written.

  Counted over the global batch, before it is cut: sums of shards and microbatches, divided by them, add up to the loss.
  """
  tokens = jnp.maximum(jnp.sum(batch.loss_mask), 1).astype(jnp.float32)
  images = jnp.maximum(jnp.sum(batch.image_kind == WRITE), 1).astype(jnp.float32)
  own = {name: _objective(name).count(batch) for name, _ in config.objectives}
  return {"text": tokens} | dict.fromkeys(_writer(config).losses_made, images) | own


def separate_layers(params: Any, layers: int) -> dict[str, Any]:
  """Unstacks the scanned layers of an LLM's parameters for `unroll` 0; all other parameters are shared."""
  rest = {name: x for name, x in params.items() if name != "layers"}

  def layer(i: int) -> Any:
    return jax.tree.map(lambda x: x[i], params["layers"])

  return rest | {f"layers_{i}": layer(i) for i in range(layers)}


def for_inference(model: UnifiedModel, params: Any, gpu: bool | None = None) -> tuple[UnifiedModel, Any]:
  """The model with separate LLM layers, which decoding needs, and its parameters in the compute dtype.

  Only parameters that a layer casts where it uses them are cast (most kernels, the embedding table): the outputs are
  bit-identical to those of the f32 parameters.

  Args:
    model: as trained, or already a result of this function.
    params: its nested parameters, NumPy or JAX arrays.
    gpu: whether the LLM's matrices are stored as [out, in], those of one input merged (a CPU is slower with them for
      a few rows), and attention behind a prefix is what `kernels.AUTO_BEHIND_PREFIX` names; None: whether this is a
      GPU.
  """
  gpu = jax.default_backend() == "gpu" if gpu is None else gpu
  params = lora.merged(params)
  lm = params["language_model"]
  if model.unroll:
    lm = separate_layers(lm, model.config.language_model.num_layers)
  if gpu:
    own = getattr(_language_model(model.config), "transposed", None)
    lm = own(lm) if own else lm
    often = getattr(_writer(model.config), "every_token", ())
    params = {**params, **{name: transposed(params[name], ()) for name in often if name in params}}
  params = {**params, "language_model": lm}
  return inference_model(model, gpu).clone(remat="none"), cast_matrices(params, model.dtype, model.config)


def with_separate_layers(model: UnifiedModel, params: Any) -> tuple[UnifiedModel, Any]:
  """The model and its nested parameters with separate LLM layers, adapters beside their matrices; differentiable.

  As `for_inference` on a CPU, but for the adapters, which stay low-rank, for what the blocks keep, `remat`, and for the
  matrices, which stay in f32: a loop around the model would add up their gradients in the type that it finds them in.
  """
  lm = params["language_model"]
  if model.unroll:
    lm = separate_layers(lm, model.config.language_model.num_layers)
  return inference_model(model, False), {**params, "language_model": lm}


def inference_model(model: UnifiedModel, gpu: bool) -> UnifiedModel:
  """The model of `for_inference` without its parameters."""
  kernel = kernels.AUTO_BEHIND_PREFIX["gpu"] if gpu else "xla"
  fits = kernels.fuses_causal(model.dtype, model.config.language_model.head_dim)
  return model.clone(unroll=0, attention=kernel if fits else "xla", matmul=fp8.DTYPE)
