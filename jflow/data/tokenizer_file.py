"""Checks of an untrusted tokenizer.json before the native library reads it.

The library accepts an expression that takes hours to match, a replacement that turns a line into a gigabyte, merges
that are dropped at random, and ids that it renumbers. All of these are refused here, with their place in the file.
"""

import base64
import math
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from jflow.errors import UserError
from jflow.strict_json import Malformed, parse, shown

_SECTIONS = (
  "version",
  "truncation",
  "padding",
  "added_tokens",
  "normalizer",
  "pre_tokenizer",
  "post_processor",
  "decoder",
  "model",
)
_PARTS = {
  "normalizer": """BertNormalizer ByteLevel Lowercase NFC NFD NFKC NFKD Nmt Precompiled Prepend Replace Sequence Strip
    StripAccents""",
  "pre_tokenizer": """BertPreTokenizer ByteLevel CharDelimiterSplit Digits FixedLength Metaspace Punctuation Sequence
    Split UnicodeScripts Whitespace WhitespaceSplit""",
  "post_processor": "BertProcessing ByteLevel RobertaProcessing Sequence TemplateProcessing",
  "decoder": "BPEDecoder ByteFallback ByteLevel CTC Fuse Metaspace Replace Sequence Strip WordPiece",
}
_CHILDREN = {
  "normalizer": "normalizers",
  "pre_tokenizer": "pretokenizers",
  "post_processor": "processors",
  "decoder": "decoders",
}
_MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")
_MOST_PARTS = 64  # of a section
_MOST_IDS = 2**31
_LONGEST = 64  # characters that one character may become
_PATTERN = 4096  # characters of an expression
_REPEATS = 1000  # of an atom, where they are counted
_LOOPS = 4  # in one alternative of an expression


def check(content: bytes, origin: str) -> dict[str, Any]:
  """Checks a tokenizer.json.

  Args:
    content: of the file.
    origin: its directory, for messages.

  Returns:
    Its value.

  Raises:
    UserError: a section holds something that is refused; the message names both.
  """
  where = f"{origin}: not a readable tokenizer (tokenizer.json: "
  try:
    value = parse(content)
  except Malformed as error:
    raise UserError(f"{where}{error})") from None
  if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
    raise UserError(f"{where}it must be an object with a model)")
  try:
    unknown = [name for name in value if name not in _SECTIONS and value[name] is not None]
    if unknown:
      raise ValueError(f"the section {shown(unknown[0])} is unknown")
    ids = _model_ids(value["model"])
    _check_added(value.get("added_tokens") or [], ids)
    for section in _PARTS:
      if value.get(section) is not None:
        parts = list(_walk(section, value[section]))
        if len(parts) > _MOST_PARTS:
          raise ValueError(f"{section} has {len(parts)} parts, at most {_MOST_PARTS} are read")
        growth = math.prod(_growth(section, part) for part in parts)
        if growth > _LONGEST:
          raise ValueError(f"{section} makes up to {growth} characters of one, at most {_LONGEST} are allowed")
  except ValueError as error:
    raise UserError(f"{where}{error})") from None
  return value


def _model_ids(model: Mapping[str, Any]) -> Mapping[str, int]:
  """Token -> id of the model, checked; of a Unigram, whose ids are the places in a list, likewise."""
  kind = model.get("type", "BPE")
  if kind not in _MODELS:
    raise ValueError(f"model.type={shown(kind)} must be one of {', '.join(_MODELS)}")
  if model.get("dropout"):
    raise ValueError(f"model.dropout={shown(model['dropout'])} would read the same text differently each time")
  vocabulary = model.get("vocab")
  if isinstance(vocabulary, list):
    pairs = all(isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is str for pair in vocabulary)
    if not pairs:
      raise ValueError("model.vocab must hold pairs of a token and a score")
    ids = {pair[0]: i for i, pair in enumerate(vocabulary)}
    if len(ids) != len(vocabulary):
      raise ValueError("model.vocab names a token twice")
    return ids
  if not isinstance(vocabulary, dict):
    raise ValueError("model.vocab must be an object of ids")
  wrong = next((token for token, i in vocabulary.items() if type(i) is not int or not 0 <= i < _MOST_IDS), None)
  if wrong is not None:
    raise ValueError(
      f"model.vocab: the id of {shown(wrong)} must be in 0..{_MOST_IDS - 1}, got {shown(vocabulary[wrong])}"
    )
  return vocabulary


def _check_added(tokens: Any, ids: Mapping[str, int]) -> None:
  if not isinstance(tokens, list):
    raise ValueError("added_tokens must be a list")
  taken = {i: token for token, i in ids.items()}
  for token in tokens:
    content, i = (token.get("content"), token.get("id")) if isinstance(token, dict) else (None, None)
    if type(content) is not str or not content or type(i) is not int or not 0 <= i < _MOST_IDS:
      raise ValueError(f"added_tokens: {shown(token)} must have a content and an id in 0..{_MOST_IDS - 1}")
    if taken.get(i, content) != content or ids.get(content, i) != i:
      raise ValueError(
        f"added_tokens: {shown(content)} has the id {i}, which the same id gives to two tokens or to it another"
      )
    taken[i] = content


