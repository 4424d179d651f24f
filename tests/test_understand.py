"""Reading: greedy answers equal whole passes, the nucleus is the right set, the stream is the answer."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from jflow.data import examples
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.inference import reading
from jflow.inference.pipeline import Pipeline, prepare_image

MODEL = tiny.model()
SLOTS = 1 + tiny.CONFIG.patches


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  return Tokenizer.load(str(tiny.TOKENIZER))


@pytest.fixture(scope="module")
def pipeline(tokenizer) -> Pipeline:
  return Pipeline(MODEL, tiny.params(), tokenizer, "plain")


def _picture(seed: int = 0, size: int = 16) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


@jax.jit
def _whole_pass(params, tokens_S, index_S, pixels_MHWC, length):
  """Logits after `length` tokens, by one pass without a cache."""
  apply = functools.partial(MODEL.apply, {"params": params})
  slots = apply(apply(pixels_MHWC / 127.5 - 1.0, method="features"), method="read_slots")
  x = apply(tokens_S[None], slots.reshape(1, -1, slots.shape[-1]), index_S[None], method="assemble")
  positions = jnp.arange(len(tokens_S))[None]
  hidden = apply(x, positions, (positions < length).astype(jnp.int32), method="backbone").hidden
  return apply(hidden[0, length - 1], method="logits")


def test_greedy_with_a_cache_equals_whole_passes(pipeline, tokenizer):
  """One question about one picture: each token is the argmax of a pass over all before it."""
  answer = pipeline.understand("What color is it?", [_picture()], max_tokens=8)
  turns = [{"role": "user", "content": "<image>\nWhat color is it?"}]
  prompt = examples.chat_prompt(turns, 1, tokenizer, tiny.CONFIG.patches, "plain")
  ids = prompt.tokens.tolist()
  index = np.full(96, -1, np.int32)
  index[prompt.image_starts[0] : prompt.image_starts[0] + SLOTS] = np.arange(SLOTS)
  chosen = []
  for _ in range(8):
    padded = np.zeros(96, np.int32)
    padded[: len(ids) + len(chosen)] = ids + chosen
    logits = _whole_pass(
      tiny.params(), padded, index, _picture()[None].astype(np.float32), len(ids) + len(chosen)
    )
    chosen.append(int(np.argmax(logits)))
    if chosen[-1] == tokenizer.eos:
      chosen.pop()
      break
  assert answer == tokenizer.decode(chosen).strip() and len(chosen) > 1


@pytest.mark.smoke
def test_logits_with_a_cache_equal_whole_passes():
  """A prompt of text, padded, then three tokens one by one: the same logits to 1e-5."""
  tokens = np.random.default_rng(0).integers(10, tiny.VOCABULARY, 9).astype(np.int32)
  pixels, none = np.zeros((1, 16, 16, 3), np.float32), np.full(96, -1, np.int32)

  def whole(length: int) -> np.ndarray:
    return np.asarray(
      _whole_pass(tiny.params(), np.append(tokens, np.zeros(87, np.int32)), none, pixels, length)
    )

  padded = np.full((1, 32), 5, np.int32)
  padded[0, :6] = tokens[:6]
  index, images = np.full((1, 32), -1, np.int32), np.zeros((1, 0, 16, 16, 3), np.uint8)
  logits, cache = reading.prefill(MODEL, tiny.params(), padded, np.asarray([6]), images, index, slots=64)
  for length in range(6, 9):
    np.testing.assert_allclose(logits[0], whole(length), atol=1e-5 * np.abs(whole(length)).max())
    logits, cache = reading.decode(
      MODEL, tiny.params(), tokens[length : length + 1], np.asarray([length]), cache
    )
  np.testing.assert_allclose(logits[0], whole(9), atol=1e-5 * np.abs(whole(9)).max())


def test_the_answer_depends_on_every_picture_and_their_order(pipeline):
  ask = lambda *pictures: pipeline.understand("What changed?", pictures, max_tokens=8)
  answers = {ask(_picture(a), _picture(b)) for a, b in ((1, 2), (2, 1), (1, 1))}
  assert len(answers) == 3


def test_the_mark_of_the_published_code_says_where_a_picture_stands(pipeline):
  ask = lambda mark: pipeline.understand(
    f"One {mark} and {mark} two?", [_picture(1), _picture(2)], max_tokens=8
  )
  assert (
    ask("<image_placeholder>")
    == ask("<image>")
    != pipeline.understand("One and two?", [_picture(1), _picture(2)], max_tokens=8)
  )


# --- choosing a token -------------------------------------------------------------------------------------

PROBABILITIES = np.array([0.05, 0.4, 0.15, 0.1, 0.3])


@functools.cache
def _frequencies(temperature: float, top_p: float, draws: int = 4000) -> np.ndarray:
  logits = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]
  keys = jax.random.split(jax.random.key(0), draws)
  tokens = jax.vmap(lambda key: reading.pick(logits, key, jnp.float32(temperature), jnp.float32(top_p))[0])(
    keys
  )
  return np.bincount(np.asarray(tokens), minlength=5) / draws


@pytest.mark.parametrize(
  "top_p, kept",
  [(0.01, [1]), (0.39, [1]), (0.5, [1, 4]), (0.69, [1, 4]), (0.8, [1, 2, 4]), (1.0, [0, 1, 2, 3, 4])],
)
def test_top_p_keeps_the_smallest_set_of_that_mass(top_p, kept):
  want = np.zeros(5)
  want[kept] = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
  got = _frequencies(1.0, top_p)
  assert np.all((got > 0) == (want > 0))
  np.testing.assert_allclose(got, want, atol=5 * 0.5 / np.sqrt(4000))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_and_flattens(temperature):
  want = PROBABILITIES ** (1 / temperature)
  np.testing.assert_allclose(_frequencies(temperature, 1.0), want / want.sum(), atol=5 * 0.5 / np.sqrt(4000))


def test_temperature_0_takes_the_most_likely():
  assert _frequencies(0.0, 1.0, 50).tolist() == [0, 1, 0, 0, 0]


def test_a_seed_gives_one_answer(pipeline):
  ask = lambda seed: pipeline.understand("Why?", max_tokens=8, temperature=1.0, seed=seed)
  assert ask(1) == ask(1)
  assert len({ask(seed) for seed in range(4)}) == 4


# --- the answer -------------------------------------------------------------------------------------------


def _say(monkeypatch, ids: list[int]) -> None:
  """Makes the model choose these tokens."""
  chosen = iter(ids)
  monkeypatch.setattr(reading, "pick", lambda *_: np.asarray([next(chosen)], np.int32))


@pytest.mark.parametrize("text", ["a red circle", " héllo 世界 🙂 end", "  two\n\nlines  "])
def test_the_stream_joins_to_the_answer_and_never_cuts_a_character(pipeline, tokenizer, monkeypatch, text):
  pieces = []
  _say(monkeypatch, tokenizer.encode(text) + [tokenizer.eos])
  answer = pipeline.understand("Why?", max_tokens=60, stream=pieces.append)
  assert answer == text.strip() == "".join(pieces)
  assert "" not in pieces and not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_lost(pipeline, tokenizer, monkeypatch):
  ids, pieces = tokenizer.encode("世"), []
  assert len(ids) > 1
  _say(monkeypatch, ids)
  answer = pipeline.understand("Why?", max_tokens=1, stream=pieces.append)
  assert "\ufffd" in answer and answer == "".join(pieces)


def test_the_answer_ends_at_eos_at_max_tokens_and_at_the_context(pipeline, tokenizer, monkeypatch):
  red = tokenizer.encode(" red")
  assert len(red) == 1
  _say(monkeypatch, red * 2 + [tokenizer.eos] + red * 9)
  assert pipeline.understand("Why?", max_tokens=9) == "red red"
  _say(monkeypatch, red * 9)
  assert pipeline.understand("Why?", max_tokens=3) == "red red red"
  context = tiny.CONFIG.language_model.context
  turns = lambda n: [{"role": "user", "content": "red" + " red" * n}]
  length = lambda n: len(examples.chat_prompt(turns(n), 0, tokenizer, tiny.CONFIG.patches, "plain").tokens)
  n = context - 2 - length(0)
  assert length(n) == context - 2
  _say(monkeypatch, red * 9)
  assert pipeline.understand(turns(n), max_tokens=9) == "red red"
  with pytest.raises(
    UserError, match=f"the prompt has {context} tokens, and the context holds {context - 1}"
  ):
    pipeline.understand(turns(n + 2))


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "arguments, named",
  [
    (dict(messages=""), "should end with a question"),
    (dict(messages=[]), "should end with a question"),
    (dict(messages=[{"role": "user"}]), '"role" and "content"'),
    (
      dict(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
      "end with a question",
    ),
    (dict(messages="<image> <image> What?", images=[_picture()]), "the conversation cannot be read"),
    (dict(max_tokens=0), "max_tokens=0 must be at least 1"),
    (dict(temperature=-0.1), "temperature=-0.1 "),
    (dict(temperature=float("nan")), "temperature=nan "),
    (dict(top_p=0.0), "top_p=0.0 "),
    (dict(top_p=1.1), "top_p=1.1 "),
    (dict(seed=-1), "seed=-1 "),
    (dict(images=["nowhere.png"]), "nowhere.png cannot be read: No such file"),
    (dict(images=[b"no picture"]), "not a readable PNG, JPEG or WebP image"),
  ],
)
def test_bad_input_is_named(pipeline, arguments, named):
  with pytest.raises(UserError, match=named):
    pipeline.understand(**(dict(messages="Why?") | arguments))


def test_a_picture_may_come_as_a_path_bytes_an_image_or_an_array(tmp_path):
  pixels = _picture(size=24)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  forms = [tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue(), Image.fromarray(pixels), pixels]
  want = prepare_image(forms[0], 16)
  assert want.shape == (16, 16, 3)
  assert all(np.array_equal(prepare_image(form, 16), want) for form in forms)
