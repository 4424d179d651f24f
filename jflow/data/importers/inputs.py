"""The files of an input: which there are, what is left out of a folder, and reading them line by line."""

import codecs
import collections
import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from jflow import git_lfs
from jflow.data.importers import compressed
from jflow.data.records import RecordError
from jflow.errors import UserError

MAX_IMAGE_FILE = 256 * 2**20  # bytes; no picture within `images.MAX_PIXELS` needs more
MAX_LINE = 64 * 2**20  # bytes of a line, or of a document
# What systems leave beside the hidden files: a Mac's archives, a Synology's thumbnails, what was deleted.
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
# Of the machine, not of the data: the import ends, and goes on when the same command is run again.
_TRANSIENT = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Inputs(NamedTuple):
  """What an input names."""

  paths: list[str]  # in order of their names
  left_out: dict[str, int]  # what lies there and is not read, by reason


def is_hidden(name: str) -> bool:
  """Whether a file or folder is hidden, or is a system's own; a path is where any part of it is."""
  return any(
    part in _OF_SYSTEMS or (part.startswith(".") and part not in (".", ".."))
    for part in name.replace("\\", "/").split("/")
  )


def input_files(pattern: str, endings: tuple[str, ...], format: str) -> Inputs:
  """Returns the files that an input names, each once.

  A folder is read with the folders inside it, also with those that it links to. Left out, and counted, are
  hidden files and folders and a system's own ("hidden"), a second link to the same file ("linked_twice"), a
  link to a folder around the input ("linked_back") or to nothing ("broken_link"), pipes and devices
  ("not_a_file"), and folders that a pattern names ("folder"). What the pattern itself names is taken, hidden
  or not.

  Args:
    pattern: a file; a folder, whose files with one of the endings count; a pattern with `*`; or a numbered
      range such as `00000..00041` in braces, each file of which must be there.
    endings: of file names in a folder, in lower case.
    format: for messages.

  Raises:
    UserError: nothing is found, a file of a range or the target of a link is missing, a folder cannot be
      read, or a file is a git-lfs pointer, or compressed in a way that is not read.
  """
  if "://" in pattern:
    raise UserError(f"--input={pattern} is an address: only local files are read, so fetch it first")
  left_out: collections.Counter = collections.Counter()
  if os.path.isfile(pattern):
    found, wanted = [pattern], ""
  elif os.path.isdir(pattern):
    found = _walk(pattern, compressed.with_compressed(endings), (), left_out)
    wanted = f"no file that ends in {', '.join(endings)}"
  elif match := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern):
    found, wanted = _range(pattern, *match.groups()), "an empty range"
  else:
    found = _matching(pattern, left_out)
    wanted = "a pipe or a device" if os.path.exists(pattern) else "no such file"
  if not found:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    without = f" (left out: {counts})" if counts else ""
    what = "holds nothing to read" if os.path.isdir(pattern) else "not found"
    raise UserError(f"input {pattern} {what}: {wanted}{without}; --format={format} reads a file, a folder or a pattern")
  git_lfs.check(found)
  compressed.check(found, any(ending.endswith(("gz", ".tar")) for ending in endings))
  return Inputs(found, dict(left_out))


def _range(pattern: str, before: str, first: str, last: str, after: str) -> list[str]:
  numbers = range(int(first), int(last) + 1)
  missing, found = [], []
  for number in numbers:
    path = f"{before}{number:0{len(first)}d}{after}"
    (found if os.path.isfile(path) else missing).append(path)
    if len(missing) > 100_000:
      break
  if missing:
    raise UserError(f"{missing[0]} is missing ({len(missing):,} of the {len(numbers):,} files of {pattern} are)")
  return found


def _matching(pattern: str, left_out: collections.Counter) -> list[str]:
  """Returns the files that a pattern matches.

  `**` is any number of folders, which are walked as an input is.
  """
  parts = pattern.split("/")
  named = tuple(part for part in parts if is_hidden(part))
  if "**" in parts:
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:first]) or ("/" if first else ".")
    if not os.path.isdir(root):
      return []
    walked = _walk(root, ("",), named, left_out)
    return [path for path in walked if _fits(os.path.relpath(path, root).split(os.sep), parts[first:])]
  found = []
  for path in sorted(glob.glob(pattern)):
    if any(is_hidden(part) and part not in parts and not part.startswith(".") for part in path.split("/")):
      left_out["hidden"] += 1
    elif os.path.isdir(path):
      left_out["folder"] += 1
    elif os.path.isfile(path):
      found.append(path)
    elif os.path.islink(path):
      raise UserError(f"{path} is a link to a file that is not there: {os.readlink(path)}")
    else:
      left_out["not_a_file"] += 1
  return _once(found, {}, left_out)


def _fits(parts: list[str], pattern: list[str]) -> bool:
  """Whether the parts of a path match those of a pattern, in which `**` is any number of parts."""
  at = {0}  # how much of the pattern may be used up
  for part in parts:
    for i in range(len(pattern)):
      if i in at and pattern[i] == "**":
        at.add(i + 1)
    at = {
      i if pattern[i] == "**" else i + 1
      for i in at
      if i < len(pattern) and (pattern[i] == "**" or fnmatch.fnmatchcase(part, pattern[i]))
    }
  return len(pattern) in at or (len(pattern) - 1 in at and pattern[-1] == "**")


