"""A run goes on with the data that it has begun with: told apart by content, whatever it is called and wherever it
lies."""

import json
import pathlib
import shutil

import pytest
import tiny
from refusals import refused

from jflow.__main__ import main
from jflow.batch import TASKS, RowShape
from jflow.data import pipeline
from jflow.data.store import prepare
from jflow.data.tokenizer import Tokenizer
from jflow.training import config_files, data_record
from jflow.training import workdir as workdirs

CONFIG = f"{tiny.ROOT}/configs/stage2.py:tiny"
TOKENIZER = Tokenizer.load(str(tiny.TOKENIZER))


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> pathlib.Path:
  """Prepared data sets: TASK, as it was; TASK-more and TASK-other, made again with more records and from another
  seed."""
  folder = tmp_path_factory.mktemp("sets")
  for name, records, seed in (("", 6, 1), ("-more", 9, 1), ("-other", 6, 2)):
    for task in TASKS if not name else ("generation",):
      output = str(folder / f"{task}{name}")
      prepare.prepare("shapes", output=output, task=task, records=records, seed=seed, image_size=32)
  return folder


def fields_of(sets: pathlib.Path, **changed) -> list[str]:
  listed = {task: ((str(sets / task), 1.0),) for task in TASKS} | changed
  return [f"--config.data.sources.{task}={sources!r}" for task, sources in listed.items()]


def identity(fields: list[str]) -> data_record.Data:
  data = config_files.load(CONFIG, fields).data
  return pipeline.Pipeline(data, TOKENIZER, RowShape(128, 4, 16, 32, "flow"), 8, 0).identity()


@pytest.fixture
def run(tmp_path, sets) -> pathlib.Path:
  """The workdir of a run that has begun with the first sets."""
  workdir, fields = tmp_path / "run", fields_of(sets)
  workdir.mkdir()
  data_record.write(workdir, identity(fields))
  workdirs.write_config(workdir, config_files.load(CONFIG, fields), TOKENIZER)
  return workdir


def start(run: pathlib.Path, capsys, fields: list[str], *flags: str) -> str:
  """Starts `train` as far as a refusal; returns that."""
  before = {path: path.read_bytes() for path in run.rglob("*.json")}
  assert main(["train", f"--config={CONFIG}", f"--workdir={run}", *fields, *flags]) == 2
  captured = capsys.readouterr()
  assert captured.out == "" and {path: path.read_bytes() for path in run.rglob("*.json")} == before
  return captured.err


PAINT = "data.sources.generation"


@pytest.mark.parametrize(
  "sources, said",
  [
    (lambda s: ((f"{s}/generation-more", 1.0),), f"{PAINT}: SETS/generation-more has 9 records, "),
    (lambda s: ((f"{s}/generation-other", 1.0),), f"{PAINT}: SETS/generation-other has 6 records, "),
    (lambda s: ((f"{s}/generation", 1.0), (f"{s}/generation-other", 1.0)), f"{PAINT} has SETS/generation-other more "),
    (lambda s: ((f"{s}/generation", 1.0), (f"{s}/generation", 1.0)), f"{PAINT} has SETS/generation more "),
    (
      lambda s: ((f"{s}/generation", 2.0),),
      f"{PAINT}: SETS/generation has weight 2, and the run has begun with weight 1",
    ),
    (lambda s: (("shapes", 1.0),), f"{PAINT}: shapes has 2,000 records, "),
  ],
)
def test_other_data_is_refused_by_the_name_of_its_source(run, sets, capsys, sources, said):
  fields = fields_of(sets, generation=sources(sets))
  message = start(run, capsys, fields)
  assert message.count("\n") == 1 and said.replace("SETS", str(sets)) in message
  flag = message.split()[-1]
  assert flag == f"--accept_data={data_record.digest(identity(fields))[:8]}"
  assert said.replace("SETS", str(sets)) in start(run, capsys, fields, "--accept_data=00000000")


