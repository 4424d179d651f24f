"""Codes as a policy: each code of a picture is an action, drawn from the guided logits at a temperature.

Legend: I images, S prompt slots, P codes of an image, R rows (the images, twice with guidance), V rows of the codebook.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow.generation import slices
from jflow.generation.base import Compared, Trajectory
from jflow.generation.codes import sampler
from jflow.generation.codes.config import CodesExploration
from jflow.models.unified import UnifiedModel, with_separate_layers


class Drawn(NamedTuple):
  """The codes of pictures."""

  codes: jax.Array  # int32[I, P]
  log_probability: jax.Array  # f32[I, P], of each under the policy that drew it


class CodesPolicy:
  """The policy of codes, see `generation.base.Policy`."""

  def __init__(self, model: UnifiedModel, exploration: CodesExploration, tokenizer: Any):
    """Of `tokenizer`, the ids `image_start` and `pad`."""
    self._model, self._explore = model, exploration
    self._begin, self._pad = np.int32(tokenizer.image_start), np.int32(tokenizer.pad)

  def sample(self, params: Any, tokens_IS: jax.Array, lengths_I: jax.Array, key: jax.Array, group: int) -> Trajectory:
    """See `generation.base.Policy.sample`. One pass over all codes then gives their log-probabilities."""
    explore, count = self._explore, len(tokens_IS)
    model, separate = with_separate_layers(self._model, params)
    codes, _ = sampler.draw.function(
      model,
      separate,
      jnp.zeros((count, model.config.written_patches), jnp.int32),
      self._prompts(model, separate, tokens_IS, lengths_I),
      lengths_I,
      jax.random.bits(key, (count,), jnp.uint32),
      0,
      model.config.written_patches,
      self._begin,
      jnp.float32(explore.guidance),
      jnp.float32(explore.temperature),
      release=False,
      greedy=False,
      slots=tokens_IS.shape[1] + model.config.written_patches,
    )
    return Trajectory(codes, Drawn(codes, _of(self._log_probabilities(params, tokens_IS, lengths_I, codes), codes)))

  def decode(self, params: Any, latents: jax.Array) -> jax.Array:
    """See `generation.base.Policy.decode`."""
    return slices.decoded(self._model, params, latents)

  def compare(self, params: Any, reference: Any, tokens_IS: jax.Array, lengths_I: jax.Array, drawn: Drawn) -> Compared:
    """See `generation.base.Policy.compare`; the divergence is the exact sum over the codebook."""
    log_IPV = self._log_probabilities(params, tokens_IS, lengths_I, drawn.codes)
    ratio_IP = _of(log_IPV, drawn.codes) - drawn.log_probability
    if reference is None:
      return Compared(ratio_IP, jnp.zeros_like(ratio_IP))
    other_IPV = jax.lax.stop_gradient(self._log_probabilities(reference, tokens_IS, lengths_I, drawn.codes))
    return Compared(ratio_IP, jnp.sum(jnp.exp(log_IPV) * (log_IPV - other_IPV), axis=-1))

  def likelihood(
    self, params: Any, tokens_IS: jax.Array, lengths_I: jax.Array, pixels_IHWC: jax.Array, draws: None
  ) -> jax.Array:
    """See `generation.base.Policy.likelihood`; under the policy's guidance and temperature."""
    codes = jax.lax.stop_gradient(self._model.bind({"params": params}).writer.encode(pixels_IHWC))
    return jnp.mean(_of(self._log_probabilities(params, tokens_IS, lengths_I, codes), codes), axis=-1)

  def draw(self, key: jax.Array, count: int) -> None:
    """Nothing is drawn."""

  def _prompts(self, model: UnifiedModel, params: Any, tokens_IS: jax.Array, lengths_I: jax.Array) -> Any:
    """The cache of the prompts, and of their unconditional twins where there is guidance."""
    rows = [tokens_IS]
    if self._explore.guidance != 1:
      rows.append(jnp.where(jnp.arange(tokens_IS.shape[1]) >= 1, self._pad, tokens_IS))
    return sampler.read_prompts.function(model, params, jnp.concatenate(rows), jnp.tile(lengths_I, len(rows)))

  def _log_probabilities(
    self, params: Any, tokens_IS: jax.Array, lengths_I: jax.Array, codes_IP: jax.Array
  ) -> jax.Array:
    """log p of every code at every place behind the codes before it, f32[I, P, V]."""
    model, params = with_separate_layers(self._model, params)
    cache = self._prompts(model, params, tokens_IS, lengths_I)
    bound, (i, p) = model.bind({"params": params}), codes_IP.shape
    begin_I1D = jnp.broadcast_to(bound.embed(jnp.asarray(self._begin)), (i, 1, model.config.language_model.embed_dim))
    slots = bound.writer.slots(codes_IP[:, :-1])
    x_IPD = jnp.concatenate([begin_I1D.astype(slots.dtype), slots], axis=1)
    both = lambda x: jnp.concatenate([x] * (len(cache.filled) // i))
    positions = both(lengths_I[:, None] + jnp.arange(p))
    out = bound.backbone(both(x_IPD), positions, jnp.ones_like(positions), cache)
    logits = bound.writer.logits(out.hidden)
    if len(logits) > i:
      logits = sampler.guide(logits[:i], logits[i:], self._explore.guidance)
    return jax.nn.log_softmax(logits.astype(jnp.float32) / self._explore.temperature, axis=-1)


def _of(log_IPV: jax.Array, codes_IP: jax.Array) -> jax.Array:
  """The log-probabilities of codes, f32[I, P]."""
  return jnp.take_along_axis(log_IPV, codes_IP[..., None], axis=-1)[..., 0]
