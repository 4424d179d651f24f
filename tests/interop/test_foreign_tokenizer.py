"""Tokenizers from before tokenizer.json: transformers' conversion, compared with the one that the files came from."""

import json
import pathlib

import pytest
import tokenizers
from refusals import refused
from tokenizers import decoders, models, pre_tokenizers, trainers

from jflow.errors import UserError
from jflow.interop import foreign_tokenizer

TEXTS = ["the red ring and the blue square"] * 9
END = "<|endoftext|>"
CONFIG = {"tokenizer_class": "GPT2Tokenizer", "bos_token": END, "eos_token": END, "unk_token": END}


@pytest.fixture
def byte_level(tmp_path) -> tuple[pathlib.Path, tokenizers.Tokenizer]:
  """A folder with vocab.json and merges.txt, and the tokenizer that they are of."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  made.train_from_iterator(
    TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[END], show_progress=False)
  )
  folder = tmp_path / "llm"
  folder.mkdir()
  made.model.save(str(folder))
  (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
  return folder, made


def test_a_vocabulary_and_its_merges_give_the_same_ids(byte_level):
  folder, made = byte_level
  files = foreign_tokenizer.read(folder)
  read = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
  for text in ("the red ring", " a Blue  square\n", "weiß 世界 🙂"):
    assert read.encode(text, add_special_tokens=False).ids == made.encode(text).ids
  assert json.loads(files["tokenizer_config.json"]) == CONFIG
  assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize(
  "change, part",
  [
    ({"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "MyTokenizer"),
    ({"tokenizer_class": None}, "tokenizer_class"),
    ({"tokenizer_class": ["GPT2Tokenizer"]}, "tokenizer_class"),
  ],
)
def test_another_class_is_refused(byte_level, change, part):
  folder, _ = byte_level
  (folder / "evil.py").write_text("raise SystemExit('run')")
  (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG | change))
  with refused(part):
    foreign_tokenizer.read(folder)


@pytest.mark.parametrize("file, content", [("vocab.json", "{"), ("vocab.json", '{"a": "b"}'), ("merges.txt", "\0\n\n")])
def test_a_damaged_vocabulary_is_one_line(byte_level, file, content):
  folder, _ = byte_level
  (folder / file).write_text(content)
  with pytest.raises(UserError) as caught:
    foreign_tokenizer.read(folder)
  assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_with_neither_says_what_is_missing(tmp_path):
  with refused("tokenizer.json"):
    foreign_tokenizer.read(tmp_path)