def _walk(root: str, endings: tuple[str, ...], named: tuple[str, ...], left_out: collections.Counter) -> list[str]:
  """Returns the files below a folder that have one of the endings, each once.

  Args:
    root: the folder.
    endings: in lower case.
    named: names and patterns of hidden files and folders that are taken.
    left_out: counts what is not.

  Raises:
    UserError: a folder cannot be read, or a link that has one of the endings leads to nothing.
  """
  top = os.path.realpath(root)
  folders, linked_folders = [(root, top)], []  # as it is shown, and where it lies
  entered: set[str] = set()
  files: dict[str, str] = {}  # where it lies -> as it is shown
  linked_files: list[str] = []
  while folders or linked_folders:
    shown, real = folders.pop() if folders else linked_folders.pop()
    if real in entered:
      continue
    entered.add(real)
    for entry in _entries(real, shown):
      path = os.path.join(shown, entry.name)
      wanted = entry.name.lower().endswith(endings)
      if is_hidden(entry.name) and not any(fnmatch.fnmatchcase(entry.name, name) for name in named):
        left_out["hidden"] += wanted or entry.is_dir()
      elif entry.is_symlink():
        target = os.path.realpath(os.path.join(real, entry.name))
        if os.path.isdir(target):
          if os.path.commonpath([target, top]) == target and target != top:
            left_out["linked_back"] += 1
          else:
            linked_folders.append((path, target))
        elif wanted and os.path.isfile(target):
          linked_files.append(path)
        elif not os.path.exists(target):
          if wanted and endings != ("",):
            raise UserError(f"{path} is a link to a file that is not there: {target}")
          left_out["broken_link"] += 1
        else:
          left_out["not_a_file"] += wanted
      elif entry.is_dir():
        folders.append((path, os.path.join(real, entry.name)))
      elif wanted and entry.is_file():
        files.setdefault(os.path.join(real, entry.name), path)
      else:
        left_out["not_a_file"] += wanted
  found = sorted([*files.values(), *_once(sorted(linked_files), files, left_out)])
  for reason in [reason for reason, count in left_out.items() if not count]:
    del left_out[reason]
  return found


def _entries(folder: str, shown: str) -> list[os.DirEntry]:
  try:
    with os.scandir(folder) as entries:
      return sorted(entries, key=lambda entry: entry.name)
  except OSError as error:
    raise UserError(f"{shown}: the folder cannot be read ({error.strerror})") from None


def _once(paths: list[str], known: dict[str, str], left_out: collections.Counter) -> list[str]:
  """Returns the paths without those that lead to a file of `known`, or of another path, by a link."""
  known, once = dict(known), []
  real = {path: os.path.realpath(path) for path in paths}
  for path in sorted(paths, key=lambda path: (real[path] != os.path.abspath(path), path)):
    if known.setdefault(real[path], path) == path:
      once.append(path)
    else:
      left_out["linked_twice"] += 1
  return sorted(once)


def read_under(root: str, name: str, limit: int = MAX_IMAGE_FILE) -> bytes:
  """Returns the contents of an image file below a folder.

  Args:
    root: the folder.
    name: relative to it, or absolute.
    limit: bytes that the file may have.

  Raises:
    RecordError: it lies elsewhere ("outside_root"), is not there ("missing_image"), is a folder, a pipe or a
      device ("not_a_file"), too large ("too_large"), or a git-lfs pointer ("git_lfs_pointer").
  """
  root = os.path.normpath(os.path.abspath(root))
  path = os.path.normpath(os.path.join(root, name))
  if os.path.commonpath([path, root]) != os.path.commonpath([root]):  # which writes "//folder" as "/folder"
    raise RecordError("outside_root", f"image {name:.200} lies outside {root}: set --image_root")
  try:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
      raise RecordError("not_a_file", f"image {name:.200} is a folder, a pipe or a device")
    if status.st_size > limit:
      raise RecordError("too_large", f"the images of the record have more than {MAX_IMAGE_FILE:,} bytes")
    with open(path, "rb") as file:
      data = file.read()
  except (OSError, ValueError) as error:
    if getattr(error, "errno", None) in _TRANSIENT:
      raise
    raise RecordError("missing_image", f"image {name:.200} not found in {root}: see --image_root") from None
  if git_lfs.is_pointer(data):
    raise RecordError("git_lfs_pointer", f"image {name:.200} is a git-lfs pointer: run `git lfs pull` in {root}")
  return data


def lines(file: BinaryIO, limit: int = MAX_LINE) -> Iterator[tuple[bytes, int]]:
  """Yields each line, of which no more than `limit` + 1 bytes are kept, and its length.

  Only a line feed ends one.
  """
  while line := file.readline(limit + 1):
    length, last = len(line), line
    while not last.endswith(b"\n") and (last := file.readline(2**20)):
      length += len(last)
    yield line, length


def is_blank(line: bytes) -> bool:
  """Whether a line holds nothing: white space, or the byte order mark that some editors begin a file with."""
  return not line.strip(b" \t\r\n\v\f\xef\xbb\xbf")


def is_utf16(data: bytes) -> bool:
  """Whether a text begins as UTF-16 or UTF-32 does: with its byte order mark, or every other byte 0."""
  head = data[: 2 * (min(len(data), 16) // 2)]
  return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) or (
    any(head) and len(head) >= 8 and not (any(head[::2]) and any(head[1::2]))
  )


def check_encoding(path: str) -> None:
  """Checks that a file of many records may be UTF-8.

  Raises:
    UserError: it is UTF-16 or UTF-32.
  """
  with open(path, "rb") as file:
    if is_utf16(file.read(16)):
      raise UserError(f"{path} is UTF-16 or UTF-32 text: convert it to UTF-8, as in iconv -f UTF-16 -t UTF-8")
