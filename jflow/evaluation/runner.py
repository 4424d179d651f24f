"""One evaluation from settings to report: predictions sample by sample, then scores, then the report's files."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jflow import checks
from jflow.errors import UserError
from jflow.evaluation import benchmarks, report
from jflow.evaluation.benchmark import FLAGS, Benchmark, GenerationBenchmark
from jflow.evaluation.page import verdict
from jflow.evaluation.report import Result
from jflow.evaluation.runs import Run, run_of
from jflow.evaluation.samples import Samples, settings_in
from jflow.evaluation.scores import Score
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Generation, Loss, Question, RoundTrip, Task
from jflow.generation import base
from jflow.generation.base import Family
from jflow.inference import loading
from jflow.interop import adapters, checkpoints
from jflow.progress import Progress


class Checkpoint:
  """The checkpoint of an evaluation, located, hashed and loaded once for all evaluations of a sweep."""

  def __init__(self, settings: Settings):
    self._settings, self._models = settings, {}
    self._opened = {name: getattr(settings, name) for name in ("vae", "weights", "template", "adapter")}

  @functools.cached_property
  def directory(self) -> pathlib.Path:
    """The located directory; it stays the same step of a run while newer ones are saved."""
    return checkpoints.locate(self._settings.checkpoint)

  @functools.cached_property
  def config(self) -> Any:
    """The model's configuration, read without its weights."""
    return checkpoints.read_config(self.directory)

  @functools.cached_property
  def adapter(self) -> adapters.Adapter | None:
    """The adapter beside the checkpoint, its tensors not yet read."""
    return adapters.describe(self._settings.adapter, self.config) if self._settings.adapter else None

  @functools.cached_property
  def run(self) -> Run:
    """The data of the run that made the checkpoint, its prompt of captions that of the adapter beside it."""
    found = run_of(self.directory, self.family)
    told = self.adapter and self.adapter.run.caption_prompt
    return found._replace(caption_prompt=told) if told else found

  def described(self) -> checkpoints.Described:
    """The checkpoint with its tokenizer, template and adapter, its weights not yet read."""
    return loading.described(self.directory, **self._opened)

  @property
  def family(self) -> Family:
    """The model's way to write images."""
    return base.family(self.config.generation)

  @functools.cached_property
  def sampling(self) -> Mapping[str, Any]:
    """The sampling settings that the adapter beside the checkpoint sets, or else the checkpoint."""
    own = checkpoints.sampling_of(self.directory)
    return adapters.sampling_of(self.adapter, own) if self.adapter else own

  @functools.cached_property
  def fingerprint(self) -> str:
    """The hash of `report.fingerprint`."""
    made = self._settings
    return report.fingerprint(self.directory, made.weights, made.vae, made.adapter)

  def use_cache(self) -> None:
    """Keeps the programs that are compiled from here on."""
    from jflow import compilation

    compilation.use_cache(self._settings.cache)

  def model(self, dtype: str) -> Any:
    """The pipeline in a compute dtype."""
    if dtype not in self._models:
      self.use_cache()
      self._models[dtype] = loading.load(self.directory, dtype=dtype, **self._opened)
    return self._models[dtype]


def evaluate(settings: Settings, checkpoint: Checkpoint | None = None, brief: bool = False) -> None:
  """Predicts the samples without a record, scores all, and writes and prints the report.

  Args:
    settings: of the evaluation.
    checkpoint: that of `settings`, if another evaluation has opened it already.
    brief: print the verdict alone.

  Raises:
    UserError: a setting or the data is wrong, or the directory holds another evaluation.
    Stopped: the directory cannot be written.
  """
  benchmark, checkpoint = opened(settings), checkpoint or Checkpoint(settings)
  benchmark.meet(checkpoint.config)
  benchmark.meet_run(checkpoint.run, checkpoint.described)
  chosen = sampling_of(type(benchmark), settings, checkpoint.family, checkpoint.sampling)
  tasks = benchmark.tasks()
  seeds = [task.seed for task in tasks if isinstance(task, (Generation, Loss))]
  checks.seed(settings.seed, max(seeds, default=settings.seed) - settings.seed)
  made = checkpoint.family.told(chosen) if chosen else {}
  identity = identity_of(benchmark, checkpoint.fingerprint, benchmark.data_files(), made)
  samples = Samples(settings.output, identity, settings.part)
  predict(benchmark, identity["dtype"], tasks, samples, checkpoint, chosen)
  records = samples.read()
  missing = sum(task.key not in records for task in tasks)
  if missing:
    print(f"this part is done; {missing} of {len(tasks)} samples are left to the other parts", file=sys.stderr)
    return
  result = benchmark.score(records)
  before = report.scored_before(settings.output, identity)
  if before and not result.scores:
    body = before
  else:
    paints = any(isinstance(task, Generation) for task in tasks)
    notes = _on_settings(benchmark, checkpoint.family, chosen if paints else None)
    result = result._replace(notes=[*result.notes, *notes])
    body = _write(benchmark, str(checkpoint.directory), identity, result, before)
  if not brief:
    print(report.table(body))
  if not brief or not body["scores"]:  # then the notes say what is left to do
    for note in body["notes"]:
      print(note)
  print(verdict(body["scores"]))
  print(f"report: {settings.output / 'report.html'} (and report.json)", file=sys.stderr)


