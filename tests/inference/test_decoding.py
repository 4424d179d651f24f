"""The running batch: a row's answer is its own, whatever shares the batch, and whenever it came and left."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

from jflow.inference.decoding import Decoder, bucket, power_of_two
from jflow.inference.pipeline import Pipeline

MODEL = tiny.model()
CONTEXT = tiny.CONFIG.language_model.max_length


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
  return tiny.pipeline()


@pytest.fixture(scope="module")
def requests(pipeline) -> list:
  """Greedy and sampled, long and short, with no, one and two pictures."""
  picture = lambda seed: np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)
  ask = pipeline.request
  return [
    ask("Why?", max_tokens=20),
    ask("What color is it?", [picture(1)], max_tokens=9),
    ask("What changed between them, and where?", [picture(1), picture(2)], max_tokens=14),
    ask("A long question " * 6 + "?", max_tokens=3, temperature=1.0, seed=3),
    ask("Why?", max_tokens=17, temperature=1.3, top_p=0.8, seed=7),
    ask("And?", max_tokens=1),
  ]


def _drain(decoder: Decoder, n: int) -> dict[int, tuple[list[int], str]]:
  """Slot -> (tokens, reason), for all that is running."""
  tokens, out = {}, {}
  while decoder.busy:
    for slot, new, finished in decoder.step(n):
      tokens.setdefault(slot, []).extend(new)
      if finished:
        out[slot] = (tokens[slot], finished)
        decoder.release(slot)
  return out


@pytest.fixture(scope="module")
def alone(pipeline, requests) -> list[tuple[list[int], str]]:
  decoder = Decoder(pipeline, 1, CONTEXT)
  return [_one(decoder, request) for request in requests]


def _one(decoder: Decoder, request) -> tuple[list[int], str]:
  slot = decoder.admit(request)
  return _drain(decoder, 64)[slot]


def test_an_answer_does_not_depend_on_what_shares_its_batch(pipeline, requests, alone):
  """Two rows, a new request wherever one ends, in two orders and chunk lengths: the same tokens."""
  assert len({tuple(tokens) for tokens, _ in alone}) == len(alone)
  for order, n in ((range(6), 1), ((5, 3, 1, 4, 2, 0), 5)):
    decoder = Decoder(pipeline, 2, CONTEXT)
    waiting, owner, tokens, ends = list(order), {}, {i: [] for i in order}, {}
    while waiting or owner:
      while waiting and decoder.free:
        i = waiting.pop(0)
        owner[decoder.admit(requests[i])] = i
      for slot, new, finished in decoder.step(n):
        assert len(new) <= n + 1
        tokens[owner[slot]] += new
        if finished:
          ends[owner.pop(slot)] = finished
          decoder.release(slot)
    assert [(tokens[i], ends[i]) for i in range(6)] == alone


def test_the_reason_of_an_end(requests, alone, pipeline):
  for request, (tokens, finished) in zip(requests, alone):
    assert pipeline.tokenizer.eos not in tokens
    assert (len(tokens) == request.max_tokens) == (finished == "length")


def test_a_row_whose_client_left_serves_the_next(pipeline, requests, alone):
  decoder = Decoder(pipeline, 2, CONTEXT)
  left, stays = decoder.admit(requests[2]), decoder.admit(requests[4])
  tokens = {p.slot: p.tokens for p in decoder.step(3)}
  decoder.release(left)
  assert decoder.free == 1 and decoder.admit(requests[1]) == left
  ended = _drain(decoder, 8)
  assert ended[left] == alone[1]
  assert (tokens[stays] + ended[stays][0], ended[stays][1]) == alone[4]


def test_batched_answers_are_the_single_ones_in_their_order(pipeline, requests):
  seen, streamed = [], [""] * len(requests)

  def stream(i: int, piece: str) -> None:
    streamed[i] += piece

  answers = pipeline.understand_batch(requests, 2, stream=stream, progress=lambda *x: seen.append(x))
  assert answers == streamed == [pipeline.understand_batch([request])[0] for request in requests]
  assert seen == [(i + 1, 6) for i in range(6)]
  assert pipeline.understand_batch([]) == []


def test_mistakes_are_named(pipeline, requests):
  for slots, context, said in ((0, 64, "slots=0"), (1, CONTEXT + 1, "context=129"), (1, 1, "context=1 ")):
    with refused(said):
      Decoder(pipeline, slots, context)
  with refused("batch_size=0"):
    pipeline.understand_batch(requests, 0)
  decoder = Decoder(pipeline, 1, 40)
  with refused("39"):
    decoder.admit(requests[2])


def test_sizes_hold_what_they_should():
  for n in range(1, 5000):
    assert n <= bucket(n) <= max(32, n + max(31, n // 4))
    assert n <= power_of_two(n) < 2 * n
  assert len({bucket(n) for n in range(1, 4097)}) <= 30


# --- given answers ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0,))
def _log_p(slots: int, params, tokens_S, pixels_MHWC, start):
  """f32[S, V] of one pass over prompt and answer."""
  apply = functools.partial(MODEL.apply, {"params": params})
  read = apply(apply(pixels_MHWC / 127.5 - 1.0, method="features"), method=lambda m, x: m.reader.slots(x))
  at = jnp.arange(len(tokens_S)) - start
  index = jnp.where((at >= 0) & (at < slots), at, -1)
  x = apply(tokens_S[None], read.reshape(1, -1, read.shape[-1]), index[None], method="assemble")
  ones = jnp.ones((1, len(tokens_S)), jnp.int32)
  hidden = apply(x, jnp.arange(len(tokens_S))[None], ones, method="backbone").hidden
  return jax.nn.log_softmax(apply(hidden[0], method="logits"))


@pytest.mark.parametrize("question, count", [("What is it?", 1), ("Where?", 0)])
def test_the_likelihood_of_answers_is_that_of_whole_passes(pipeline, question, count):
  """Answers of several lengths at once; the greedy answer is known as such."""
  picture = np.random.default_rng(5).integers(0, 256, (1, 16, 16, 3), np.uint8)
  request = pipeline.request(question, list(picture[:count]), max_tokens=2)
  greedy = pipeline.understand_batch([request])[0]
  answers = ["red", "a blue star on the left", "yes", greedy, "no no no"]
  got = pipeline.loglikelihood(question, list(picture[:count]), answers)
  n, start = len(request.tokens), request.image_starts[0] if count else -1000
  for answer, (total, is_greedy) in zip(answers, got, strict=True):
    ids = pipeline.tokenizer.encode(" " + answer)
    row = np.zeros(96, np.int32)
    row[: n + len(ids)] = [*request.tokens, *ids]
    log_p = _log_p(1 + tiny.CONFIG.patches, tiny.params(), row, picture.astype(np.float32), start)
    steps = np.asarray(log_p)[n - 1 : n - 1 + len(ids)]
    assert total == pytest.approx(float(steps[np.arange(len(ids)), ids].sum()), rel=1e-5)
    assert is_greedy == (steps.argmax(-1).tolist() == ids)
  if not count:  # this greedy answer is one that its text gives back token by token
    assert [is_greedy for _, is_greedy in got] == [False, False, False, True, False]


def test_an_answer_that_cannot_be_scored_is_named(pipeline):
  with refused("answer"):
    pipeline.loglikelihood("Why?", [], ["a", " "])
  with refused("128"):
    pipeline.loglikelihood("Why?", [], ["red " * 140])
  assert pipeline.loglikelihood("Why?", [], []) == []
