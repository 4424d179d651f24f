"""Checkpoints that are named and not in a folder of one's own: remote ones, and those that come with jflow.

The files of a remote one that are read are copied into a cache, once.

From object storage (gs://BUCKET/FOLDER) by fsspec; from the Hugging Face hub (ORG/NAME or ORG/NAME@REVISION) by its
library, into its shared cache.
"""

import glob
import hashlib
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from jflow.errors import UserError, install_line, one_line
from jflow.files import replacing
from jflow.interop import best

_WORLD = pathlib.Path(__file__).parents[1] / "world"
SHIPPED = {"world": _WORLD / "model", "world-codes": _WORLD / "model_codes"}  # in the layout of `packed`
ADAPTER = "adapter_config.json"  # of a folder that holds an adapter alone
CACHE = pathlib.Path("~/.cache/jflow/checkpoints")
# Of files to copy of a published checkpoint; never a pickle.
_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


_HUB = re.compile(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?")


def is_remote(path: str | pathlib.Path) -> bool:
  """Whether a path names a store or a model on the hub.

  A store is gs://BUCKET/FOLDER, also as `pathlib` writes it (gs:/BUCKET/FOLDER). ORG/NAME is on the hub unless it or a
  folder ORG exists locally.
  """
  return re.match(r"[a-z][a-z0-9]+:/", str(path)) is not None or _is_hub(path)


def _is_hub(path: str | pathlib.Path) -> bool:
  found = _HUB.fullmatch(str(path))
  return found is not None and not pathlib.Path(found[1]).exists()


def local(path: str | pathlib.Path) -> pathlib.Path:
  """The folder itself, the local copy of a remote one (see `fetch`), or that of a model which comes with jflow.

  Raises:
    UserError: an empty name, or a checkpoint that is not there.
  """
  if not str(path).strip():
    raise UserError("a checkpoint must be named by its folder or hub name, got ''")
  if str(path) in SHIPPED and not pathlib.Path(path).exists():
    folder = SHIPPED[str(path)]
    if not (folder / "config.json").is_file():
      raise UserError(
        f"checkpoint {path}: this installation comes without {folder}; name the folder of a checkpoint, such as "
        "launch/quickstart.sh makes"
      )
    return folder
  return fetch(path) if is_remote(path) else pathlib.Path(path)


def fetch(path: str | pathlib.Path, cache: pathlib.Path = CACHE) -> pathlib.Path:
  """Copies a remote checkpoint, of either layout, to this machine.

  Of a workdir, it copies the config, the tokenizer and a complete step: the one that the path names, else the best as
  best.json names it, else the newest. The step's manifest is verified when it is read. The copy's name is a hash of the
  store's metadata of every file, so only a changed checkpoint is copied again.

  Args:
    path: any address that fsspec reads (gs:// needs gcsfs), or a name of the hub.
    cache: folder of the copies from stores.

  Returns:
    The local folder, to be opened in place of `path`.

  Raises:
    UserError: the store's library is missing, or the checkpoint does not exist or cannot be read.
  """
  if _is_hub(path):
    return _from_hub(str(path))
  import fsspec

  protocol, rest = str(path).split(":", 1)
  url = f"{protocol}://{rest.strip('/')}"
  named = re.fullmatch(r"(.*?)/checkpoints(?:/(\d+))?", url)
  root, step = named.groups() if named else (url, None)
  try:
    store, folder = fsspec.core.url_to_fs(root)
    files = {os.path.relpath(name, folder): info for name, info in store.find(folder, detail=True).items()}
    wanted = files_wanted(url, set(files), step, lambda name: store.cat_file(os.path.join(folder, name)))
    told = [(name, files[name].get("size"), store.ukey(os.path.join(folder, name))) for name in wanted]
  except UserError:
    raise
  except (ImportError, ValueError) as error:
    advice = {"gs": f": {install_line('gcs')}", "s3": ": pip install s3fs"}.get(protocol.replace("gcs", "gs"), "")
    raise UserError(f"checkpoint {url} cannot be opened ({error}){advice}") from error
  except Exception as error:  # stores raise many types; a file may be gone by now
    raise UserError(f"checkpoint {url} cannot be read: {str(error).strip() or type(error).__name__}") from error
  key = hashlib.sha256(repr((root, told)).encode()).hexdigest()[:16]
  local = cache.expanduser() / key
  for name in wanted:
    _copy(store, os.path.join(folder, name), files[name].get("size"), local / name, url)
  return local if step is None else local / "checkpoints" / step


def _from_hub(name: str) -> pathlib.Path:
  """Downloads a model from the hub; without a connection, returns an earlier download.

  Raises:
    UserError: the model or revision does not exist, there is no connection, or it is no checkpoint.
  """
  from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download

  repository, _, revision = name.partition("@")
  of = {"repo_id": repository, "revision": revision or None}
  read = lambda file: pathlib.Path(hf_hub_download(filename=file, **of)).read_bytes()
  try:
    names = {file.rfilename for file in HfApi().model_info(**of).siblings or ()}
    wanted = [glob.escape(file) for file in files_wanted(name, names, None, read)]
    return pathlib.Path(snapshot_download(**of, allow_patterns=wanted))
  except UserError:
    raise
  except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError) as error:
    why = {
      errors.RevisionNotFoundError: f"has no revision {revision}",
      errors.GatedRepoError: "asks for an agreement: accept it there, and `hf auth login`",
    }.get(type(error), "does not exist, or is not open to you")
    raise UserError(
      f"checkpoint {name} is neither a folder here nor on the Hugging Face hub: {repository} {why}"
    ) from None
  except Exception as error:  # of the connection, of many libraries' types
    try:
      return pathlib.Path(snapshot_download(**of, local_files_only=True, allow_patterns=[f"*{x}" for x in _SUFFIXES]))
    except Exception:
      reason = one_line(error) or type(error).__name__
      raise UserError(
        f"checkpoint {name} is not a folder here, and the Hugging Face hub cannot be reached ({reason})"
      ) from error


