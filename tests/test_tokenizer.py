"""The tokenizer: names, round trips, refusals."""

import json
import pathlib
import pickle

import pytest

from jflow.data import tokenizer as tokenizer_lib
from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from jflow.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "processor"
SHIPPED = pathlib.Path(__file__).parent.parent / "configs" / "tokenizer"
TEXTS = [
  "",
  "a red circle",
  "  two  spaces ",
  "line\nbreak\r\n\n\ttab",
  "颜色呢？一个圆。",
  "naïve ß 🙂👩‍🚀",
  "\0 nul \x7f",
  "1234567890",
  "<image>",
  "é\u0301",
]


@pytest.fixture(scope="module", params=[GOLDEN, SHIPPED], ids=["golden", "shipped"])
def tokenizer(request):
  return Tokenizer.load(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_those_of_the_file(tokenizer):
  added = {
    token["content"]: token["id"] for token in json.loads(tokenizer._files["tokenizer.json"])["added_tokens"]
  }
  for attribute, name in SPECIAL_TOKENS.items():
    assert getattr(tokenizer, attribute) == added[name]
  assert tokenizer.vocabulary_size == max(added.values()) + 1


def test_golden_ids():
  tokenizer = Tokenizer.load(GOLDEN)
  ids = [getattr(tokenizer, name) for name in SPECIAL_TOKENS]
  assert ids == [1000, 1001, 1002, 1003, 1004, 1005, 1006]  # tokenizer_config.json calls EOS the pad token


@pytest.mark.parametrize(
  "copy", [lambda t: t, lambda t: pickle.loads(pickle.dumps(t))], ids=["itself", "pickled"]
)
def test_written_special_tokens_stay_text(tokenizer, copy):
  tokenizer = copy(tokenizer)
  text = " ".join(SPECIAL_TOKENS.values())
  ids = tokenizer.encode(text)
  assert not set(ids) & {getattr(tokenizer, name) for name in SPECIAL_TOKENS}
  assert tokenizer.decode(ids) == text


def test_special_ids_decode_to_nothing(tokenizer):
  ids = tokenizer.encode("a circle")
  assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == "a circle"


def test_lone_surrogate_is_refused(tokenizer):
  with pytest.raises(UserError, match="Unicode"):
    tokenizer.encode("a \ud800 b")


def test_save_copies_the_bytes(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "copy")
  names = sorted(path.name for path in (tmp_path / "copy").iterdir())
  assert names == ["tokenizer.json", "tokenizer_config.json"]
  for name in names:
    assert (tmp_path / "copy" / name).read_bytes() == tokenizer._files[name]


def _write(directory, content, config=None):
  (directory / "tokenizer.json").write_bytes(
    content if isinstance(content, bytes) else json.dumps(content).encode()
  )
  if config is not None:
    (directory / "tokenizer_config.json").write_text(config)
  return directory


def _golden() -> dict:
  return json.loads((GOLDEN / "tokenizer.json").read_bytes())


def _renumbered() -> dict:
  value = _golden()
  value["model"]["vocab"]["circle!"] = 5
  return value


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"{",
    (GOLDEN / "tokenizer.json").read_bytes()[:20_000],
    b"\xff\xfe",
    b"[1, 2]",
    b"[" * 100_000,
    b"{}",
  ],
  ids=["empty", "cut", "cut-late", "not-utf8", "array", "nested", "no-model"],
)
def test_broken_files_are_refused(tmp_path, content):
  with pytest.raises(UserError, match=str(tmp_path)):
    Tokenizer.load(_write(tmp_path, content))


def test_repeated_id_is_refused(tmp_path):
  with pytest.raises(UserError, match=str(tmp_path)):
    Tokenizer.load(_write(tmp_path, _renumbered()))


@pytest.mark.parametrize("attribute", [name for name in SPECIAL_TOKENS if name != "pad"])
def test_missing_special_token_is_named(tmp_path, attribute):
  value = _golden()
  for token in value["added_tokens"]:
    if token["content"] == SPECIAL_TOKENS[attribute]:
      token["content"] = "<renamed>"
  value["post_processor"] = None
  with pytest.raises(UserError, match=f"has no {SPECIAL_TOKENS[attribute]} ".replace("|", r"\|")):
    Tokenizer.load(_write(tmp_path, value))


def test_without_a_pad_token_eos_pads(tmp_path):
  value = _golden()
  value["added_tokens"][2]["content"] = "<renamed>"
  tokenizer = Tokenizer.load(_write(tmp_path, value))
  assert tokenizer.pad == tokenizer.eos == 1001


def test_config_may_name_bos_and_eos(tmp_path):
  value = _golden()
  value["added_tokens"][0]["content"], value["added_tokens"][1]["content"] = "<s>", "</s>"
  value["post_processor"] = None
  config = json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
  tokenizer = Tokenizer.load(_write(tmp_path, value, config))
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1000, 1001, 1002)


@pytest.mark.parametrize("config", ["{", "[]"])
def test_broken_config_is_refused(tmp_path, config):
  with pytest.raises(UserError, match=str(tmp_path)):
    Tokenizer.load(_write(tmp_path, _golden(), config))


def test_missing_and_oversized_files_are_refused(tmp_path):
  with pytest.raises(UserError, match="not found"):
    Tokenizer.load(tmp_path)
  with open(tmp_path / "tokenizer.json", "wb") as file:
    file.truncate(50 * 2**20)
  with pytest.raises(UserError, match="too large"):
    Tokenizer.load(tmp_path)


def test_training_depends_on_the_texts_alone():
  texts = ["a red circle and a blue star 123"] * 3 + ["two stars"] * 2
  first, second = (tokenizer_lib.train(list(texts), 273) for _ in range(2))
  assert first._files == second._files
  assert first.vocabulary_size == 273
  assert first.bos == 266  # the special tokens are the last ids
  assert first.encode("12") != first.encode("1") and len(first.encode("123")) == 3  # digits stand alone
  with pytest.raises(UserError, match="at least 263"):
    tokenizer_lib.train(texts, 200)


def test_shipped_tokenizer_fits_the_small_configs():
  tokenizer = Tokenizer.load(SHIPPED)
  assert tokenizer.vocabulary_size == 1024
  for word in (" red", " circle", " stars", " yes", " left"):
    assert len(tokenizer.encode(word)) == 1
