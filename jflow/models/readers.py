"""Readers: images to the embeddings of their K slots in a row.

Legend: I images, K = 1 + P slots of an image, P patches, D embed, E width of the features.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.generation.flow.convnext import GenerationEncoder
from jflow.models.config import ModelConfig
from jflow.models.layers import Linear, parameter


class Reader(nn.Module):
  """The learned start vector, then projected features (paper section 3.1).

  The features are SigLIP's, or for ablations those of ConvNeXt blocks over VAE latents at time 1 (data): the writer's
  own blocks ("shared"), or a copy with the same initial parameters ("separate"; paper section 4.5).

  Attributes:
    config: the whole model's.
    writer: the model's writer; "shared" uses its encoder and projector.
    dtype: compute dtype.
  """

  config: ModelConfig
  writer: Any
  dtype: Any

  def setup(self) -> None:
    c, width = self.config, self.config.language_model.embed_dim
    if c.reader == "siglip":
      self.understanding_projector = Linear(width, (None, "embed"), self.dtype, use_bias=True)
    if c.reader == "separate":
      self.latent_encoder = GenerationEncoder(c.generation, width, c.autoencoder.latent_channels, self.dtype)
      self.latent_projector = Linear(width, (None, "embed"), self.dtype, use_bias=True)
    self.understanding_start = parameter(self, "understanding_start", nn.initializers.zeros, (width,), (None,))

  def latent_features(self, latents_IhwC: jax.Array) -> jax.Array:
    """Features [I, P, E] of the latents of images to read, for ablations."""
    encoder = self.writer.generation_encoder if self.config.reader == "shared" else self.latent_encoder
    return encoder(latents_IhwC, jnp.ones(latents_IhwC.shape[0]))[0]

  def slots(self, features_IPE: jax.Array) -> jax.Array:
    """Embeddings [I, K, D] of the K slots of images to read."""
    if self.config.reader == "siglip":
      project = self.understanding_projector
    else:
      project = self.writer.generation_projector if self.config.reader == "shared" else self.latent_projector
    x_IPD = project(features_IPE)
    start = jnp.broadcast_to(self.understanding_start.astype(x_IPD.dtype), (x_IPD.shape[0], 1, x_IPD.shape[2]))
    return jnp.concatenate([start, x_IPD], axis=1)
