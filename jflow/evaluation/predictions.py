"""Predictions of a model: answers and images for the tasks of a benchmark, each recorded when it is complete."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from jflow.data.sequences import IMAGE_MARK
from jflow.evaluation.samples import Samples
from jflow.evaluation.tasks import Generation, Question, RoundTrip, save
from jflow.inference.pipeline import to_image

_ROUNDS = 4  # batches of questions between two writes; more keep the batch full while long answers end


def answer(
  model: Any, questions: Sequence[Question], samples: Samples, batch_size: int, done: Callable[[int], None]
) -> None:
  """Answers the questions greedily and records {"key", "answer"} of each, a few batches at a time.

  Args:
    model: a `Pipeline`.
    questions: those without a record.
    samples: receives the records.
    batch_size: questions answered at once.
    done: called with the number of answers just recorded.
  """
  group_size = _ROUNDS * batch_size
  for at in range(0, len(questions), group_size):
    group = questions[at : at + group_size]
    requests = [_request(model, one) for one in group]
    for question, text in zip(group, model.understand_batch(requests, batch_size), strict=True):
      samples.add({"key": question.key, "answer": text})
    done(len(group))


def _request(model: Any, question: Question) -> Any:
  images = list(question.images())
  text = question.text
  if text.count(IMAGE_MARK) == 1:  # where all images stand
    text = text.replace(IMAGE_MARK, IMAGE_MARK * len(images), 1)
  return model.request(text, images, question.max_tokens, system=question.system)


def generate(
  model: Any,
  tasks: Sequence[Generation],
  samples: Samples,
  directory: pathlib.Path,
  batch_size: int,
  settings: dict[str, Any],
  done: Callable[[int], None],
) -> None:
  """Generates the images and records {"key", "file"} of each once its file is complete.

  Args:
    model: a `Pipeline`.
    tasks: those without a record.
    samples: receives the records.
    directory: to which the images' file names are relative.
    batch_size: images generated at once.
    settings: of the model's way to write images, by name.
    done: called with the number of images just recorded.
  """
  for at in range(0, len(tasks), batch_size):
    group = tasks[at : at + batch_size]
    full = _filled(group, batch_size)
    seeds = [one.seed for one in full]
    images = model.generate([one.prompt for one in full], seeds=seeds, batch_size=batch_size, **settings)
    _keep(group, images, samples, directory)
    done(len(group))


def round_trips(
  model: Any,
  trips: Sequence[RoundTrip],
  samples: Samples,
  directory: pathlib.Path,
  batch_size: int,
  done: Callable[[int], None],
) -> None:
  """Encodes and decodes images as the model's way to write them does and records {"key", "file"} of each; arguments as
  in `generate`."""
  side = model.model.config.image_size
  for at in range(0, len(trips), batch_size):
    group = trips[at : at + batch_size]
    pixels = np.stack([trip.picture(side) for trip in _filled(group, batch_size)])
    _keep(group, [to_image(x) for x in model.sampler.round_trip(pixels)], samples, directory)
    done(len(group))


def _filled(group: Sequence[Any], size: int) -> list[Any]:
  """The group padded to `size` with copies of its last element, so that the last batch needs no other program."""
  return [*group, *[group[-1]] * (size - len(group))]


def _keep(
  group: Sequence[Generation | RoundTrip], images: Sequence[Image.Image], samples: Samples, directory: pathlib.Path
) -> None:
  for task, image in zip(group, images):
    save(image, directory / task.file)
    samples.add({"key": task.key, "file": task.file})
