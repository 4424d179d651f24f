"""Files written to object stores. None counts as written before the store says its size and hash, or they are read back."""

import hashlib
import os
import tempfile
from typing import Any

from jflow import files, stores
from jflow.errors import UserError

_WITH_FOLDERS = ("file", "local", "sftp", "ssh", "smb", "hdfs", "webhdfs")


def upload(path: str, address: str) -> None:
  """Copies a file to a store, and checks what has arrived there by its size and hash.

  Raises:
    UserError: the store takes no files, or is not open to us.
    OSError: the store answers no more, or the file cannot be read.
  """
  size, md5, sha256 = os.path.getsize(path), files.digest(path, "md5"), files.sha256(path)

  def put(store: Any, name: str) -> None:
    _make_folder(store, address, name)
    store.put_file(path, name)
    there = stores.stat_of(stores.fresh(store).info(name))
    if there.size != size:
      raise OSError(f"{there.size:,} bytes arrived of {size:,}")
    if there.md5 != md5 and _hash_there(store, name, size) != sha256:
      raise OSError("what arrived has another hash")

  need_writable("--output", address)
  try:
    stores.call(address, put, missing=True)
  except FileNotFoundError:
    raise UserError(f"{address} cannot be written: its bucket or folder does not exist") from None


def write_bytes(address: str, content: bytes) -> None:
  """Writes a small file of a store; see `upload`."""
  with tempfile.NamedTemporaryFile() as file:
    file.write(content)
    file.flush()
    upload(file.name, address)


def copy(source: str, target: str) -> None:
  """Copies a file within a store: by the store itself where it can, else through this machine."""
  before = stores.stat(source)

  def within(store: Any, name: str) -> bool:
    try:
      _make_folder(store, target, name)
      store.cp_file(store._strip_protocol(source), name)
    except NotImplementedError:
      return False
    if (there := stores.stat_of(stores.fresh(store).info(name))).size != before.size:
      raise OSError(f"{there.size:,} bytes arrived of {before.size:,}")
    return True

  if not stores.call(target, within):
    with tempfile.NamedTemporaryFile() as file:
      stores.download(source, before, file)  # type: ignore[arg-type]
      file.flush()
      upload(file.name, target)


def _make_folder(store: Any, address: str, name: str) -> None:
  """Makes the folder of a file, where a store has real ones; in others it might make a bucket."""
  if address.split("://")[0] in _WITH_FOLDERS:
    store.makedirs(name.rpartition("/")[0], exist_ok=True)


def need_writable(flag: str, address: str) -> None:
  """Checks that files can be written to a kind of store.

  Raises:
    UserError: it is a web server, which only reads.
  """
  if address.startswith(("http://", "https://")):
    raise UserError(f"{flag}={address} is on a web server, which takes no files: name a folder, gs:// or s3://")


def _hash_there(store: Any, name: str, size: int) -> str:
  digest = hashlib.sha256()
  for start in range(0, size, stores.BLOCK):
    digest.update(store.cat_file(name, start=start, end=min(start + stores.BLOCK, size)))
  return digest.hexdigest()
