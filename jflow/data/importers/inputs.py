"""The files of an input, and those of a folder that are left out."""

import collections
import contextlib
import fnmatch
import glob
import os
import pathlib
import re
from typing import NamedTuple

from jflow import files, git_lfs, stores
from jflow.data.importers import compressed
from jflow.errors import UserError
from jflow.strict_json import Malformed

# System files besides hidden ones: a Mac's archives, a Synology's thumbnails, trash.
_OF_SYSTEMS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")
# Files of a data set of `prepare`, unfinished or finished, and a key of each beside "schema".
_OF_PREPARED = {"job.json": "files", "summary.json": "accepted"}


class Inputs(NamedTuple):
  """The files that an input names."""

  paths: list[str]  # in order of their names
  left_out: dict[str, int]  # numbers of files that are not read, by reason


def is_hidden(name: str) -> bool:
  """Whether a file or folder, or any folder above it in the path, is hidden or a system's own."""
  return any(
    part in _OF_SYSTEMS or (part.startswith(".") and part not in (".", ".."))
    for part in name.replace("\\", "/").split("/")
  )


def input_files(pattern: str, endings: tuple[str, ...], format: str) -> Inputs:
  """Returns the files that an input names, each once.

  A folder is read recursively, links to folders included. Left out and counted are hidden files and folders and a
  system's own ("hidden"), a second link to the same file ("linked_twice"), a link to a folder that contains the input
  ("linked_back") or to nothing ("broken_link"), pipes and devices ("not_a_file"), folders that match a pattern
  ("folder"), and, of the folders below, data sets that `prepare` has written or is writing ("prepared"). Files that the
  pattern itself names are read, hidden or not.

  Args:
    pattern: a file; a folder, whose files with one of the endings count; a pattern with `*`; or a numbered
      range such as `00000..00041` in braces, each file of which must be there.
    endings: of file names in a folder, in lower case.
    format: for messages.

  Raises:
    UserError: nothing is found, a file of a range or the target of a link is missing, a folder cannot be read, or a
      file is a git-lfs pointer, or compressed in an unsupported format.
  """
  left_out: collections.Counter = collections.Counter()
  match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
  if stores.is_address(pattern):
    found, wanted = _in_store(pattern, match, endings, left_out)
  elif os.path.isfile(pattern):
    found, wanted = [pattern], ""
  elif os.path.isdir(pattern):
    found = _walk(pattern, compressed.with_compressed(endings), (), left_out)
    wanted = f"no file that ends in {', '.join(endings)}"
    if not found and next(pathlib.Path(pattern).rglob("*.arrow"), None):
      wanted += " (Arrow files, of save_to_disk: datasets.load_from_disk(DIR).to_parquet(FILE) makes one that is read)"
  elif match:
    found, wanted = _range(pattern, *match.groups()), "an empty range"
  else:
    found = _matching(pattern, left_out)
    wanted = "a pipe or a device" if os.path.exists(pattern) else "no such file"
  if not found:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
    without = f" (left out: {counts})" if counts else ""
    what = "holds nothing to read" if is_folder(pattern) else "not found"
    raise UserError(f"input {pattern} {what}: {wanted}{without}; --format={format} reads a file, a folder or a pattern")
  git_lfs.check([path for path in found if not stores.is_address(path)])
  compressed.check(found, any(ending.endswith(("gz", ".tar")) for ending in endings))
  return Inputs(found, dict(left_out))


def _range(pattern: str, before: str, first: str, last: str, after: str) -> list[str]:
  numbers, missing, found = range(int(first), int(last) + 1), [], []
  for begin in range(0, len(numbers), 1000):
    paths = [f"{before}{number:0{len(first)}d}{after}" for number in numbers[begin : begin + 1000]]
    for path, known in zip(paths, stores.each(stores.find, paths)):
      (missing if known is None else found).append(path)
    if len(missing) > 100_000:
      break
  if missing:
    raise UserError(f"{missing[0]} is missing ({len(missing):,} of the {len(numbers):,} files of {pattern} are)")
  return found


def is_folder(path: str) -> bool:
  """Whether a path is a folder, of this machine or of a store."""
  if not stores.is_address(path):
    return os.path.isdir(path)
  return not glob.has_magic(path) and stores.find(path.rstrip("/")) is None and stores.exists(path.rstrip("/"))


def refuse_address(path: str, format: str) -> None:
  """Checks that an input is of this machine, for a format that is read from no store.

  Raises:
    UserError: it is an address.
  """
  if stores.is_address(path):
    raise UserError(
      f"--input={path} is an address, and --format={format} reads a folder of this machine: fetch it, or keep it in a "
      "store as tars (webdataset), parquet or llava-jsonl"
    )


def _in_store(
  pattern: str, numbered: re.Match[str] | None, endings: tuple[str, ...], left_out: collections.Counter
) -> tuple[list[str], str]:
  """The files of a store that an input names, and what there would have to be for one more."""
  if numbered:
    return _range(pattern, *numbered.groups()), "an empty range"
  if stores.find(pattern) is not None:  # it may look like a pattern: https://host/a.tar?download=true
    return [pattern], ""
  parts = pattern.split("/")
  first = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts))
  root, rest, found = "/".join(parts[:first]).rstrip("/"), parts[first:], []
  ending = ("",) if rest else compressed.with_compressed(endings)
  for name in stores.listed(root):
    fits = _fits(name.split("/"), rest) if rest else name.lower().endswith(ending)
    if fits and is_hidden(name) and not any(map(is_hidden, rest)):
      left_out["hidden"] += 1
    elif fits:
      found.append(stores.join(root, name))
  return found, "no such file" if rest else f"no file that ends in {', '.join(endings)}"


def _matching(pattern: str, left_out: collections.Counter) -> list[str]:
  """Returns the files that a pattern matches.

  `**` is any number of folders, which are walked like an input.
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
  at = {0}  # numbers of pattern parts that may be matched so far
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
    named: names and patterns of hidden files and folders that are read.
    left_out: counts of those that are not.

  Raises:
    UserError: a folder cannot be read, or a link that has one of the endings leads to nothing.
  """
  top = os.path.realpath(root)
  folders, linked_folders = [(root, top)], []  # as shown in messages, and its real path
  entered: set[str] = set()
  files: dict[str, str] = {}  # real path -> as shown in messages
  linked_files: list[str] = []
  while folders or linked_folders:
    shown, real = folders.pop() if folders else linked_folders.pop()
    if real in entered:
      continue
    entered.add(real)
    if real != top and _is_prepared(real):
      left_out["prepared"] += 1
      continue
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


def _is_prepared(folder: str) -> bool:
  """Whether a folder is a data set of `prepare`, or the beginning of one: it may lie in the folder that it is made of."""
  for name, beside in _OF_PREPARED.items():
    with contextlib.suppress(FileNotFoundError, Malformed):
      found = files.read_object(os.path.join(folder, name))
      if isinstance(found.get("schema"), int) and beside in found:
        return True
  return False


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
