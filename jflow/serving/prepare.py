"""From a checked request to work for the engine: tokens, pixels and a seed."""

import secrets

from jflow.data import examples
from jflow.errors import UserError
from jflow.inference.decoding import Request
from jflow.inference.pipeline import Pipeline
from jflow.serving.jobs import Pictures
from jflow.serving.schemas import IMAGE_MARK, SEEDS, Chat, Painting

_LONGEST_TOKEN = (
  128  # characters; a text of more per token of the context cannot fit, and is not worth its tokenization
)


def chat(pipeline: Pipeline, wanted: Chat, context: int) -> tuple[Chat, Request]:
  """Tokenizes a conversation and decodes its pictures.

  Returns:
    (the conversation with its seed drawn where it named none, the work).

  Raises:
    UserError: turns that do not alternate, a mark that stands for a picture elsewhere, an unreadable picture, no room
      for an answer in `context` tokens.
  """
  for mark in examples.MARKS:
    if any(mark in turn["content"] for turn in wanted.turns):
      raise UserError(f"the text holds {mark}, which shows no picture here: leave it out, and send the picture itself")
  _check_length(sum(len(turn["content"]) for turn in wanted.turns) + len(wanted.system), context)
  wanted = wanted._replace(seed=secrets.randbelow(SEEDS) if wanted.seed is None else wanted.seed)
  request = pipeline.request(
    wanted.turns, wanted.images, wanted.max_tokens, temperature=wanted.temperature, top_p=wanted.top_p,
    seed=wanted.seed, system=wanted.system, mark=IMAGE_MARK,
  )  # fmt: skip
  if len(request.tokens) >= context:
    raise UserError(
      f"the prompt has {len(request.tokens):,} tokens, and the context holds {context - 1:,}: shorten it"
    )
  return wanted, request


def pictures(pipeline: Pipeline, wanted: Painting) -> Pictures:
  """Checks a prompt; draws the seed where none is named.

  Raises:
    UserError: the prompt is too long, or the checkpoint cannot paint.
  """
  _check_length(len(wanted.prompt), pipeline.model.config.language_model.context)
  pipeline.painting_prompt(wanted.prompt)
  seed = secrets.randbelow(SEEDS - wanted.count) if wanted.seed is None else wanted.seed
  return Pictures(wanted.prompt, wanted.count, seed, wanted.settings)


def _check_length(characters: int, context: int) -> None:
  if characters > _LONGEST_TOKEN * context:
    raise UserError(
      f"the prompt has {characters:,} characters, more than {context:,} tokens can hold: shorten it"
    )
