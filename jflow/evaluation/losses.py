"""The losses of single records, computed as training computes them: each record alone in a row."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.batch import Batch, RowShape
from jflow.data import examples, images, packing
from jflow.data.records import RecordError
from jflow.errors import UserError
from jflow.evaluation.samples import Samples
from jflow.evaluation.tasks import Loss
from jflow.generation.base import family
from jflow.interop.checkpoints import Described
from jflow.models.unified import UnifiedModel, cast_for_inference, loss_counts, make_writer

DRAWS = 4  # times and noises of an image to write
_STEP = 64  # a row's tokens are a multiple of it


def losses(
  found: Described,
  dtype: str,
  draws: Any,
  asked: Sequence[Loss],
  samples: Samples,
  batch_size: int,
  caption_prompt: str,
  done: Callable[[int], None],
) -> None:
  """Computes losses and records {"key", "answer": [sum, count]} of each record.

  A picture to write is cut in its middle, its caption is whole, and its loss is the mean over `DRAWS` draws.

  Args:
    found: the checkpoint, with its tokenizer.
    dtype: compute dtype.
    draws: how the writer draws, as `config.ObjectiveConfig`.
    asked: those without a record.
    samples: receives the records.
    batch_size: records at once.
    caption_prompt: see `examples.build`.
    done: called with the number of losses just recorded.

  Raises:
    UserError: a record cannot be used, or the checkpoint has no VAE for images to write.
  """
  if not asked:
    return
  writes = any(one.task == "generation" for one in asked)
  if writes and not found.has_vae:
    raise UserError(f"{found.directory} has no VAE, which images to write are encoded by: name one with --vae")
  model = UnifiedModel(found.config, jnp.dtype(dtype), remat="none", unroll=1, attention="xla")
  params = found.read_params()
  cast_for_inference(params, model.dtype)
  params = jax.device_put(params)
  score = _score(model, draws)
  for at in range(0, len(asked), batch_size):
    group = asked[at : at + batch_size]
    made = [_sample(found, one, caption_prompt) for one in group]
    shape = _shape(found.config, made)
    rows = [packing.pack([sample], shape) for sample in (*made, *[made[-1]] * (batch_size - len(made)))]
    batch = jax.tree.map(lambda *x: np.stack(x), *rows)
    seeds = np.array([one.seed for one in group] + [0] * (batch_size - len(group)), np.uint32)
    for one, sums, counts in zip(group, *jax.device_get(score(params, batch, seeds)), strict=False):
      samples.add({"key": one.key, "answer": [float(sums), float(counts)]})
    done(len(group))


def _score(model: UnifiedModel, drawing: Any) -> Any:
  """Builds score(params, batch, seeds) -> (f32[B] sums, f32[B] counts), a row at a time."""
  writer = make_writer(model.config, model.dtype)
  names = ("text", *writer.losses_made)

  def row(params: Any, one: tuple[Batch, jax.Array]) -> tuple[jax.Array, jax.Array]:
    batch, seed = jax.tree.map(lambda x: x[None], one[0]), one[1]
    counts, total = loss_counts(model.config, batch), jnp.zeros(())
    for number in range(DRAWS):
      drawn = writer.draw(jax.random.fold_in(jax.random.key(seed), number), batch, drawing)
      sums = model.apply({"params": params}, batch, drawn, names, method="losses")
      total += sum(sums.values()) / DRAWS
    text = jnp.any(batch.loss_mask)
    return total, jnp.where(text, counts["text"], counts[names[-1]])

  return jax.jit(lambda params, batch, seeds: jax.lax.map(lambda one: row(params, one), (batch, seeds)))


def _sample(found: Described, one: Loss, caption_prompt: str) -> examples.Sample:
  """The sequence of a record, its images decoded."""
  c = found.config
  try:
    sample = examples.build(
      one.record(),
      one.task,
      found.tokenizer,
      found.template,
      c.patches,
      layout=family(c.generation).layout,
      caption_prompt=caption_prompt,
    )
    writes = one.task == "generation"
    rng = np.random.default_rng(one.seed)
    cut = lambda x: images.for_generation(x, c.image_size, rng, "center") if writes else None
    pixels = tuple(cut(x) if writes else images.for_understanding(x, c.image_size) for x in sample.images)
  except RecordError as error:
    raise UserError(f"{one.key}: {error}: run `jflow prepare` on the source again") from None
  if len(sample.tokens) > c.language_model.max_length:
    raise UserError(
      f"{one.key} has {len(sample.tokens)} tokens, more than the context of {c.language_model.max_length}"
    )
  return sample._replace(images=pixels)


def _shape(config: Any, made: Sequence[examples.Sample]) -> RowShape:
  """The smallest row for each of some samples."""
  writes = family(config.generation)
  tokens = -(-max(len(sample.tokens) for sample in made) // _STEP) * _STEP
  pictures = max(1, *(len(sample.images) for sample in made))
  slots = writes.layout.slots(config.patches)
  return RowShape(tokens, pictures, config.patches, config.image_size, writes.name, slots)
