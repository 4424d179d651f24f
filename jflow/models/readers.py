"""Readers: images to the embeddings of their K slots in a row.

An image that is read has a slot for the begin-of-image token and one for each patch.

Legend: I images, K = 1 + P slots of an image, P patches, D embed, E width of the features.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jflow.generation.flow.convnext import GenerationEncoder
from jflow.models.config import ModelConfig
from jflow.models.layers import Linear, Projector, parameter


class Reader(nn.Module):
  """The learned start vector or the begin-of-image token, then projected features (paper section 3.1).

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
    learned = c.reader.start == "learned"
    if c.reader.kind == "siglip":
      one = learned and c.reader.layers == 1
      self.understanding_projector = (
        Linear(width, (None, "embed"), self.dtype, use_bias=True)
        if one
        else Projector(width, c.reader.layers, self.dtype)
      )
    if c.reader.kind == "separate":
      self.latent_encoder = GenerationEncoder(c.generation, width, c.autoencoder.latent_channels, self.dtype)
      self.latent_projector = Linear(width, (None, "embed"), self.dtype, use_bias=True)
    if learned:
      self.understanding_start = parameter(self, "understanding_start", nn.initializers.zeros, (width,), (None,))

  def latent_features(self, latents_IhwC: jax.Array) -> jax.Array:
    """Features [I, P, E] of the latents of images to read, for ablations."""
    encoder = self.writer.generation_encoder if self.config.reader.kind == "shared" else self.latent_encoder
    return encoder(latents_IhwC, jnp.ones(latents_IhwC.shape[0]))[0]

  def slots(self, features_IPE: jax.Array) -> jax.Array:
    """Embeddings [I, K, D] of the K slots of images to read; where a token stands in the first, that one is zeros."""
    if self.config.reader.kind == "siglip":
      project = self.understanding_projector
    else:
      project = self.writer.generation_projector if self.config.reader.kind == "shared" else self.latent_projector
    x_IPD = project(features_IPE)
    if self.config.reader.start == "token":
      return jnp.pad(x_IPD, ((0, 0), (1, 0), (0, 0)))
    start = jnp.broadcast_to(self.understanding_start.astype(x_IPD.dtype), (x_IPD.shape[0], 1, x_IPD.shape[2]))
    return jnp.concatenate([start, x_IPD], axis=1)