def files_wanted(url: str, files: set[str], step: str | None, read: Callable[[str], bytes]) -> list[str]:
  """The names, below its folder, of the files of a checkpoint that are read; `read` returns the content of one."""
  if outside := sorted(name for name in files if name.startswith("../")):
    raise UserError(f"checkpoint {url} holds a file outside its folder: {outside[0]}")
  sealed = {int(m[1]) for name in files if (m := re.fullmatch(r"checkpoints/(\d+)/manifest\.json", name))}
  if not any(name.startswith("checkpoints/") for name in files):
    found = sorted(name for name in files if name.endswith(_SUFFIXES))
    if "config.json" not in found and ADAPTER not in found:
      raise UserError(f"checkpoint {url} holds neither checkpoints/ nor config.json")
    return found
  if not sealed or (step is not None and int(step) not in sealed):
    raise UserError(f"checkpoint {url} holds no complete step{' yet' if step is None else ' of that number'}")
  alone = {"config.json"}
  if step is None:
    early = best.named_in(read(best.FILE)) if best.FILE in files else None
    step, alone = str(early if early in sealed else max(sealed)), alone | {best.FILE}
  parts = ("tokenizer/", f"checkpoints/{step}/")
  return sorted(name for name in files if name in alone or name.startswith(parts))


def _copy(store: Any, source: str, size: int | None, target: pathlib.Path, url: str) -> None:
  """Copies one file of `size` bytes atomically; an existing copy is kept."""
  if target.exists():
    return
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as new:
      store.get_file(source, str(new))
      if size not in (None, new.stat().st_size):
        raise OSError(f"{new.stat().st_size} bytes came of {size}")
  except Exception as error:  # stores raise many types
    raise UserError(f"checkpoint {url}: {source} cannot be copied to {target.parent}: {error}") from error
