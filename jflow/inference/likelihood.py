"""Log-likelihood of given answers: one prefill of the prompt, then all answers in one batch.

Legend: A answers, S answer slots (bucketed), D embed, V vocab.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.inference import reading
from jflow.inference.decoding import Request, bucket, power_of_two, prompt_arrays
from jflow.models.cache import Prefix
from jflow.models.unified import UnifiedModel


@functools.partial(jax.jit, static_argnames=("model",))
def score(
  model: UnifiedModel,
  params: Any,
  tokens_S: jax.Array,
  slots_ZD: jax.Array,
  image_index_S: jax.Array,
  length: jax.Array,
  answers_AS: jax.Array,
  lengths_A: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Scores answers, padded on the right, after a prompt as in `reading.prefill`.

  Returns:
    (f32[A] sums of log-probabilities, bool[A] whether each token is the most likely one).
  """
  apply = functools.partial(model.apply, {"params": params})
  a, s = answers_AS.shape
  last, cache = reading.prefill(model, params, tokens_S[None], slots_ZD, image_index_S[None], length[None])
  positions = jnp.broadcast_to(length + jnp.arange(s), (a, s))
  x = apply(answers_AS, method="embed")
  hidden = apply(x, positions, jnp.ones_like(positions), Prefix((cache,)), method="backbone").hidden
  before = jnp.concatenate([jnp.broadcast_to(last[:, None], (a, 1, last.shape[-1])), hidden[:, :-1]], axis=1)

  def answer(row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    before_SD, targets_S, length = row  # one answer at a time: no [A, S, V] exists
    logits = apply(before_SD, method="logits")
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets_S[:, None], axis=-1)[:, 0]
    counts = jnp.arange(s) < length
    likeliest = jnp.argmax(logits, axis=-1) == targets_S
    return jnp.sum(jnp.where(counts, log_p, 0.0)), jnp.all(likeliest | ~counts)

  return jax.lax.map(answer, (before, answers_AS, lengths_A))


def loglikelihood(pipeline: Any, request: Request, answers: Sequence[str]) -> list[tuple[float, bool]]:
  """See `Pipeline.loglikelihood`."""
  context = pipeline.model.config.language_model.max_length
  ids = [pipeline.tokenizer.encode(" " + answer.strip()) for answer in answers]
  for answer, row in zip(answers, ids):
    if not answer.strip():
      raise UserError("an answer is empty: there is nothing to score")
    if len(request.tokens) + len(row) > context:
      raise UserError(
        f"the prompt's {len(request.tokens)} tokens and the {len(row)} of the answer {answer[:40]!r} are more "
        f"than the context of {context}"
      )
  padded = np.full((power_of_two(len(ids)), bucket(max(map(len, ids)))), pipeline.tokenizer.pad, np.int32)
  lengths = np.zeros(len(padded), np.int32)
  for i, row in enumerate(ids):
    padded[i, : len(row)], lengths[i] = row, len(row)
  sums, greedy = jax.device_get(
    score(pipeline.model, pipeline.params, *prompt_arrays(pipeline, request, context), padded, lengths)
  )
  return [(float(p), bool(g)) for p, g in zip(sums[: len(ids)], greedy[: len(ids)])]
