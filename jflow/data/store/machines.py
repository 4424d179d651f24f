"""The shares of many machines in one import: folders beside the output, one for each, which `--merge` joins.

A machine's folder holds every N-th part of the input, as OUTPUT.partial of one machine holds all of them.
"""

import concurrent.futures
import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jflow import stores
from jflow.data.store import scratch
from jflow.data.store.partial import JOB, read_report
from jflow.errors import UserError
from jflow.progress import say
from jflow.strict_json import Malformed, parse

_DIGITS = 5


def suffix(machine: int, machines: int) -> str:
  """The end of the name of a machine's folder, the `machine`-th from 1."""
  return f".machine-{machine:0{_DIGITS}d}-of-{machines:0{_DIGITS}d}"


def shares(output: str, job: Mapping[str, Any], parts: int) -> list[str]:
  """The folders of all machines of an import, in order; notes their number in `job`.

  Args:
    output: of the import.
    job: all that the work depends on; each folder must be of the same.
    parts: of the input.

  Raises:
    UserError: there is none, one is missing, or one is of another import.
  """
  found = _beside(output, r"\.machine-\d{5}-of-\d{5}")
  counts = {match[1] for path in found if (match := re.search(r"-of-(\d{5})$", path))}
  if not counts:
    raise UserError(f"--merge: no share of {output} is there: first run the command on each machine with --part=K/N")
  if len(counts) > 1:
    raise UserError(f"--merge: {output} has shares of {' and of '.join(sorted(counts))} machines: remove the old ones")
  number = int(counts.pop())
  folders = [output + suffix(machine, number) for machine in range(1, number + 1)]
  for machine, folder in enumerate(folders, 1):
    if folder not in found and machine <= parts:
      raise UserError(f"--merge: {folder} is missing: run --part={machine}/{number}")
  for machine, folder in enumerate(folders, 1):
    if folder not in found:  # more machines than parts
      continue
    try:
      made = parse(stores.read_bytes(stores.join(folder, JOB)))
      if not isinstance(made, dict):
        raise Malformed("it holds no object")
    except (OSError, Malformed) as error:
      raise UserError(f"--merge: {folder} cannot be read ({error}): run --part={machine}/{number} again") from None
    if made != {**job, "machines": number}:
      field = next((name for name in {**job, **made} if made.get(name) != job.get(name) and name != "machines"), JOB)
      raise UserError(
        f"--merge: {folder} was made with another {field}, or the input has changed since: run --part="
        f"{machine}/{number} again, with the flags of --merge"
      )
  return folders


def remove_left(output: str, job: Mapping[str, Any]) -> bool:
  """Removes the unfinished work and the shares that a kill has left of an import whose output is whole.

  Args:
    output: of the import.
    job: all that the work depends on; folders of another stay.

  Returns:
    Whether there was any.
  """
  left = []
  for folder in _beside(output, r"\.partial|\.machine-\d{5}-of-\d{5}"):
    with contextlib.suppress(OSError, Malformed):
      made = parse(stores.read_bytes(stores.join(folder, JOB)))
      if isinstance(made, dict) and {**made, "machines": 0} == {**job, "machines": 0}:
        left.append(folder)
  for folder in left:
    say(f"{output} is whole: removing {folder}")
    scratch.remove(folder)
  return bool(left)


def _beside(output: str, end: str) -> list[str]:
  """The folders beside an output that have its name and an end, a regular expression, in order."""
  folder, _, name = output.rpartition("/")
  named = re.compile(f"{re.escape(name)}(?:{end})")
  return [stores.join(folder or "/", one) for one in stores.folders(folder or "/") if named.fullmatch(one)]


def reports(stems: Sequence[str], folders: Sequence[str]) -> list[dict[str, Any]]:
  """The reports of all parts, in order.

  Args:
    stems: of the files of each part.
    folders: from `shares`.

  Raises:
    UserError: a part is unfinished, a file of it has changed, or two are of different versions of jflow.
  """
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = list(pool.map(lambda stem: read_report(stem + ".json"), stems))
  for index, report in enumerate(found):
    if report is None:
      machine = index % len(folders) + 1
      raise UserError(
        f"--merge: {stems[index]} is unfinished or damaged: run --part={machine}/{len(folders)} again to go on"
      )
  reports = [report for report in found if report is not None]
  versions = [report.get("version", "before 0.1.0") for report in reports]
  if other := next((index for index, version in enumerate(versions) if version != versions[0]), 0):
    raise UserError(
      f"--merge: {stems[0]} was made by jflow {versions[0]}, and {stems[other]} by jflow {versions[other]}: remove the "
      "folder of the one, and run its --part again by the version of the other"
    )
  return reports
