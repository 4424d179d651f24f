"""Responses of /v1/chat/completions from generated tokens: one object, or server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from jflow.data.tokenizer import Tokenizer
from jflow.inference.decoding import Text
from jflow.serving.jobs import Job, Tokens
from jflow.serving.schemas import ApiError, Chat


class Answer:
  """An answer being sent to a client."""

  def __init__(self, chat: Chat, model: str, prompt_tokens: int, tokenizer: Tokenizer):
    self._chat, self._prompt_tokens, self._text = chat, prompt_tokens, Text(tokenizer, chat.stop)
    self._head = {
      "id": f"chatcmpl-{uuid.uuid4().hex}",
      "created": int(time.time()),
      "model": model,
      "system_fingerprint": None,
      "seed": chat.seed,
    }

  async def whole(self, event: Tokens, job: Job) -> dict[str, Any]:
    """The answer as one object; `event` is the first of the job."""
    piece, finished = self._read(event, job)
    pieces = [piece]
    while not finished:
      piece, finished = self._read(await job.next(), job)
      pieces.append(piece)
    message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished}
    return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage()}

  async def stream(self, event: Tokens, job: Job) -> AsyncIterator[str]:
    """The answer as server-sent events; an error ends it in place of [DONE]."""
    yield self._event({"role": "assistant", "content": "", "refusal": None})
    try:
      while True:
        piece, finished = self._read(event, job)
        if piece:
          yield self._event({"content": piece})
        if finished:
          break
        event = await job.next()
    except ApiError as error:
      yield _sse(error.body())
      return
    yield self._event({}, finished)
    if self._chat.include_usage:
      yield _sse(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
    yield "data: [DONE]\n\n"

  def _read(self, event: Tokens, job: Job) -> tuple[str, str | None]:
    """(text that an event adds, finish reason or None); a stop sequence ends the answer and frees the job's slot."""
    piece = self._text.add(event.ids, last=event.finished is not None)
    if self._text.stopped:
      job.gone = True
      return piece, "stop"
    return piece, event.finished

  def _event(self, delta: dict[str, Any], finished: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finished}
    usage = {"usage": None} if self._chat.include_usage else {}  # the count comes in an event of its own
    return _sse(self._head | {"object": "chat.completion.chunk", "choices": [choice], **usage})

  def _usage(self) -> dict[str, int]:
    read, written = self._prompt_tokens, len(self._text.tokens)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _sse(body: dict[str, Any]) -> str:
  return f"data: {json.dumps(body)}\n\n"