def _walk(section: str, value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
  """Returns the parts of a section, with its sequences flattened, each of a known type."""
  if not isinstance(value, dict) or value.get("type") not in _PARTS[section].split():
    kind = value.get("type") if isinstance(value, dict) else value
    raise ValueError(f"{section}: the type {shown(kind)} is unknown")
  if depth > 4:
    raise ValueError(f"{section} is nested too deep")
  yield value
  if value["type"] == "Sequence":
    children = value.get(_CHILDREN[section])
    if not isinstance(children, list):
      raise ValueError(f"{section}: a Sequence must have a list of {_CHILDREN[section]}")
    for child in children:
      yield from _walk(section, child, depth + 1)


def _growth(section: str, part: Mapping[str, Any]) -> int:
  """Checks the settings of a part and returns the most characters that it makes of one."""
  kind, pattern, content = part["type"], part.get("pattern"), part.get("content")
  if kind in ("Replace", "Split"):
    if not isinstance(pattern, dict) or len(pattern) != 1 or not all(type(x) is str for x in pattern.values()):
      raise ValueError(f"{section}: {kind}.pattern={shown(pattern)} must be a String or a Regex")
    if "Regex" in pattern and (why := _costly(pattern["Regex"])):
      raise ValueError(f"{section}: {kind}.pattern={shown(pattern['Regex'])} {why}")
  if kind == "Replace":
    if type(content) is not str:
      raise ValueError(f"{section}: Replace.content={shown(content)} must be a text")
    return max(1, -(-len(content) // max(1, len(pattern.get("String", "")))))
  if kind == "Prepend" and not (type(part.get("prepend")) is str and len(part["prepend"]) <= _LONGEST):
    raise ValueError(
      f"{section}: Prepend.prepend={shown(part.get('prepend'))} must be a text of at most {_LONGEST} characters"
    )
  if kind == "FixedLength" and not (type(part.get("length")) is int and 1 <= part["length"] <= 2**16):
    raise ValueError(f"{section}: FixedLength.length={shown(part.get('length'))} must be a positive number")
  if kind == "Strip" and section == "decoder":
    for name in ("start", "stop"):
      if not (type(part.get(name)) is int and 0 <= part[name] <= _LONGEST):
        raise ValueError(f"{section}: Strip.{name}={shown(part.get(name))} must be in 0..{_LONGEST}")
  if kind == "Precompiled" and _longest_of_charsmap(part.get("precompiled_charsmap")) > 4 * _LONGEST:
    raise ValueError(f"{section}: Precompiled makes more than {_LONGEST} characters of one")
  return 1


def _longest_of_charsmap(charsmap: Any) -> int:
  """Bytes of the longest text in sentencepiece's compiled table: the size of a trie, the trie, 0-terminated texts."""
  try:
    table = base64.b64decode(charsmap or "", validate=True)
    texts = table[4 + struct.unpack("<I", table[:4])[0] :] if table else b""
  except (TypeError, ValueError, struct.error):
    raise ValueError("normalizer: Precompiled.precompiled_charsmap is damaged") from None
  return max(map(len, texts.split(b"\0")))


def _costly(pattern: str) -> str | None:
  """Returns why matching an expression could take more than linear time, or None.

  Expressions of published tokenizers repeat only single characters and classes. Repetition of a group, or of a
  repetition, can make matching time double with each character, and multiply the memory of compilation.
  """
  if len(pattern) > _PATTERN:
    return f"has {len(pattern)} characters, at most {_PATTERN} are read"
  loops = [0]  # of the alternative at hand, per open group
  most = [0]
  before, i = "", 0
  while i < len(pattern):
    c, rest = pattern[i], pattern[i:]
    if c == "\\":
      if re.match(r"\\[gk<1-9]", rest):
        return "refers to another part of itself"
      found = re.match(r"\\(?:[pPxuo]\{[^{}]*\}|.)", rest, re.DOTALL)
      before, i = "atom", i + (len(found[0]) if found else 1)
    elif c == "[":
      before, i = "atom", _end_of_class(pattern, i)
    elif c == "(":
      if rest.startswith(("(?~", "(?(", "(?{")):
        return "has a group of an unknown kind"
      loops.append(0)
      most.append(0)
      if len(loops) > 16:
        return "is nested too deep"
      head = re.match(r"\((?:\?(?:<?[=!]|<\w*>|[>:]|[a-zA-Z-]*[:)]?))?", rest)
      if head[0].endswith(")"):  # only flags
        loops.pop(), most.pop()
      before, i = "", i + len(head[0])
    elif c == ")":
      inside = max(most.pop(), loops.pop()) if len(loops) > 1 else 0
      loops[-1] += inside
      before, i = "group", i + 1
    elif c == "|":
      most[-1], loops[-1] = max(most[-1], loops[-1]), 0
      before, i = "", i + 1
    elif c in "*+?" or re.match(r"\{\d*,?\d*\}", rest):
      counted = re.match(r"\{(\d*)(,?)(\d*)\}", rest)
      if before == "quantifier" and c in "+?":  # possessive or lazy
        before, i = "", i + 1
        continue
      if before == "quantifier" or (before == "group" and c != "?"):
        return "repeats a group, or what is repeated already"
      if counted and any(len(n) > 6 or int(n or 0) > _REPEATS for n in (counted[1], counted[3])):
        return f"repeats more than {_REPEATS} times"
      if c in "*+" or (counted and counted[2] and not counted[3]):
        loops[-1] += 1
      before, i = "quantifier", i + (len(counted[0]) if counted else 1)
    else:
      before, i = "atom", i + 1
    if loops[-1] > _LOOPS:
      return f"has more than {_LOOPS} endless repeats in one alternative"
  return None


def _end_of_class(pattern: str, start: int) -> int:
  """Returns the end of the character class that begins at `start`; classes nest."""
  depth, i = 0, start
  while i < len(pattern):
    if pattern[i] == "\\":
      i += 1
    elif pattern[i] == "[":
      depth += 1
      if pattern[i + 1 : i + 2] == "]" or pattern[i + 1 : i + 3] == "^]":  # a bracket at the beginning is itself
        i += 2 if pattern[i + 1] == "^" else 1
    elif pattern[i] == "]":
      depth -= 1
      if not depth:
        return i + 1
    i += 1
  return i
