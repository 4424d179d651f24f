"""The record of a run's data, by content: WORKDIR/data.json, with a copy in each checkpoint's manifest.

Per task a list of sources in their order: records, fingerprint, weight, the precomputed latents, with data.validation
the version of the rule that holds records out (`held_out.VERSION`), and that of the groups of shards where rows are
planned by them (`groups.VERSION`). Together they determine the batches. Paths are not part of it: a data set may be
moved or copied.
"""

import hashlib
import json
import pathlib
from typing import Any

from jflow import files
from jflow.errors import UserError
from jflow.interop.steps import MANIFEST, sealed_steps
from jflow.training import hosts

NAME = "data.json"
_KINDS = {
  "source": str,
  "records": int,
  "fingerprint": str,
  "weight": (int, float),
  "latents": str,
}  # of a source
_CONTENT = tuple(name for name in _KINDS if name != "source")
# Task -> its sources, as `Pipeline.identity` returns them.
Data = dict[str, list[dict[str, Any]]]


def read(workdir: pathlib.Path) -> Data | None:
  """Returns the data of the run in a workdir; None where no run has begun, or one of a version without records.

  Raises:
    UserError: the record is damaged, and no checkpoint has a copy of it.
  """
  file = workdir / NAME
  try:
    return _checked(files.read_object(file))
  except FileNotFoundError:
    return _of_checkpoints(workdir)
  except ValueError as error:
    found = _of_checkpoints(workdir)
    if found is None:
      raise UserError(
        f"{file} is damaged ({error}): remove it, and this start's data becomes that of the run"
      ) from None
    return found


def _of_checkpoints(workdir: pathlib.Path) -> Data | None:
  for step in sealed_steps(workdir / "checkpoints"):
    try:
      return _checked(files.read_object(workdir / "checkpoints" / str(step) / MANIFEST)["data"])
    except (OSError, ValueError, KeyError):
      continue
  return None


def _checked(data: Any) -> Data:
  """Returns a record that was read; raises ValueError where it has another form."""
  fine = isinstance(data, dict) and all(
    isinstance(sources, list)
    and all(isinstance(source, dict) for source in sources)
    and all(isinstance(source.get(name), kind) for source in sources for name, kind in _KINDS.items())
    for sources in data.values()
  )
  if not fine:
    raise ValueError("it is not a record of data")
  return data


def write(workdir: pathlib.Path, data: Data) -> None:
  """Writes the record of a run that begins, or that continues with accepted data."""
  files.write_text(workdir / NAME, json.dumps(data, indent=1) + "\n")


def check(workdir: pathlib.Path, now: Data, accepted: str) -> None:
  """Checks that a run continues with its own data. All processes call it.

  Args:
    workdir: of the run.
    now: the data of this start.
    accepted: the value of --accept_data: the `digest` of data that the run may continue with.

  Raises:
    UserError: the data differ, source by source; or processes see different data.
  """
  hosts.first_alone(lambda: _check(workdir, now, accepted))
  own = list(bytes.fromhex(digest(now)))
  other = hosts.from_first(own) != own
  if hosts.any_of(other):
    whom = f"this one sees {_told(now)}" if other else "another process does not see what this one does"
    raise UserError(f"the processes of this run see different data under data.sources: {whom}")


def _check(workdir: pathlib.Path, now: Data, accepted: str) -> None:
  if not (workdir / "config.json").exists() and not sealed_steps(workdir / "checkpoints"):
    return
  before = read(workdir)
  if before is None:
    hosts.say(f"{workdir} has no record of its data: that of this start is kept from now on ({_told(now)})")
    return
  changes = differences(before, now)
  if not changes:
    if _rules(now) - {0} and 0 in _rules(before):
      hosts.say(
        f"{workdir} has no record of the rule that held its records out (data.validation): if it was an earlier one, the "
        "run has trained on some that are held out from now on"
      )
    return
  told = f"workdir {workdir} holds a run on other data: {'; '.join(changes)}"
  if accepted != digest(now)[:8]:
    raise UserError(
      f"{told}; use another --workdir, or go on with this data on purpose by --accept_data={digest(now)[:8]}"
    )
  hosts.say(f"{told}; it goes on with this data, as --accept_data={accepted} says")


def _rules(data: Data) -> set[int]:
  """The rules by which the records of the sources are held out; 0: none, or a record from before it was kept."""
  return {source.get("rule", 0) for sources in data.values() for source in sources}


def _key(source: dict[str, Any]) -> list[Any]:
  return [source[name] for name in _CONTENT]


def _groups(sources: list[dict[str, Any]]) -> list[tuple[int, int]]:
  """The sources that are planned by groups of shards: place and version of groups.py."""
  return [(place, source["groups"]) for place, source in enumerate(sources) if source.get("groups")]


def digest(data: Data) -> str:
  """Returns a hash of the data's content; the names of sources do not count."""
  content = {task: [_key(source) + _groups([source]) for source in sources] for task, sources in data.items()}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differences(before: Data, now: Data) -> list[str]:
  """Describes the changes source by source; empty where only names have changed."""
  out = []
  for task in sorted(set(before) | set(now)):
    old, new = before.get(task, []), now.get(task, [])
    key = lambda source: json.dumps(_key(source))
    field = f"data.sources.{task}"
    if [*map(key, old)] == [*map(key, new)]:
      if _rules({task: old}) - {0} and _rules({task: old}) != _rules({task: new}):
        out.append(f"{field} has records held out by another rule (data.validation) than the run has begun with")
      if _groups(old) != _groups(new):
        out.append(f"{field} has rows planned in other groups of shards than the run has begun with: its plan is lost")
      continue
    if sorted(map(key, old)) == sorted(map(key, new)):
      out.append(f"{field} lists its sources in another order")
      continue
    for i in range(max(len(old), len(new))):
      if i >= len(new):
        out.append(f"{field} has no {old[i]['source']} any more ({_content(old[i])})")
      elif i >= len(old):
        out.append(f"{field} has {new[i]['source']} more ({_content(new[i])})")
      elif key(old[i]) != key(new[i]):
        out.append(
          f"{field}: {new[i]['source']} has {_content(new[i], old[i])}, and the run has begun with {_content(old[i], new[i])}"
        )
  return out


def _content(source: dict[str, Any], other: dict[str, Any] | None = None) -> str:
  """Describes a source: its records and fingerprint, and its weight and latents where they differ from another's."""
  told = [f"{source['records']:,} records, fingerprint {str(source['fingerprint'])[:8]}"]
  if other is not None and all(source[name] == other[name] for name in ("records", "fingerprint")):
    told = []
  if other is None or source["weight"] != other["weight"]:
    told.append(f"weight {source['weight']:g}")
  if other is not None and source["latents"] != other["latents"]:
    told.append(f"latents {source['latents'][:8]}" if source["latents"] else "no latents")
  return ", ".join(told)


def _told(data: Data) -> str:
  return "; ".join(f"{source['source']}: {_content(source)}" for sources in data.values() for source in sources)
