"""The tokenizer of a foreign LLM: its tokenizer.json, or one converted by transformers from older files."""

import os
import pathlib
import tempfile

from jflow import strict_json
from jflow.data.tokenizer import read_files
from jflow.errors import UserError
from jflow.strict_json import shown

_VOCABULARIES = ("tokenizer.model", "vocab.json")  # of sentencepiece; of BPE, with merges.txt
_READ = (*_VOCABULARIES, "merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
_CLASSES = ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer")  # of transformers; also with Fast at the end
_MOST = 48 * 2**20  # bytes of a file


def read(directory: pathlib.Path) -> dict[str, bytes]:
  """The contents of a tokenizer's files by name, as from `jflow.data.tokenizer.read_files`.

  Where there is no tokenizer.json, transformers makes one in a temporary folder with the files above only, so that it
  finds neither code nor a pickle there.

  Raises:
    UserError: see `read_files`; or the tokenizer's class is not supported, or its files cannot be read.
  """
  if (directory / "tokenizer.json").is_file() or not any((directory / name).is_file() for name in _VOCABULARIES):
    return read_files(str(directory))
  path = directory / "tokenizer_config.json"
  named = strict_json.read_object(path).get("tokenizer_class")
  if type(named) is not str or named.removesuffix("Fast") not in _CLASSES:
    raise UserError(
      f"{path}: tokenizer_class={shown(named)} is not supported without a tokenizer.json, only {', '.join(_CLASSES)}"
    )
  with tempfile.TemporaryDirectory(prefix="jflow-tokenizer-") as name:
    folder = pathlib.Path(name)
    for file in _READ:
      if (directory / file).is_file():
        (folder / file).write_bytes(strict_json.read_bytes(directory / file, _MOST))
    (folder / "tokenizer.json").write_bytes(_converted(folder, directory))
    return read_files(os.fspath(folder))


def _converted(folder: pathlib.Path, directory: pathlib.Path) -> bytes:
  """The tokenizer.json converted from the older files in a folder; `directory` is named in messages."""
  from transformers import AutoTokenizer

  try:
    made = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True, trust_remote_code=False)
    return made.backend_tokenizer.to_str().encode("utf-8")
  except Exception as error:  # of many libraries
    reason = " ".join(str(error).replace(str(folder), str(directory)).split())[:160] or type(error).__name__
    raise UserError(f"{directory} has no tokenizer.json, and transformers cannot make one ({reason})") from None
