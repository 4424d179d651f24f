"""The tokenizer: a `tokenizer.json`, whose special tokens are looked up by name, never by id."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jflow import strict_json
from jflow.data import tokenizer_file
from jflow.errors import UserError, one_line
from jflow.files import write_bytes
from jflow.strict_json import shown

# Names of the special tokens in the release's tokenizer.json.
SPECIAL_TOKENS = {
  "bos": "<｜begin▁of▁sentence｜>",
  "eos": "<｜end▁of▁sentence｜>",
  "pad": "<｜▁pad▁｜>",
  "image": "<image_placeholder>",
  "image_start": "<begin_of_image>",
  "image_end": "<end_of_image>",
  "generation_start": "<｜begin▁of▁generation｜>",  # JanusFlow's alone
}
# Special tokens of Janus-Pro's tokenizer.json besides.
SPEAKERS = {"user": "<|User|>", "assistant": "<|Assistant|>"}
# Those that only some models need, see `Tokenizer.need`. No image mark: another id serves, as none is looked up.
_OPTIONAL = ("pad", "image", "generation_start", *SPEAKERS)

# Words, numbers, spaces and other scripts, which the rules of tokenizers cut differently.
_PROBE = " It's 2024:  Ein Häuschen,\tUNDER_score 12345.67\n\n你好，世界! naïve e\u0301 🙂 "
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# The release's file has 4.6 MB; the largest vocabularies in use have 35 MB.
_MAX_FILE_BYTES = 48 * 2**20


class Tokenizer:
  """A tokenizer from text to ids and back. Picklable.

  Text is never encoded to special ids: "<image_placeholder>" in a user's text becomes the ids of its letters. Callers
  insert the special ids.

  Attributes:
    bos, eos, pad, image, image_start, image_end: ids of the special tokens. Without a pad token `pad` is EOS, which
      serves only where no padding is read (`need` refuses a pad that is another special token); without an image mark
      `image` is the first id behind the others.
    generation_start, user, assistant: ids of special tokens that some models have; None: this one has not.
    vocabulary_size: the largest id + 1; an embedding table needs at least that many rows.
    files: name -> contents, of what it was loaded from.
    fingerprint: hash of the files.
  """

  bos: int
  eos: int
  pad: int
  image: int
  image_start: int
  image_end: int
  generation_start: int | None
  user: int | None
  assistant: int | None
  vocabulary_size: int
  files: dict[str, bytes]
  fingerprint: str

  def __init__(self, files: dict[str, bytes], origin: str, checked: bool = False):
    """Builds the tokenizer from the contents of its files; see `load`.

    Args:
      files: name -> contents.
      origin: names them in messages.
      checked: whether a tokenizer was already built from them.
    """
    self.files = files
    self._origin = origin
    added = [] if checked else tokenizer_file.check(files["tokenizer.json"], origin).get("added_tokens") or []
    config, other = (_settings(files, name, origin) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    self._tokenizer = build(files["tokenizer.json"], origin)
    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    if len(set(vocabulary.values())) != len(vocabulary):
      raise UserError(f"{origin}: tokenizer.json gives the same id to two tokens")
    _check_added(vocabulary, added, config, origin)
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.fingerprint = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    self.vocabulary_size = max(vocabulary.values()) + 1
    self._lacks: dict[str, str] = {}  # attribute -> the token that is not there
    for attribute, name in (SPECIAL_TOKENS | SPEAKERS).items():
      token = _special_token(vocabulary, config, other, attribute, name, origin)
      setattr(self, attribute, None if token is None else vocabulary[token])
      if token is None:
        self._lacks[attribute] = name
        continue
      if vocabulary[token] in self.encode(token):  # the file does not mark it as special
        with _native(f"{origin}: {shown(token)} cannot be made a special token"):
          self._tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
        if vocabulary[token] in self.encode(token) or self._tokenizer.token_to_id(token) != vocabulary[token]:
          raise UserError(f"{origin}: any text can spell {token}: tokenizer.json must hold it as a special token")
    if self.image is None:
      self.image, self.vocabulary_size = self.vocabulary_size, self.vocabulary_size + 1
    if self.pad is None:
      self.pad = self.eos
    if self.pad in (getattr(self, attribute) for attribute in SPECIAL_TOKENS | SPEAKERS if attribute != "pad"):
      self._lacks["pad"] = SPECIAL_TOKENS["pad"]

  @classmethod
  def load(cls, directory: str) -> "Tokenizer":
    """Reads `tokenizer.json` (and `tokenizer_config.json` where it exists) from a directory.

    Raises:
      UserError: a file is missing, broken or too large, a special token is missing, or encoding could take unlimited
        time or memory.
    """
    directory = os.fspath(directory)
    tokenizer = cls(read_files(directory), directory)
    path = os.path.join(directory, "added_tokens.json")  # formats older than tokenizer.json
    for content, i in (strict_json.read_object(path) if os.path.exists(path) else {}).items():
      if (has := tokenizer._tokenizer.token_to_id(content)) != i:
        raise UserError(f"{path} gives {shown(content)} the id {shown(i)}, and tokenizer.json has {has}")
    return tokenizer

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without BOS and without special ids.

    Raises:
      UserError: the text holds a lone surrogate and so is not valid Unicode.
    """
    try:
      with _native(f"{self._origin}: the tokenizer cannot read {shown(text)}"):
        return self._tokenizer.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError):
      raise UserError(f"not valid Unicode text: {text[:40]!r}") from None

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, special tokens left out; incomplete UTF-8 becomes U+FFFD."""
    with _native(f"{self._origin}: the tokenizer cannot write the ids {shown(list(ids[:20]))}"):
      return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def need(self, who: str, *attributes: str) -> None:
    """Raises UserError where the tokenizer lacks a special token that `who` needs."""
    for attribute in attributes:
      if name := self._lacks.get(attribute):
        raise UserError(f"{self._origin}: the tokenizer has no {name} token ({attribute}), which {who} needs")

  def check_fits(self, vocabulary_size: int) -> None:
    """Raises UserError where the tokenizer has ids that a model of this vocabulary lacks."""
    if self.vocabulary_size > vocabulary_size:
      raise UserError(
        f"{self._origin} has ids up to {self.vocabulary_size - 1}, the model's vocabulary {vocabulary_size} "
        "(model.language_model.vocab_size): they belong to different models"
      )

  def reading(self) -> str:
    """Returns a hash of what the ids mean: vocabulary, special tokens, and the ids of a text, in any form of the
    files."""
    special = [getattr(self, attribute) for attribute in SPECIAL_TOKENS | SPEAKERS]
    vocabulary = sorted(self._tokenizer.get_vocab(with_added_tokens=True).items())
    told = json.dumps([vocabulary, special, self.encode(_PROBE)])
    return hashlib.sha256(told.encode()).hexdigest()

  def settings(self) -> dict[str, Any]:
    """The contents of tokenizer_config.json; empty where there is none."""
    return _settings(self.files, "tokenizer_config.json", self._origin)

  def save(self, directory: str | os.PathLike[str]) -> None:
    """Writes the files of the tokenizer byte for byte."""
    os.makedirs(directory, exist_ok=True)
    for name, content in self.files.items():
      write_bytes(os.path.join(directory, name), content)

  def __reduce__(self):
    # The library's own pickling forgets `encode_special_tokens`.
    return Tokenizer, (self.files, self._origin, True)


@contextlib.contextmanager
def _native(what: str) -> Iterator[None]:
  """Context manager around a call of the library, which raises bare Exception, or BaseException for a panic.

  Raises:
    UserError: any such error, with `what` and the library's reason.
    UnicodeEncodeError, TypeError: of the arguments.
  """
  try:
    yield
  except (UnicodeEncodeError, TypeError, KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:
    raise UserError(f"{what} ({one_line(error)})") from None


def read_files(directory: str) -> dict[str, bytes]:
  """Reads the files of a tokenizer into {name: contents}.

  Raises:
    UserError: there is no tokenizer.json, a file is too large or cannot be read, or another file contradicts it.
  """
  path = os.path.join(directory, "tokenizer.json")
  if not os.path.isfile(path):
    found = sorted(p.name for p in pathlib.Path(directory).glob("*.model"))
    raise UserError(
      f"{path} not found: {found[0]} beside it is a sentencepiece model, which transformers' AutoTokenizer turns "
      "into a tokenizer.json (save_pretrained)"
      if found
      else f"{path} not found: the tokenizer is a directory that holds a tokenizer.json"
    )
  files = {}
  for name in _FILES:
    path = os.path.join(directory, name)
    if os.path.exists(path):
      if os.path.getsize(path) > _MAX_FILE_BYTES:
        raise UserError(f"{path} has {os.path.getsize(path):,} bytes: too large for a tokenizer")
      files[name] = strict_json.read_bytes(path, _MAX_FILE_BYTES)
  return files


def build(content: bytes, origin: str) -> tokenizers.Tokenizer:
  """Builds the library's tokenizer from a tokenizer.json that `tokenizer_file.check` has accepted.

  Raises:
    UserError: the library refuses it.
  """
  with _native(f"{origin}: not a readable tokenizer"):
    return tokenizers.Tokenizer.from_str(content.decode("utf-8"))


def _settings(files: dict[str, bytes], name: str, origin: str) -> dict[str, Any]:
  """Returns the object in a file beside tokenizer.json; empty where the file is missing."""
  try:
    value = strict_json.parse(files.get(name, b"{}"))
  except strict_json.Malformed as error:
    raise UserError(f"{origin}: {name} cannot be read: {error}") from None
  if not isinstance(value, dict):
    raise UserError(f"{origin}: {name} must hold an object")
  if value.get("auto_map") is not None or value.get("trust_remote_code"):
    raise UserError(f"{origin}: {name} asks to run Python code that came with it (auto_map), which jflow never does")
  return value


def _check_added(vocabulary: dict[str, int], added: list[Any], config: dict[str, Any], origin: str) -> None:
  """Checks that each added token has the id that the files give it, since the library may renumber some."""
  told = [("tokenizer.json: added_tokens", token["content"], token["id"]) for token in added]
  decoder = config.get("added_tokens_decoder")
  for i, token in decoder.items() if isinstance(decoder, dict) else ():
    content = token.get("content") if isinstance(token, dict) else token
    told.append(
      ("tokenizer_config.json: added_tokens_decoder", content, int(i) if i.isdecimal() and len(i) < 12 else i)
    )
  for where, content, i in told:
    if type(content) is not str or vocabulary.get(content) != i:
      has = vocabulary.get(content) if type(content) is str else None
      raise UserError(f"{origin}: {where} gives {shown(content)} the id {shown(i)}, and the tokenizer has {has}")


def train(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
  """Trains a byte-level BPE with the release's special tokens, which take the last ids.

  Every byte is in the alphabet, so that any text survives encode and decode. Every digit is a token.
  The result depends only on the texts, and has fewer ids where the texts run out of pairs.

  Args:
    texts: the corpus.
    vocabulary_size: ids in all, at least 256 bytes + 7 special tokens.
  """
  if vocabulary_size < 256 + len(SPECIAL_TOKENS):
    raise UserError(f"a byte-level vocabulary needs at least {256 + len(SPECIAL_TOKENS)} ids: {vocabulary_size}")
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex("[\r\n]"), "isolated"),
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
    min_frequency=2,
    show_progress=False,
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.add_special_tokens(
    [tokenizers.AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS.values()]
  )
  bos = SPECIAL_TOKENS["bos"]
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
  )
  config = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": bos,
    "eos_token": SPECIAL_TOKENS["eos"],
    "pad_token": SPECIAL_TOKENS["pad"],
    "model_max_length": 4096,
    "tokenizer_class": "LlamaTokenizerFast",
    "legacy": True,
  }
  files = {
    "tokenizer.json": (tokenizer.to_str(pretty=True) + "\n").encode("utf-8"),
    "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=1) + "\n").encode("utf-8"),
  }
  return Tokenizer(files, "the trained tokenizer")


def _special_token(
  vocabulary: dict[str, int],
  config: dict[str, Any],
  other: dict[str, Any],
  attribute: str,
  name: str,
  origin: str,
) -> str | None:
  """Returns the name of a special token; None where an optional one is missing.

  bos and eos: tokenizer_config.json or special_tokens_map.json may name other tokens. pad: so, too, but the release's
  name comes first, since its tokenizer_config.json names EOS.
  """
  settings = {"tokenizer_config.json": config, "special_tokens_map.json": other}
  named, also = (_named(values, f"{attribute}_token", f"{origin}: {file}") for file, values in settings.items())
  if attribute in ("bos", "eos") and named and also and named != also:
    raise UserError(
      f"{origin}: {attribute}_token is {shown(named)} in tokenizer_config.json, {shown(also)} in special_tokens_map.json"
    )
  named = named or also
  if attribute in ("bos", "eos") and named and named not in vocabulary:
    raise UserError(f"{origin}: {attribute}_token={shown(named)} is none of the tokens of tokenizer.json")
  for candidate in (named, name) if attribute in ("bos", "eos") else (name, named, also):
    if isinstance(candidate, str) and candidate in vocabulary:
      return candidate
  if attribute in _OPTIONAL:
    return None
  raise UserError(f"{origin}: the tokenizer has no {name} token ({attribute}), which every model needs")


def _named(values: dict[str, Any], field: str, where: str) -> str | None:
  """Returns a token of a settings file, given as a text or as an object with its content."""
  token = values.get(field)
  content = token.get("content") if isinstance(token, dict) else token
  if content is not None and type(content) is not str:
    raise UserError(f"{where}: {field}={shown(token)} must be a token")
  return content