def opened(settings: Settings) -> Benchmark:
  """The benchmark of an evaluation, its data checked.

  Raises:
    UserError: see `check`; or the data are missing or damaged.
  """
  kind = benchmarks.get(settings.benchmark)
  check(kind, settings)
  if "data" in kind.flags:
    if settings.data is None:
      raise UserError(f"--benchmark={kind.name} needs --data=DIR: {kind.where}")
    if not settings.data.exists():
      raise UserError(f"--data={settings.data} does not exist: {kind.where}")
  return kind(settings)


def check(kind: type[Benchmark], settings: Settings) -> None:
  """Raises a UserError for a flag that the benchmark does not take, and for settings that no sampler takes."""
  given = {flag: (getattr(settings, flag), flag) for flag in FLAGS if flag != "sampling"}
  given |= {name: (value, "sampling") for name, value in settings.sampling.items()}
  for name, (value, flag) in given.items():
    if value not in (None, "") and flag not in kind.flags:
      names = sorted(name for name in benchmarks.names() if flag in benchmarks.get(name).flags)
      some = ", ".join(names) if len(names) < 9 else "other benchmarks"
      raise UserError(f"--{name}={value} does not belong to --benchmark={kind.name}, but to {some}")
  if settings.sampling:
    with _as_flags(settings.sampling):
      base.check_settings(settings.sampling)
  for name, writer in (("results", ""), ("features", ": launch/experiments/features.py writes it")):
    path = getattr(settings, name)
    if path is not None and not path.is_file():
      raise UserError(f"--{name}={path} does not exist{writer}")


def sampling_of(kind: type[Benchmark], settings: Settings, family: Family, own: Mapping[str, Any]) -> Any:
  """The typed settings of the pictures; None: there are none.

  Those given, else the benchmark's, else the checkpoint's `own`, else the family's.

  Raises:
    UserError: a setting of another way to write images, or a value out of its range.
  """
  if not issubclass(kind, GenerationBenchmark):
    return None
  with _as_flags(settings.sampling):
    return base.settings(family, {**own, **kind.usual.get(family.name, {}), **settings.sampling})


@contextlib.contextmanager
def _as_flags(given: Mapping[str, Any]) -> Iterator[None]:
  """Names settings in errors as the flags that they were given by."""
  try:
    yield
  except UserError as error:
    flag = "--" if str(error).partition("=")[0] in given else ""
    raise UserError(f"{flag}{error}") from None


def _on_settings(benchmark: Benchmark, family: Family, chosen: Any) -> list[str]:
  """Notes on settings other than the benchmark's: the checkpoint's own, and the flags of a call.

  `chosen` is None where nothing is painted.
  """
  theirs, flags = {}, {}
  if chosen is not None:
    usual = dataclasses.asdict(base.settings(family, benchmark.usual.get(family.name, {})))
    made = {name: x for name, x in sorted(dataclasses.asdict(chosen).items()) if x != usual[name]}
    given = {name for name, value in benchmark.settings.sampling.items() if value is not None}
    flags = {name: value for name, value in made.items() if name in given}
    theirs = {name: value for name, value in made.items() if name not in given}
  flags |= benchmark.changed()
  notes = []
  if theirs:
    said = ", ".join(f"{name} {value}" for name, value in theirs.items())
    notes.append(f"Painted as the checkpoint itself says: {said}.")
  if flags:
    said = ", ".join(f"--{name}={value}" for name, value in flags.items())
    notes.append(f"Not the benchmark's settings: {said}.")
  if notes and benchmark.reported:
    notes[-1] += " The paper's scores stand for the recipe."
  return notes


