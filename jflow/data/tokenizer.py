"""The tokenizer: a `tokenizer.json` whose special tokens are looked up by name, never by number."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jflow.errors import UserError

# Names of the special tokens in the release's tokenizer.json.
SPECIAL_TOKENS = {
  "bos": "<｜begin▁of▁sentence｜>",
  "eos": "<｜end▁of▁sentence｜>",
  "pad": "<｜▁pad▁｜>",
  "image": "<image_placeholder>",
  "image_start": "<begin_of_image>",
  "image_end": "<end_of_image>",
  "generation_start": "<｜begin▁of▁generation｜>",
}

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# The release's file has 4.6 MB; the largest vocabularies in use have 35 MB.
_MAX_FILE_BYTES = 48 * 2**20


class Tokenizer:
  """Text to ids and back. Picklable.

  Text never turns into special ids: a user who writes "<image_placeholder>" gets the ids of those letters.
  The callers put the special ids in.

  Attributes:
    bos, eos, pad, image, image_start, image_end, generation_start: ids of the special tokens.
    vocabulary_size: the largest id + 1; an embedding table needs at least that many rows.
    fingerprint: hash of the files.
  """

  bos: int
  eos: int
  pad: int
  image: int
  image_start: int
  image_end: int
  generation_start: int
  vocabulary_size: int
  fingerprint: str

  def __init__(self, files: dict[str, bytes], origin: str):
    """Builds the tokenizer from the contents of its files; `origin` names them in messages. See `load`."""
    self._files = files
    self._origin = origin
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
      config = json.loads(files.get("tokenizer_config.json", b"{}"))
      vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
      raise UserError(f"{origin}: not a readable tokenizer ({_one_line(error)})") from None
    if not isinstance(config, dict):
      raise UserError(f"{origin}: tokenizer_config.json should hold an object")
    if len(set(vocabulary.values())) != len(vocabulary):
      raise UserError(f"{origin}: tokenizer.json gives the same id to two tokens")
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.fingerprint = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    self.vocabulary_size = max(vocabulary.values()) + 1
    for attribute, name in SPECIAL_TOKENS.items():
      setattr(self, attribute, _special_id(vocabulary, config, attribute, name, origin))

  @classmethod
  def load(cls, directory: str) -> "Tokenizer":
    """Reads `tokenizer.json` (and `tokenizer_config.json` where it exists) from a directory.

    Raises:
      UserError: a file is missing, broken or too large, or a special token is missing.
    """
    directory = os.fspath(directory)
    path = os.path.join(directory, "tokenizer.json")
    if not os.path.isfile(path):
      raise UserError(f"{path} not found: the tokenizer is a directory that holds a tokenizer.json")
    files = {}
    for name in _FILES:
      path = os.path.join(directory, name)
      if os.path.isfile(path):
        if os.path.getsize(path) > _MAX_FILE_BYTES:
          raise UserError(f"{path} has {os.path.getsize(path):,} bytes: too large for a tokenizer")
        with open(path, "rb") as file:
          files[name] = file.read()
    return cls(files, directory)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without BOS and without special ids.

    Raises:
      UserError: the text holds a lone surrogate and so is not valid Unicode.
    """
    try:
      return self._tokenizer.encode(text, add_special_tokens=False).ids
    except (UnicodeEncodeError, TypeError):
      raise UserError(f"not valid Unicode text: {text[:40]!r}") from None

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of `ids`, special tokens left out; incomplete UTF-8 becomes U+FFFD."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def check_fits(self, vocabulary_size: int) -> None:
    """Raises UserError where the tokenizer has ids that a model of this vocabulary lacks."""
    if self.vocabulary_size > vocabulary_size:
      raise UserError(
        f"{self._origin} has ids up to {self.vocabulary_size - 1}, the model's vocabulary {vocabulary_size} "
        "(model.language_model.vocabulary_size): they belong to different models"
      )

  def save(self, directory: str) -> None:
    """Writes the files of the tokenizer, byte for byte as they were read."""
    os.makedirs(directory, exist_ok=True)
    for name, content in self._files.items():
      with open(os.path.join(directory, name), "wb") as file:
        file.write(content)

  def __reduce__(self):
    # The library's own pickling forgets `encode_special_tokens`.
    return Tokenizer, (self._files, self._origin)


def train(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
  """Trains a byte-level BPE with the release's special tokens, which take the last ids.

  Every byte is in the alphabet, so that any text survives encode and decode. Digits stand alone. The result
  depends on the texts alone, and holds fewer ids where the texts run out of pairs.

  Args:
    texts: the corpus.
    vocabulary_size: ids in all, at least 256 bytes + 7 special tokens.
  """
  if vocabulary_size < 256 + len(SPECIAL_TOKENS):
    raise UserError(
      f"a byte-level vocabulary needs at least {256 + len(SPECIAL_TOKENS)} ids: {vocabulary_size}"
    )
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


def _special_id(vocabulary: dict[str, int], config: dict, attribute: str, name: str, origin: str) -> int:
  """Returns the id of one special token.

  bos and eos: tokenizer_config.json may name other tokens. pad: the release's name comes first, since its
  tokenizer_config.json names EOS; a tokenizer without any pads with EOS (no padding is ever read).
  """
  named = config.get(f"{attribute}_token")
  if isinstance(named, dict):
    named = named.get("content")
  candidates = {"bos": (named, name), "eos": (named, name)}.get(attribute, (name, named))
  if attribute == "pad":
    candidates += (config.get("eos_token"), SPECIAL_TOKENS["eos"])
  for candidate in candidates:
    if isinstance(candidate, str) and candidate in vocabulary:
      return vocabulary[candidate]
  raise UserError(f"{origin}: the tokenizer has no {name} token ({attribute}); JanusFlow needs it")


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())[:160]
