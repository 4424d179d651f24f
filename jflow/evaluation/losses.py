"""The losses of single records, computed as training computes them: each record alone in a row."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.batch import Batch, RowShape
from jflow.data import examples, images, packing
from jflow.data.records import Record, RecordError
from jflow.errors import UserError
from jflow.evaluation.runs import Run
from jflow.evaluation.samples import Samples
from jflow.evaluation.tasks import Loss
from jflow.generation.base import family
from jflow.interop.checkpoints import Described
from jflow.models.unified import UnifiedModel, cast_for_inference, loss_counts, make_writer

DRAWS = 4  # times and noises of an image to write; other records have one loss
_STEP = 64  # a row's tokens are a multiple of it


def losses(
  found: Described,
  dtype: str,
  run: Run,
  asked: Sequence[Loss],
  samples: Samples,
  batch_size: int,
  done: Callable[[int], None],
) -> None:
  """Computes losses and records {"key", "answer": [sum, count]} of each record.

  A picture to write is cut as in training, in its middle where training chooses a place, its caption is whole, and its
  loss is the mean over `DRAWS` draws. A document longer than the context is read in pieces.

  Args:
    found: the checkpoint, with its tokenizer.
    dtype: compute dtype.
    run: of the checkpoint.
    asked: those without a record.
    samples: receives the records.
    batch_size: records at once.
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
  cast_for_inference(params, model.dtype, found.config)
  params = jax.device_put(params)
  score = _score(model, run.objective, DRAWS if writes else 1)
  for at in range(0, len(asked), batch_size):
    group = asked[at : at + batch_size]
    cut = [(one, piece) for one in group for piece in pieces(found, one, run)]
    answers = {one.key: np.zeros(2) for one in group}
    for first in range(0, len(cut), batch_size):
      ones, made = zip(*cut[first : first + batch_size], strict=True)
      shape = _shape(found.config, made)
      rows = [packing.pack([sample], shape) for sample in (*made, *[made[-1]] * (batch_size - len(made)))]
      batch = jax.tree.map(lambda *x: np.stack(x), *rows)
      seeds = np.array([one.seed for one in ones] + [0] * (batch_size - len(ones)), np.uint32)
      for one, sums, counts in zip(ones, *jax.device_get(score(params, batch, seeds)), strict=False):
        answers[one.key] += float(sums), float(counts)
    for one in group:
      samples.add({"key": one.key, "answer": answers[one.key].tolist()})
    done(len(group))


def fits(found: Described, record: Record, task: str, run: Run) -> bool:
  """Whether a record, whose images may be None, fits the context; a text always does, in pieces."""
  if task == "text":
    return True
  try:
    return len(_sequence(found, record, task, run).tokens) <= found.config.language_model.max_length
  except RecordError:  # its loss says what is wrong
    return True


def _score(model: UnifiedModel, drawing: Any, draws: int) -> Any:
  """Builds score(params, batch, seeds) -> (f32[B] sums, f32[B] counts), a row at a time."""
  writer = make_writer(model.config, model.dtype)
  names = ("text", *writer.losses_made)

  def row(params: Any, one: tuple[Batch, jax.Array]) -> tuple[jax.Array, jax.Array]:
    batch, seed = jax.tree.map(lambda x: x[None], one[0]), one[1]
    counts, total = loss_counts(model.config, batch), jnp.zeros(())
    for number in range(draws):
      drawn = writer.draw(jax.random.fold_in(jax.random.key(seed), number), batch, drawing)
      sums = model.apply({"params": params}, batch, drawn, names, method="losses")
      total += sum(sums.values()) / draws
    text = jnp.any(batch.loss_mask)
    return total, jnp.where(text, counts["text"], counts[names[-1]])

  return jax.jit(lambda params, batch, seeds: jax.lax.map(lambda one: row(params, one), (batch, seeds)))


def _sequence(found: Described, record: Record, task: str, run: Run) -> examples.Sample:
  """The sequence of a record, its images as they are."""
  c = found.config
  assert found.tokenizer is not None
  return examples.build(
    record,
    task,
    found.tokenizer,
    found.template,
    c.written_patches if task == "generation" else c.patches,
    layout=family(c.generation).layout,
    caption_prompt=run.caption_prompt,
  )


def pieces(found: Described, one: Loss, run: Run) -> list[examples.Sample]:
  """Returns the sequence of a record, its images decoded; of a text longer than the context, its pieces as in training.

  Raises:
    UserError: the record cannot be used.
  """
  c = found.config
  try:
    sample = _sequence(found, one.record(), one.task, run)
    writes = one.task == "generation"
    rng = np.random.default_rng(one.seed)
    cut = lambda x: images.for_generation(x, c.image_size, rng, run.crop)
    pixels = tuple(cut(x) if writes else images.for_understanding(x, c.image_size) for x in sample.images)
  except RecordError as error:
    raise UserError(f"{one.key}: {error}: run `jflow prepare` on the source again") from None
  if one.task == "text":
    plan = packing.plan_documents(np.array([len(sample.tokens)]), c.language_model.max_length, 0)
    return [packing.cut(sample, start, stop) for start, stop in zip(plan.starts, plan.stops, strict=True)]
  return [sample._replace(images=pixels)]


def _shape(config: Any, made: Sequence[examples.Sample]) -> RowShape:
  """The smallest row for each of some samples."""
  writes = family(config.generation)
  tokens = -(-max(len(sample.tokens) for sample in made) // _STEP) * _STEP
  pictures = max(1, *(len(sample.images) for sample in made))
  slots, written = writes.layout.slots(config.written_patches), config.written_patches
  return RowShape(tokens, pictures, config.patches, config.image_size, writes.name, slots, written_patches=written)
