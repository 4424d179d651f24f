"""The command-line parser: errors of one line, and bounded numbers.

A number beyond any machine (10**30 pictures) or one that is not finite ends a command before anything is read.
"""

import argparse
import difflib
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

SEED = 2**63 - 1  # largest seed; each use has its own, closer bound
_DIGITS = 25  # of the longest integer that is parsed


class Parser(argparse.ArgumentParser):
  """argparse's parser without the usage before an error."""

  _given: Sequence[str] = ()

  def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
    self._given = args = list(sys.argv[1:] if args is None else args)
    for flag, equals, value in (one.partition("=") for one in args):
      if flag.startswith("-") and equals and value == "--":  # argparse would take it for the end of the flags
        self.error(f"argument {flag}: expected one argument")
    return super().parse_known_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    """Ends with code 2; a value refused by a type below is shown as --FLAG=VALUE, like in all other errors."""
    if (found := re.match(r"argument (\S+): (\S+) must be ", message)) and "=".join(found.groups()) in self._given:
      message = message.removeprefix("argument ").replace(": ", "=", 1)
    message = self._meant() or message
    told = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in message)
    self.exit(2, f"jflow: error: {told if len(told) <= 600 else told[:600] + '...'}; see {self.prog} --help\n")

  def _meant(self) -> str:
    """A line about the first flag that there is none of and one that is near; empty without such a flag."""
    known = [flag for flag in self._option_string_actions if flag.startswith("--")]
    for flag in (one.partition("=")[0] for one in self._given if one.startswith("--")):
      abbreviates = self.allow_abbrev and any(one.startswith(flag) for one in known)
      if flag in known or abbreviates or "." in flag:  # a field of a config
        continue
      if near := difflib.get_close_matches(flag[:100], known, n=1, cutoff=0.75):
        return f"unknown argument {flag[:100]}: did you mean {near[0]}?"
    return ""


def whole(least: int | None = None, most: int = 10**9) -> Callable[[str], int]:
  """An argparse type: an integer of at most `most` and at least `least`; None leaves that check to the command."""

  def read(text: str) -> int:
    if not re.fullmatch(r"\s*[+-]?[0-9](_?[0-9])*\s*", text):
      raise ValueError
    digits = text.strip().lstrip("+-").replace("_", "").lstrip("0")
    number = int(text) if len(digits) <= _DIGITS else 10**_DIGITS * (-1 if "-" in text else 1)
    return _within(number, text, least, most)

  read.__name__ = "int"  # for argparse's message, "invalid int value"
  return read


def number(least: float | None = None, most: float = 1e9) -> Callable[[str], float]:
  """An argparse type: a finite number of at most `most` and at least `least`; None leaves that check to the command."""

  def read(text: str) -> float:
    found = float(text) if text.isascii() else float("")  # the error of any other invalid text
    if not math.isfinite(found):
      raise argparse.ArgumentTypeError(f"{_short(text)} must be a finite number")
    return _within(found, text, least, most)

  read.__name__ = "float"
  return read


def listed(kind: Callable[[str], Any]) -> Callable[[str], list]:
  """An argparse type: a comma-separated list of values of type `kind`."""

  def read(text: str) -> list:
    return [kind(one) for one in text.split(",")]

  read.__name__ = "list"
  return read


def path(text: str) -> pathlib.Path:
  """An argparse type: a file or folder. An empty one, as of an unset variable, would be the current folder."""
  if not text:
    raise argparse.ArgumentTypeError("expected a path, got ''")
  return pathlib.Path(text)


def share(text: str) -> tuple[int, int]:
  """The share K/N of one machine of many, with 1 <= K <= N."""
  found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
  if not found or not 1 <= int(found[1]) <= int(found[2]):
    raise argparse.ArgumentTypeError(f"must be K/N with 1 <= K <= N, as 3/16, got {text!r}")
  return int(found[1]), int(found[2])


def _within(found: Any, text: str, least: float | None, most: float) -> Any:
  if least is not None and found < least:
    raise argparse.ArgumentTypeError(f"{_short(text)} must be at least {least:g}")
  if found > most or found < -most:
    raise argparse.ArgumentTypeError(
      f"{_short(text)} must be at most {most:.15g}" if found > most else f"{_short(text)} must be at least {-most:.15g}"
    )
  return found


def _short(text: str) -> str:
  return text if len(text) <= 60 else f"{text[:60]}..."
