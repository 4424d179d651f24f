"""Direct preference optimisation, pure (DPO, arXiv 2305.18290; of flow, Diffusion-DPO, arXiv 2311.12908).

Legend: I pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Objective(NamedTuple):
  """Sums over pairs, divided by their number in the whole batch."""

  loss: jax.Array  # f32[]
  margin: jax.Array  # f32[], the mean of what the better picture has gained more than the worse one, in nats
  preferred: jax.Array  # f32[], the share of pairs whose better picture has gained more


def objective(better_I: jax.Array, worse_I: jax.Array, beta: float, count: int) -> Objective:
  """-log sigmoid(beta (better - worse)), to be minimised; log 2 at the reference.

  Args:
    better_I, worse_I: f32, log-likelihoods under the policy less those under the reference, means over a picture's
      latents or codes.
    beta: how soon a pair counts as learned.
    count: pairs of the whole batch, of which these are a part: the sums of parts add up.
  """
  margin_I = better_I - worse_I
  total = lambda x_I: jnp.sum(x_I) / count
  preferred = (margin_I > 0).astype(jnp.float32)
  return Objective(-total(jax.nn.log_sigmoid(beta * margin_I)), total(margin_I), total(preferred))