def test_data_that_is_made_again_under_its_name_is_refused(run, sets, capsys, tmp_path):
  moved = tmp_path / "moved"
  shutil.copytree(sets / "generation", moved)
  fields = fields_of(sets, generation=((str(moved), 1.0),))
  data_record.check(run, identity(fields), "")  # a copy at another place is the same data
  workdirs.check_same_run(run, config_files.load(CONFIG, fields), TOKENIZER)
  shutil.rmtree(moved)
  shutil.copytree(sets / "generation-other", moved)
  assert f"{PAINT}: {moved} has 6 records, fingerprint " in start(run, capsys, fields)


def test_what_is_accepted_is_what_the_next_start_compares_with(run, sets, capsys):
  other = identity(fields_of(sets, generation=((f"{sets}/generation-other", 1.0),)))
  data_record.check(run, other, data_record.digest(other)[:8])
  assert "it goes on with this data, as --accept_data=" in capsys.readouterr().err
  data_record.write(run, other)
  data_record.check(run, other, "")
  with refused(PAINT):
    data_record.check(run, identity(fields_of(sets)), data_record.digest(other)[:8])


def test_the_order_of_sources_and_the_latents_count(sets):
  two = identity(fields_of(sets, generation=((f"{sets}/generation", 1.0), (f"{sets}/generation-other", 1.0))))
  turned = two | {"generation": two["generation"][::-1]}
  assert data_record.differences(two, turned) == [f"{PAINT} lists its sources in another order"]
  made = two | {"generation": [two["generation"][0] | {"latents": "abc"}, two["generation"][1]]}
  (said,) = data_record.differences(two, made)
  assert said.endswith("has latents abc, and the run has begun with no latents")


def test_a_rule_that_holds_out_other_records_is_told(run, sets, capsys):
  """Refused where the run has kept its rule, and said where it has begun before that was kept."""
  now = identity([*fields_of(sets), "--config.data.validation=0.2"])
  by = lambda **rule: {task: [{k: x for k, x in s.items() if k != "rule"} | rule for s in now[task]] for task in now}
  for before, said in ((now, ""), (by(), "data.validation")):
    data_record.write(run, before)
    data_record.check(run, now, "")
    assert said in (err := capsys.readouterr().err) and err.count("\n") == bool(said)
  data_record.write(run, by(rule=1))
  with refused(PAINT, "data.validation"):
    data_record.check(run, now, "")


def test_rows_that_are_planned_in_another_way_are_other_data(run, sets):
  """A plan of many records that is lost is made by groups now; neither another start nor another process may mix them."""
  now = identity(fields_of(sets))
  grouped = now | {"generation": [now["generation"][0] | {"groups": 1}]}
  assert data_record.digest(grouped) != data_record.digest(now)
  for before, after in ((now, grouped), (grouped, now)):
    data_record.write(run, before)
    data_record.check(run, before, "")
    with refused(PAINT, "planned"):
      data_record.check(run, after, "")
  blocks = identity([*fields_of(sets), "--config.data.order=blocks"])
  assert all(source["groups"] for sources in blocks.values() for source in sources)


def test_workers_and_threads_and_shares_do_not_count(sets):
  fields = fields_of(sets)
  assert identity([*fields, "--config.data.workers=3", "--config.data.threads=5"]) == identity(fields)


def test_a_run_of_a_version_without_a_record_takes_what_it_finds(run, sets, capsys):
  (run / "data.json").unlink()
  data_record.check(run, identity(fields_of(sets)), "")
  assert "has no record of its data: that of this start is kept from now on" in capsys.readouterr().err
  other = fields_of(sets, generation=((f"{sets}/generation-other", 1.0),))  # its config has the name
  assert "holds a run with data.sources.generation=" in start(run, capsys, other)


@pytest.mark.parametrize(
  "spoiled",
  [
    "",
    "{",
    "[]",
    '{"text": 3}',
    '{"text": [{"source": "a", "records": "b", "fingerprint": "", "weight": 1, "latents": ""}]}',
    "\0" * 100,
  ],
)
def test_a_damaged_record_is_taken_from_a_checkpoint_or_refused(run, sets, capsys, spoiled):
  now = identity(fields_of(sets))
  (run / "data.json").write_text(spoiled)
  assert "data.json is damaged" in start(run, capsys, fields_of(sets))
  step = run / "checkpoints" / "5"
  step.mkdir(parents=True)
  (step / "manifest.json").write_text(json.dumps({"files": {}, "data": now}))
  assert data_record.read(run) == now
