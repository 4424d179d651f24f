"""Unfinished work whose folder is in a store: files are made in a folder of this machine, and sent when they are
whole."""

import contextlib
import hashlib
import os
from collections.abc import Sequence

from jflow import files, stores
from jflow.errors import UserError
from jflow.uploads import upload

FOLDER = "~/.cache/jflow/prepare"


def local(path: str) -> str:
  """Where a file of unfinished work is made: the path itself, or one of this machine for an address."""
  if not stores.is_address(path):
    return path
  folder, _, name = path.rpartition("/")
  here = os.path.join(os.path.expanduser(FOLDER), hashlib.sha256(folder.encode()).hexdigest()[:16])
  try:
    os.makedirs(here, exist_ok=True)
  except OSError as error:
    raise UserError(f"{here}, where files for {folder} are made, cannot be written ({error.strerror})") from None
  return os.path.join(here, name)


def send(here: str, stem: str, suffixes: Sequence[str]) -> None:
  """Moves the files of one stem to where they belong, here or in a store, the last of them last.

  Raises:
    OSError: the store answers no more.
  """
  if here == stem:
    return
  for suffix in suffixes:
    if stores.is_address(stem):
      upload(here + suffix, stem + suffix)
    else:
      os.replace(here + suffix, stem + suffix)
  for suffix in suffixes:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(here + suffix)


def forget(stem: str, suffixes: Sequence[str]) -> None:
  """Removes the copies on this machine of files that lie in a store; files that lie here alone stay."""
  if stores.is_address(stem):
    for suffix in suffixes:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(local(stem) + suffix)


def fetched(stem: str, suffixes: Sequence[str]) -> str:
  """The stem of files on this machine, copied from their store if they lie there."""
  if stores.is_address(stem):
    for suffix in suffixes:
      with open(local(stem) + suffix, "wb") as file:
        stores.download(stem + suffix, stores.stat(stem + suffix), file)
  return local(stem)


def remove(path: str) -> None:
  """Removes a file or a folder with its contents, here or in a store."""
  if not stores.is_address(path):
    files.remove(path)
    return
  stores.remove(path)
  files.remove(os.path.dirname(local(stores.join(path, "any"))))
