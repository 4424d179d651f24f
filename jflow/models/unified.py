"""JanusFlow: one LLM that reads images (SigLIP features) and writes images (rectified flow of VAE latents).

Legend: B rows, S sequence, M image slots of a row, I images (B * M where batched), K = 1 + P slots per image,
P patches, D embed, C channels, H W pixels, h w latents.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.batch import READ, WRITE, Batch
from jflow.generation.flow import equations as flow
from jflow.generation.flow.convnext import GenerationDecoder, GenerationEncoder
from jflow.models.cache import Cache, Prefix
from jflow.models.config import JanusFlowConfig
from jflow.models.layers import Linear, RMSNorm, parameter
from jflow.models.llm.llama import LanguageModel, Output, separate_layers
from jflow.models.siglip import Siglip
from jflow.objectives import losses
from jflow.sharding import constrain


def normalise(pixels_u8: jax.Array) -> jax.Array:
  """uint8 [0, 255] -> f32 [-1, 1]; both image paths use this range."""
  return pixels_u8.astype(jnp.float32) / 127.5 - 1.0


class Draws(NamedTuple):
  """The randomness of one batch, drawn before it is cut into microbatches or shards."""

  time: jax.Array  # f32[B, M] in (0, 1)
  noise: jax.Array  # f32[B, M, h, w, C], z_0 of eq. 3
  posterior: jax.Array  # f32[B, M, h, w, C], for the sample of the VAE's posterior


class Sums(NamedTuple):
  """Loss sums of a batch; divided by the counts of the global batch they are the losses."""

  text: jax.Array
  flow: jax.Array
  alignment: jax.Array


class AlignmentHead(nn.Module):
  """Three-layer MLP h_phi of REPA (eq. 8): LLM features -> SigLIP width. Training only."""

  hidden: int
  features: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = jax.nn.silu(Linear(self.hidden, ("embed", "mlp"), self.dtype, use_bias=True, name="linear_1")(x))
    x = jax.nn.silu(Linear(self.hidden, ("mlp", None), self.dtype, use_bias=True, name="linear_2")(x))
    return Linear(self.features, ("mlp", None), self.dtype, use_bias=True, name="linear_3")(x)


class JanusFlow(nn.Module):
  """The wiring. Only the `params` collection; every method is pure.

  Attributes:
    config: sizes.
    dtype: compute dtype; parameters stay f32 where they are trained.
    remat: what the LLM's blocks keep for the backward pass, see `llm.remat_policy`; SigLIP's keep their inputs
      alone, or everything for "none".
    unroll: LLM layers per scan iteration; 0: separate layers, see `for_inference`.
    attention: implementation for packed rows, as `attention.choose` returns it.
  """

  config: JanusFlowConfig
  dtype: Any
  remat: str
  unroll: int
  attention: str

  def setup(self) -> None:
    c, dtype = self.config, self.dtype
    lm, vision, gen = c.language_model, c.understanding_encoder, c.generation
    tap = c.alignment_layer if c.alignment_width else 0
    latents = c.autoencoder.latent_channels
    self.language_model = LanguageModel(lm, tap, dtype, self.remat, self.unroll, self.attention)
    self.understanding_encoder = Siglip(vision, dtype, remat=self.remat != "none")
    if c.reader == "siglip":
      self.understanding_projector = Linear(lm.width, (None, "embed"), dtype, use_bias=True)
    if c.reader == "separate":
      self.latent_encoder = GenerationEncoder(gen, lm.width, latents, dtype)
      self.latent_projector = Linear(lm.width, (None, "embed"), dtype, use_bias=True)
    self.understanding_start = parameter(self, "understanding_start", nn.initializers.zeros, (lm.width,), (None,))
    self.generation_encoder = GenerationEncoder(gen, lm.width, latents, dtype)
    self.generation_projector = Linear(lm.width, (None, "embed"), dtype, use_bias=True)
    self.generation_output_norm = RMSNorm(lm.rms_norm_epsilon, dtype)
    self.generation_output_projector = Linear(gen.width, ("embed", None), dtype, use_bias=True)
    self.generation_decoder = GenerationDecoder(gen, lm.width, latents, dtype)
    self.vae = c.autoencoder.make(dtype)
    if c.alignment_width:
      self.alignment_head = AlignmentHead(c.alignment_width, vision.width, dtype)

  # --- parts -------------------------------------------------------------------------------------------

  def embed(self, tokens: jax.Array) -> jax.Array:
    """int32[...] -> [..., D]."""
    return self.language_model.embed(tokens)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """[..., D] -> f32[..., V]."""
    return self.language_model.logits(hidden)

  def assemble(self, tokens_BS: jax.Array, slots_BZD: jax.Array, image_index_BS: jax.Array) -> jax.Array:
    """The LLM's input: token embeddings, and image slots where `image_index` is not -1. [B, S, D]."""
    images_BSD = jnp.take_along_axis(slots_BZD, jnp.maximum(image_index_BS, 0)[..., None], axis=1)
    return jnp.where(image_index_BS[..., None] >= 0, images_BSD, self.embed(tokens_BS))

  def backbone(
    self,
    x_BSD: jax.Array,
    positions_BS: jax.Array,
    segments_BS: jax.Array,
    past: Cache | Prefix | None = None,
  ) -> Output:
    """The LLM over embeddings; see `LanguageModel.__call__`."""
    return self.language_model(x_BSD, positions_BS, segments_BS, past)

  def features(self, pixels_IHWC: jax.Array) -> jax.Array:
    """f_enc: pixels in [-1, 1] -> [I, P, width of SigLIP]."""
    return self.understanding_encoder(pixels_IHWC)

  def latent_features(self, latents_IhwC: jax.Array) -> jax.Array:
    """Ablations: latents of images to read -> [I, P, width of g_enc], by ConvNeXt blocks at time 1, which is data."""
    encoder = self.generation_encoder if self.config.reader == "shared" else self.latent_encoder
    return encoder(latents_IhwC, jnp.ones(latents_IhwC.shape[0]))[0]

  def read(self, pixels_IHWC: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] of images to read -> their K slots [I, K, D], by whatever reads them."""
    if self.config.reader == "siglip":
      return self.read_slots(self.features(pixels_IHWC))
    return self.read_slots(self.latent_features(self.posterior(pixels_IHWC)[0]))

  def read_slots(self, features_IPE: jax.Array) -> jax.Array:
    """The K slots of images to read: the learned start vector, then the projected features. [I, K, D]."""
    projectors = {
      "siglip": "understanding_projector",
      "shared": "generation_projector",
      "separate": "latent_projector",
    }
    x_IPD = getattr(self, projectors[self.config.reader])(features_IPE)
    start = jnp.broadcast_to(self.understanding_start.astype(x_IPD.dtype), (x_IPD.shape[0], 1, x_IPD.shape[2]))
    return jnp.concatenate([start, x_IPD], axis=1)

  def write_slots(self, z_IhwC: jax.Array, time_I: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The K slots of images to write: the time token, then g_enc's patches.

    Returns:
      (slots [I, K, D], skip [I, h/2, w/2, C'] for g_dec, time embedding [I, D]).
    """
    x_IPC, skip, time_ID = self.generation_encoder(z_IhwC, time_I)
    return jnp.concatenate([time_ID[:, None], self.generation_projector(x_IPC)], axis=1), skip, time_ID

  def velocity(self, hidden_IPD: jax.Array, skip: jax.Array, time_ID: jax.Array) -> jax.Array:
    """g_dec: the LLM's hidden states at the patch slots (no shift) -> velocity f32[I, h, w, C]."""
    x_IPC = self.generation_output_projector(self.generation_output_norm(hidden_IPD))
    return self.generation_decoder(x_IPC, skip, time_ID).astype(jnp.float32)

  def posterior(self, pixels_IHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the scaled latents of pixels in [-1, 1]; f32[I, h, w, C] each."""
    return self.scaled(*self.vae.encode(pixels_IHWC))

  def scaled(self, mean: jax.Array, log_variance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moments of the posterior as the VAE gives them -> mean and standard deviation of the scaled latents, f32."""
    scale = self.config.autoencoder.scaling
    return scale * mean.astype(jnp.float32), scale * jnp.exp(0.5 * log_variance.astype(jnp.float32))

  def decode(self, latents_IhwC: jax.Array) -> jax.Array:
    """Scaled latents -> pixels f32[I, H, W, 3], about [-1, 1], not clipped."""
    return self.vae.decode(latents_IhwC / self.config.autoencoder.scaling).astype(jnp.float32)

  # --- training ----------------------------------------------------------------------------------------

  def losses(self, batch: Batch, draws: Draws, wanted: tuple[str, ...]) -> Sums:
    """The loss sums of packed rows: eq. 6 (text), 7 (flow) and 8 (alignment).

    Args:
      batch: rows; a microbatch or a shard is fine, since only sums are returned.
      draws: randomness of the same rows.
      wanted: names of `Sums` to compute; the others are 0 and cost nothing.
    """
    b, m = batch.image_kind.shape
    flat = lambda x: x.reshape(b * m, *x.shape[2:])
    rows = lambda x: x.reshape(b, m, *x.shape[1:])
    writes_BM = batch.image_kind == WRITE
    pixels = constrain(normalise(flat(batch.images)), "batch", None, None, None)

    features = self.features(pixels)
    if batch.moments.shape[2:] == (0,):
      mean, std = self.posterior(pixels)
    else:  # made ahead of time
      mean, std = self.scaled(*jnp.split(flat(batch.moments), 2, axis=-1))
    data = mean + std * flat(draws.posterior)
    z = flow.interpolate(flat(draws.noise), data, flat(draws.time))
    written, skip, time_ID = self.write_slots(z, flat(draws.time))
    seen = features if self.config.reader == "siglip" else self.latent_features(mean)
    slots = jnp.where(flat(batch.image_kind == READ)[:, None, None], self.read_slots(seen), written)
    slots = slots.reshape(b, m * slots.shape[1], -1)

    x_BSD = self.assemble(batch.tokens, slots, batch.image_index)
    out = self.backbone(x_BSD, batch.positions, batch.segment_ids)

    zero = jnp.zeros((), jnp.float32)
    sums = Sums(zero, zero, zero)
    if "text" in wanted:
      nll = self.language_model.next_token(out.hidden, batch.targets, batch.loss_mask)
      sums = sums._replace(text=nll)
    patches = batch.image_start[..., None] + 1 + jnp.arange(self.config.patches)  # [B, M, P]
    patches = patches.reshape(b, -1)[..., None]
    gather = lambda x: jnp.take_along_axis(x, patches, axis=1).reshape(b * m, self.config.patches, -1)
    if "flow" in wanted:
      velocity = rows(self.velocity(gather(out.hidden), skip, time_ID))
      target = rows(flow.velocity_target(flat(draws.noise), data))
      sums = sums._replace(flow=losses.flow(velocity, target, writes_BM))
    if "alignment" in wanted:
      projected = rows(self.alignment_head(gather(out.tap)))
      sums = sums._replace(alignment=losses.alignment(projected, rows(features), writes_BM))
    return sums

  def initialise(self, batch: Batch, draws: Draws) -> None:
    """Touches every parameter once, so that `init` with this method creates them all."""
    c = self.config
    wanted = ("text", "flow") + (("alignment",) if c.alignment_width else ())
    self.losses(batch, draws, wanted)
    self.decode(draws.noise[:, 0])


def _cast_at_use(name: str) -> bool:
  return name.endswith("kernel") or name == "embed"


def cast_for_inference(params: dict[str, Any], dtype: Any) -> None:
  """Casts nested parameters as `for_inference` does, in place: each one's memory is free before the next is cast."""
  for name, x in params.items():
    if isinstance(x, dict):
      cast_for_inference(x, dtype)
    elif _cast_at_use(name):
      params[name] = x.astype(dtype, copy=False)


def for_inference(model: JanusFlow, params: Any) -> tuple[JanusFlow, Any]:
  """The model with separate LLM layers, which decoding needs, and its parameters in the compute dtype.

  Only what a layer casts at its use is cast (kernels, the embedding table): the outputs are bit for bit those
  of the f32 parameters.

  Args:
    model: as trained, or already made for inference.
    params: its nested parameters, NumPy or JAX arrays.
  """
  cast = lambda path, x: x.astype(model.dtype, copy=False) if _cast_at_use(path[-1].key) else x
  if model.unroll:
    lm = separate_layers(params["language_model"], model.config.language_model.layers)
    params = {**params, "language_model": lm}
  return model.clone(unroll=0), jax.tree_util.tree_map_with_path(cast, params)
