"""From a checked request to work for the engine: tokens, pixels and a seed."""

import secrets

from jflow.inference.decoding import Request
from jflow.inference.pipeline import Pipeline
from jflow.serving.jobs import Pictures
from jflow.serving.schemas import IMAGE_MARK, SEEDS, Chat, Painting


def chat(pipeline: Pipeline, wanted: Chat) -> tuple[Chat, Request]:
  """Tokenizes a conversation and decodes its pictures.

  Returns:
    (the request with its seed drawn where it named none, the work).

  Raises:
    UserError: turns that do not alternate, an unreadable picture, a prompt longer than the context.
  """
  wanted = wanted._replace(seed=secrets.randbelow(SEEDS) if wanted.seed is None else wanted.seed)
  return wanted, pipeline.request(
    wanted.turns, wanted.images, wanted.max_tokens, temperature=wanted.temperature, top_p=wanted.top_p,
    seed=wanted.seed, system=wanted.system, mark=IMAGE_MARK,
  )  # fmt: skip


def pictures(pipeline: Pipeline, wanted: Painting) -> Pictures:
  """Checks a prompt against the context.

  Raises:
    UserError: the prompt is too long, or the checkpoint cannot paint.
  """
  pipeline.check_prompt(wanted.prompt)
  seed = secrets.randbelow(SEEDS - wanted.count) if wanted.seed is None else wanted.seed
  return Pictures(wanted.prompt, wanted.count, seed, wanted.settings)
