"""The Linen module of rectified flow: VAE latents in, velocities out (paper sections 3.1 and 3.2).

Legend: I images, K = 1 + P slots of an image, P patches, D embed, H W pixels, h w latents of C channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.batch import Batch
from jflow.generation.flow import equations
from jflow.generation.flow.convnext import GenerationDecoder, GenerationEncoder
from jflow.models.config import ModelConfig
from jflow.models.layers import Linear, RMSNorm
from jflow.objectives import flow_matching


class Draws(NamedTuple):
  """The randomness of one batch."""

  time: jax.Array  # f32[B, M] in (0, 1)
  noise: jax.Array  # f32[B, M, h, w, C], z_0 of eq. 3
  posterior: jax.Array  # f32[B, M, h, w, C], for the sample of the VAE's posterior


class Context(NamedTuple):
  """The intermediate values of `FlowWriter.write` that its loss needs."""

  data: jax.Array  # f32[I, h, w, C], the latents that the noise leads to
  noise: jax.Array  # f32[I, h, w, C]
  skip: jax.Array  # [I, h / patch, w / patch, C'], from g_enc to g_dec
  time_embedding: jax.Array  # [I, D]
  mean: jax.Array  # f32[I, h, w, C], of the posterior


class FlowWriter(nn.Module):
  """The writer of rectified flow; see `generation.base.Writer`.

  Attributes:
    config: the whole model's.
    dtype: compute dtype.
  """

  config: ModelConfig
  dtype: Any

  losses_made = ("flow",)
  patches_from = 1  # the P patches follow the time token

  def setup(self) -> None:
    c, dtype = self.config, self.dtype
    lm, gen, latents = c.language_model, c.generation, c.autoencoder.latent_channels
    self.generation_encoder = GenerationEncoder(gen, lm.embed_dim, latents, dtype)
    self.generation_projector = Linear(lm.embed_dim, (None, "embed"), dtype, use_bias=True)
    self.generation_output_norm = RMSNorm(lm.rms_norm_epsilon, dtype)
    self.generation_output_projector = Linear(gen.channels, ("embed", None), dtype, use_bias=True)
    self.generation_decoder = GenerationDecoder(gen, lm.embed_dim, latents, dtype)
    self.vae = c.autoencoder.make(dtype)

  # --- parts -------------------------------------------------------------------------------------------

  def slots(self, z_IhwC: jax.Array, time_I: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Embeddings of the K slots of images at some time: the time token, then g_enc's patches.

    Returns:
      (slots [I, K, D], skip [I, h / patch, w / patch, C'] for g_dec, time embedding [I, D]).
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

  def decode(self, latents_IhwC: jax.Array) -> jax.Array:
    """Scaled latents -> pixels f32[I, H, W, 3], about [-1, 1], not clipped."""
    return self.vae.decode(latents_IhwC / self.config.autoencoder.scaling).astype(jnp.float32)

  def scaled(self, mean: jax.Array, log_variance: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale = self.config.autoencoder.scaling
    return scale * mean.astype(jnp.float32), scale * jnp.exp(0.5 * log_variance.astype(jnp.float32))

  # --- training ----------------------------------------------------------------------------------------

  def draw(self, key: jax.Array, batch: Batch, objective: Any) -> Draws:
    """Draws time, noise and posterior noise for every image of a batch (paper section 3.4)."""
    c = self.config
    b, m = batch.image_kind.shape
    shape = (b, m, c.latent_size, c.latent_size, c.autoencoder.latent_channels)
    time, noise, posterior = jax.random.split(key, 3)
    return Draws(
      time=equations.logit_normal(time, (b, m), objective.draws["time_mean"], objective.draws["time_std"]),
      noise=jax.random.normal(noise, shape),
      posterior=jax.random.normal(posterior, shape),
    )

  def example_draws(self, batch: Batch) -> Draws:
    """Returns draws with time 0.5 and zero noise."""
    c = self.config
    latents = jnp.zeros((*batch.image_kind.shape, c.latent_size, c.latent_size, c.autoencoder.latent_channels))
    return Draws(jnp.full(batch.image_kind.shape, 0.5), latents, latents)

  def write(self, pixels_IHWC: jax.Array, stored: jax.Array, draws: Draws) -> tuple[jax.Array, Context]:
    """Adds noise to the latents according to their drawn times (eq. 2, 3); see `Writer.write`."""
    if stored.shape[1:] == (0,):
      mean, std = self.posterior(pixels_IHWC)
    else:
      mean, std = self.scaled(*jnp.split(stored, 2, axis=-1))
    data = mean + std * draws.posterior
    z = equations.interpolate(draws.noise, data, draws.time)
    slots, skip, time_ID = self.slots(z, draws.time)
    return slots, Context(data, draws.noise, skip, time_ID, mean)

  def losses(
    self, hidden_at: Callable[[int, int], jax.Array], context: Context, written: jax.Array
  ) -> dict[str, jax.Array]:
    """The flow loss (eq. 7); see `Writer.losses`."""
    hidden = hidden_at(self.patches_from, self.config.written_patches)
    velocity = self.velocity(hidden, context.skip, context.time_embedding)
    target = equations.velocity_target(context.noise, context.data)
    return {"flow": flow_matching.loss(velocity, target, written)}

  def initialise(self) -> None:
    """Creates the VAE's decoder."""
    c = self.config
    self.decode(jnp.zeros((1, c.latent_size, c.latent_size, c.autoencoder.latent_channels)))
