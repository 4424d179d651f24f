"""An import on Apache Beam: the parts on its workers, joined as those of one machine are.

Beam has the list of parts, spreads them over its workers and tries again what fails; each worker writes the files and
the report of a part as a process of this machine would. Workers may do a part twice, at the same time too: files are
made in a folder of the attempt and moved or sent when they are whole, and both attempts write the same bytes.
"""

import contextlib
import io
import os
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from jflow import stores
from jflow.data.filters import Filters
from jflow.data.importers import Importer
from jflow.data.store.part import import_part
from jflow.errors import UserError, need_extra, one_line


def check(flags: str) -> None:
  """Checks that Beam is there and knows its flags.

  Raises:
    UserError: it is not installed, or a flag is none of its.
  """
  need_extra("beam", "apache_beam")
  from apache_beam.options.pipeline_options import PipelineOptions

  with contextlib.redirect_stderr(io.StringIO()) as said:
    try:
      PipelineOptions(shlex.split(flags)).get_all_options()
    except (SystemExit, ValueError) as error:
      told = one_line(error) if isinstance(error, ValueError) else said.getvalue().strip().rpartition("\n")[2]
      raise UserError(f"--beam={flags!r} must be flags of Apache Beam, as --runner=FlinkRunner ({told})") from None


def run(
  importer: Importer,
  parts: Sequence[Any],
  stems: Sequence[str],
  todo: Sequence[int],
  task: str,
  filters: Filters,
  flags: str,
) -> None:
  """Imports parts; their reports lie beside their files then.

  Args:
    importer: of the input, which every worker must reach.
    parts: of the input.
    stems: of the files of each part, on a disk that all workers share or in a store.
    todo: numbers of the parts to import.
    task: "understanding", "generation" or "text".
    filters: which records are wanted.
    flags: of Beam, as on a command line.

  Raises:
    UserError: the pipeline fails.
  """
  import apache_beam as beam
  from apache_beam.options.pipeline_options import PipelineOptions

  work = [(parts[index], stems[index]) for index in todo]
  try:
    with beam.Pipeline(options=PipelineOptions(shlex.split(flags))) as pipeline:
      spread = pipeline | "parts" >> beam.Create(work, reshuffle=False) | "spread" >> beam.Reshuffle()
      _ = spread | "import" >> beam.Map(_import, importer, task, filters)
  except Exception as error:  # of Beam and its runners, of many types
    raise UserError(f"the Beam pipeline failed: {_cause(error)}; run the same command again to go on") from error


def _import(work: Any, importer: Any, task: Any, filters: Any) -> None:
  """Imports one part, (part, stem), on a worker; Beam would check narrower types, and cannot."""
  from apache_beam.metrics import Metrics

  part, stem = work
  records = Metrics.counter("jflow", "records")
  shared = None if stores.is_address(stem) else os.path.dirname(stem)
  attempt = tempfile.mkdtemp(prefix="attempt-", dir=shared)
  try:
    import_part(
      importer, part, stem, task, filters, lambda work: records.inc(), os.path.join(attempt, os.path.basename(stem))
    )
  finally:
    shutil.rmtree(attempt, ignore_errors=True)


def _cause(error: BaseException) -> str:
  """The last line that says something: Beam's messages begin with a traceback of the worker."""
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  said = next((line for line in reversed(lines) if "Error" in line or "Stopped" in line), lines[-1] if lines else "")
  return f"{type(error).__name__}: {said}"[:400]