def identity_of(
  benchmark: Benchmark, fingerprint: str, data: Sequence[pathlib.Path] = (), made: Mapping[str, Any] = {}
) -> dict[str, Any]:
  """All that the predictions depend on, as JSON values.

  Args:
    benchmark: of the evaluation.
    fingerprint: of the checkpoint and its VAE.
    data: the benchmark's files.
    made: the sampling settings of the pictures.
  """
  settings = benchmark.settings
  common = {
    "benchmark": benchmark.name,
    "fingerprint": fingerprint,
    "weights": settings.weights,
    "limit": settings.limit,
    "data": report.hash_of(data) if data else None,
    "seed": settings.seed,
    "dtype": _dtype(settings),
    "split": settings.split or benchmark.split,
    "only": settings.only,
  }
  template = {"template": settings.template} if settings.template else {}  # as before there was a choice
  return {**common, **template, **made, **benchmark.identity()}


def _dtype(settings: Settings) -> str:
  """The compute dtype: --dtype, else that of the existing predictions, else the default of this machine."""
  return settings.dtype or (settings_in(settings.output) or {}).get("dtype") or loading.usual_dtype()


def predict(
  benchmark: Benchmark, dtype: str, tasks: Sequence[Task], samples: Samples, checkpoint: Checkpoint, chosen: Any
) -> None:
  """Predicts the samples of this part that have no record yet; loads the model only if there are any."""
  settings = benchmark.settings
  records, mine = samples.read(), set(samples.mine([task.key for task in tasks]))
  left = [task for task in tasks if task.key in mine and not _is_done(task, records, settings.output)]
  if not left:
    return
  from jflow.evaluation.losses import losses
  from jflow.evaluation.predictions import answer, generate, round_trips

  of = lambda kind: [task for task in left if isinstance(task, kind)]
  output, size = settings.output, settings.batch_size
  with Progress(len(mine), len(mine) - len(left), benchmark.name, "samples") as bar:
    if asked := of(Loss):  # before the model for inference, which has other parameters
      checkpoint.use_cache()
      losses(checkpoint.described(), dtype, checkpoint.run, asked, samples, size, bar.count)
    if len(asked) == len(left):
      return
    model = checkpoint.model(dtype)
    generate(model, of(Generation), samples, output, size, dataclasses.asdict(chosen) if chosen else {}, bar.count)
    round_trips(model, of(RoundTrip), samples, output, size, bar.count)
    answer(model, of(Question), samples, size, bar.count)


def _is_done(task: Task, records: dict[str, Any], output: pathlib.Path) -> bool:
  """Whether a task has its record, and the file named by it exists."""
  record = records.get(task.key, {})
  if isinstance(task, Question):
    return isinstance(record.get("answer"), str)
  if isinstance(task, Loss):
    return isinstance(record.get("answer"), list)
  return record.get("file") == task.file and (output / task.file).is_file()


def _write(
  benchmark: Benchmark,
  directory: str,
  identity: dict[str, Any],
  result: Result,
  before: dict[str, Any] | None,
) -> dict[str, Any]:
  """Writes the report.

  Args:
    benchmark: of the evaluation.
    directory: that the checkpoint was read from.
    identity: of the predictions.
    result: of their scoring.
    before: an earlier report on the same predictions; its FID for the other way of resizing is kept.
  """
  settings, scores = benchmark.settings, dict(result.scores)
  for name, score in (before or {}).get("scores", {}).items():
    if name.startswith("FID") and name not in scores:
      scores[name] = Score(**{field: score.get(field) for field in Score._fields})
  more = {"checkpoint": settings.checkpoint, "read_from": directory, "vae": settings.vae}
  more |= {"adapter": settings.adapter} if settings.adapter else {}
  for name in ("results", "features"):
    path = getattr(settings, name)
    if path is not None:
      more[name] = f"{path} (sha256 {report.hash_of([path])[:16]})"
  result = result._replace(scores=scores)
  return report.write(
    settings.output, benchmark.name, benchmark.what, result, benchmark.reported, {**identity, **more}, benchmark.goals
  )
