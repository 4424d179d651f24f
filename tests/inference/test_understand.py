"""Reading: greedy answers equal whole passes, the nucleus is the right set, the stream is the answer."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import ExifTags, Image
from refusals import refused

from jflow.data.prompts import chat_prompt
from jflow.data.tokenizer import Tokenizer
from jflow.inference import reading
from jflow.inference.pipeline import Pipeline, prepare_image
from jflow.models.unified import for_inference

MODEL = tiny.model()
SLOTS = 1 + tiny.CONFIG.patches


@pytest.fixture(scope="module")
def tokenizer(pipeline) -> Tokenizer:
  return pipeline.tokenizer


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
  return tiny.pipeline()


def _picture(seed: int = 0, size: int = 16) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


@jax.jit
def _whole_pass(params, tokens_S, index_S, pixels_MHWC, length):
  """Logits after `length` tokens, by one pass without a cache."""
  apply = functools.partial(MODEL.apply, {"params": params})
  slots = apply(apply(pixels_MHWC / 127.5 - 1.0, method="features"), method=lambda m, x: m.reader.slots(x))
  x = apply(tokens_S[None], slots.reshape(1, -1, slots.shape[-1]), index_S[None], method="assemble")
  positions = jnp.arange(len(tokens_S))[None]
  hidden = apply(x, positions, (positions < length).astype(jnp.int32), method="backbone").hidden
  return apply(hidden[0, length - 1], method="logits")


def test_greedy_with_a_cache_equals_whole_passes(pipeline, tokenizer):
  """One question about one picture: each token is the argmax of a pass over all before it."""
  answer = pipeline.understand("What color is it?", [_picture()], max_tokens=8)
  turns = [{"role": "user", "content": "<image>\nWhat color is it?"}]
  prompt = chat_prompt(turns, 1, tokenizer, tiny.CONFIG.patches, "plain")
  ids = prompt.tokens.tolist()
  index = np.full(96, -1, np.int32)
  index[prompt.image_starts[0] : prompt.image_starts[0] + SLOTS] = np.arange(SLOTS)
  chosen = []
  for _ in range(8):
    padded = np.zeros(96, np.int32)
    padded[: len(ids) + len(chosen)] = ids + chosen
    logits = _whole_pass(tiny.params(), padded, index, _picture()[None].astype(np.float32), len(ids) + len(chosen))
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
    return np.asarray(_whole_pass(tiny.params(), np.append(tokens, np.zeros(87, np.int32)), none, pixels, length))

  model, params = for_inference(MODEL, tiny.params())
  apply = jax.jit(functools.partial(model.apply, {"params": params}), static_argnames="method")
  padded = np.full((1, 32), 5, np.int32)
  padded[0, :6] = tokens[:6]
  index, nothing = np.full((1, 32), -1, np.int32), np.zeros((0, tiny.CONFIG.language_model.embed_dim), np.float32)
  hidden, cache = jax.jit(reading.prefill, static_argnums=0)(model, params, padded, nothing, index, np.asarray([6]))
  cache = cache.replace(length=jnp.asarray([6]))  # a row of its own length: new tokens take the padding's place
  for length in range(6, 10):
    logits = hidden @ np.asarray(params["language_model"]["head"]["kernel"])
    np.testing.assert_allclose(logits[0], whole(length), atol=1e-5 * np.abs(whole(length)).max())
    if length < 9:
      x = apply(tokens[None, length : length + 1], method="embed")
      out = apply(x, np.asarray([[length]]), np.ones((1, 1), np.int32), cache, method="backbone")
      hidden, cache = out.hidden[:, 0], out.cache


def test_the_answer_depends_on_every_picture_and_their_order(pipeline):
  ask = lambda *pictures: pipeline.understand("What changed?", pictures, max_tokens=8)
  answers = {ask(_picture(a), _picture(b)) for a, b in ((1, 2), (2, 1), (1, 1))}
  assert len(answers) == 3


def test_the_mark_of_the_published_code_says_where_a_picture_stands(pipeline):
  ask = lambda mark: pipeline.understand(f"One {mark} and {mark} two?", [_picture(1), _picture(2)], max_tokens=8)
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
  column = lambda value, dtype: jnp.full((draws,), value, dtype)
  tokens = reading.pick(
    jnp.broadcast_to(logits, (draws, 5)),
    jnp.arange(draws, dtype=jnp.uint32),
    column(0, jnp.int32),
    column(temperature, jnp.float32),
    column(top_p, jnp.float32),
  )
  return np.bincount(np.asarray(tokens), minlength=5) / draws


@pytest.mark.parametrize(
  "top_p, kept",
  [(1e-50, [1]), (0.01, [1]), (0.39, [1]), (0.5, [1, 4]), (0.69, [1, 4]), (0.8, [1, 2, 4]), (1.0, [0, 1, 2, 3, 4])],
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


@functools.cache
def _parrot(ids: tuple[int, ...], last: int) -> Pipeline:
  """A model that says `ids` after the prompt's last token `last`: its layers do nothing, and the head knows which
  token follows which. No token may stand twice."""
  assert len({last, *ids}) == len(ids) + 1
  params = jax.tree.map(np.asarray, tiny.params())
  lm = dict(params["language_model"])
  lm["layers"] = jax.tree.map(np.zeros_like, lm["layers"])
  hidden = lm["embed"] / np.sqrt(np.mean(lm["embed"] ** 2, axis=-1, keepdims=True)) * lm["norm"]["scale"]
  head = np.zeros_like(lm["head"]["kernel"])
  for before, after in zip((last, *ids), ids):
    head[:, after] = hidden[before] / np.sum(hidden[before] ** 2)
  lm["head"] = {"kernel": head}
  return Pipeline(MODEL, params | {"language_model": lm}, Tokenizer.load(str(tiny.TOKENIZER)), "plain")


def _saying(tokenizer: Tokenizer, text: str, end: bool = True) -> Pipeline:
  prompt = chat_prompt([{"role": "user", "content": "Why?"}], 0, tokenizer, 16, "plain").tokens
  ids = tokenizer.encode(text) + ([tokenizer.eos] if end else [])
  return _parrot(tuple(ids), int(prompt[-1]))


@pytest.mark.parametrize("text", ["a red circle", " é世🙂 end", "  two\n lines"])
def test_the_stream_joins_to_the_answer_and_never_cuts_a_character(tokenizer, text):
  pieces = []
  answer = _saying(tokenizer, text).understand("Why?", max_tokens=60, stream=pieces.append)
  assert answer == text.strip() == "".join(pieces)
  assert "" not in pieces and not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_not_lost(tokenizer):
  pieces = []
  assert len(tokenizer.encode("世")) > 1
  answer = _saying(tokenizer, "世").understand("Why?", max_tokens=1, stream=pieces.append)
  assert "\ufffd" in answer and answer == "".join(pieces)


def test_the_answer_ends_at_eos_at_max_tokens_and_at_the_context(pipeline, tokenizer):
  says = _saying(tokenizer, " red blue green")
  assert len(tokenizer.encode(" red blue green")) == 3
  assert says.understand("Why?", max_tokens=9) == says.understand("Why?", max_tokens=4) == "red blue green"
  assert says.understand("Why?", max_tokens=3) == "red blue green"
  assert says.understand("Why?", max_tokens=2) == "red blue"
  context = tiny.CONFIG.language_model.max_length
  turns = lambda n: [{"role": "user", "content": "red" + " red" * n}]
  length = lambda n: len(chat_prompt(turns(n), 0, tokenizer, tiny.CONFIG.patches, "plain").tokens)
  n = context - 2 - length(0)
  assert length(n) == context - 2
  assert pipeline.request(turns(n), max_tokens=9).max_tokens == 2
  assert pipeline.understand(turns(n), max_tokens=9) == pipeline.understand(turns(n), max_tokens=2)
  with refused(f"{context} tokens", f"{context - 1}"):
    pipeline.understand(turns(n + 2))


# --- bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "arguments, named",
  [
    (dict(messages=""), "end with a question"),
    (dict(messages=[]), "end with a question"),
    (dict(messages=[{"role": "user"}]), '"role" and "content"'),
    (dict(messages=None), "messages must be a question or a list of turns, got None"),
    (dict(messages={"role": "user", "content": "What?"}), "messages must be a question or a list of turns"),
    (dict(messages=[{"role": "user", "content": None}], images=[_picture()]), '"content" of a message must be text'),
    (dict(messages=[{"role": "user", "content": [{"text": "Why?"}]}], images=[_picture()]), "must be text"),
    (dict(messages=[{"role": "user"}], images=[_picture()]), '"role" and "content"'),
    (dict(system=3), "system must be text"),
    (dict(messages=["What is this?"]), '"role" and "content", got \'What is this'),
    (dict(messages=[("user", "What is this?")], images=[_picture()]), '"role" and "content"'),
    (
      dict(messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
      "end with a question",
    ),
    (dict(messages="<image> <image> What?", images=[_picture()]), "the conversation cannot be read"),
    (dict(max_tokens=0), "max_tokens=0 must be at least 1"),
    (dict(max_tokens=2.5), "max_tokens=2.5"),
    (dict(seed=True), "seed=True"),
    (dict(temperature="1"), "temperature='1'"),
    (dict(top_p=None), "top_p=None"),
    (dict(temperature=-0.1), "temperature=-0.1 "),
    (dict(temperature=float("nan")), "temperature=nan "),
    (dict(top_p=0.0), "top_p=0.0 "),
    (dict(top_p=1.1), "top_p=1.1 "),
    (dict(seed=-1), "seed=-1 "),
    (dict(images=["nowhere.png"]), "nowhere.png"),
    (dict(images=[b"no picture"]), "PNG, JPEG"),
    (dict(images=[Image.new("RGB", (0, 5))]), "no pixels"),
    (dict(images=["a\0b.png"]), "cannot be read"),
  ],
)
def test_bad_input_is_named(pipeline, arguments, named):
  with refused(named):
    pipeline.understand(**(dict(messages="Why?") | arguments))


@pytest.mark.parametrize("answers", ["red", ["red", 3], [b"red"], None])
def test_answers_to_score_are_texts(pipeline, answers):
  with refused("answers must be a list of texts"):
    pipeline.loglikelihood("Why?", [], answers)


def test_numbers_of_numpy_turns_that_come_once_and_requests_that_come_once(pipeline):
  plain = pipeline.understand("Why?", max_tokens=4, temperature=1, top_p=0.5, seed=3)
  numbers = dict(max_tokens=np.int8(4), temperature=np.float32(1), top_p=np.float16(0.5), seed=np.uint32(3))
  turns = (turn for turn in [{"role": "user", "content": "Why?"}])
  assert pipeline.understand(turns, **numbers) == plain
  assert pipeline.understand_batch(pipeline.request("Why?", **numbers) for _ in "a") == [plain]


def test_a_picture_may_come_as_a_path_bytes_an_image_or_an_array(tmp_path):
  pixels = _picture(size=24)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  forms = [tmp_path / "a.png", str(tmp_path / "a.png"), buffer.getvalue(), Image.fromarray(pixels), pixels]
  want = prepare_image(forms[0], 16)
  assert want.shape == (16, 16, 3)
  assert all(np.array_equal(prepare_image(form, 16), want) for form in forms)


def test_an_odd_picture_is_read_alike_from_its_file_and_from_pil(tmp_path):
  """A turned one, one with alpha, one of 16 bits; and one that is cut short gets one line."""
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8)
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = 6
  Image.fromarray(pixels[..., :3]).save(tmp_path / "turned.jpg", exif=exif)
  Image.fromarray(pixels).save(tmp_path / "alpha.png")
  Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
  for name in ("turned.jpg", "alpha.png", "deep.png"):
    with Image.open(tmp_path / name) as image:
      assert np.array_equal(prepare_image(image, 16), prepare_image(tmp_path / name, 16)), name
  data = (tmp_path / "alpha.png").read_bytes()
  with refused("image"):
    prepare_image(Image.open(io.BytesIO(data[: len(data) // 2])), 16)
