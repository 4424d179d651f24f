"""Sampling as one pure function that reverse mode differentiates: what a loss on pictures teaches through the solver.

Legend: I images, S prompt slots, h w C latents, H W pixels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.generation.flow import equations, sampler
from jflow.generation.flow.settings import Settings
from jflow.models.unified import UnifiedModel, for_inference


def sample(
  model: UnifiedModel,
  params: Any,
  tokens_IS: jax.Array | np.ndarray,
  lengths_I: jax.Array | np.ndarray,
  z_IhwC: jax.Array,
  settings: Settings,
) -> jax.Array:
  """Images f32[I, H, W, 3], about [-1, 1], not clipped, of `params` and `z_IhwC`; the caller jits it.

  Of each solver step the state alone is kept for the backward pass, which computes the velocity again.

  Args:
    model: as trained, or for inference.
    params: its nested parameters.
    tokens_IS: int32 prompts, BOS first, padded on the right.
    lengths_I: int32 true lengths.
    z_IhwC: f32, the noise at time 0.
    settings: of the sampler; all of them are static.

  Raises:
    UserError: precision "release", whose bfloat16 steps have no useful gradient.
  """
  if settings.precision != "exact":
    raise UserError(f"precision={settings.precision!r} must be 'exact' where a gradient goes through the sampler")
  model, params = for_inference(model, params, gpu=False)
  guided = settings.guidance != 1.0
  tokens, lengths = jnp.asarray(tokens_IS), jnp.asarray(lengths_I)
  prefix = sampler.read_prompts.function(model, params, tokens, lengths, guided=guided)
  guidance, interval = np.float32(settings.guidance), np.asarray(settings.interval, np.float32)
  velocity = sampler.velocity(model, params, prefix, lengths, len(z_IhwC), guidance, interval)
  grid = equations.time_grid(settings.steps, settings.shift)
  z = equations.integrate(jax.checkpoint(velocity), jnp.asarray(z_IhwC), grid, settings.solver)
  return model.bind({"params": params}).writer.decode(z)
