"""The frame of `evaluate`: resumable samples, refused mistakes, reports; and the built-in world's benchmark."""

import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused
from tsv import pope_folder, pope_rows, write_table

import jflow
from configs import stage2
from jflow import outputs
from jflow.__main__ import main
from jflow.errors import Stopped
from jflow.evaluation import benchmarks, page, prompts, report, runner, sweep, tables, tasks
from jflow.evaluation.report import Result
from jflow.evaluation.samples import Samples
from jflow.evaluation.scores import Score
from jflow.evaluation.settings import Settings
from jflow.inference import loading
from jflow.interop import checkpoints
from jflow.world import benchmark, questions, references, scenes
from jflow.world import source as world


@pytest.fixture
def data(tmp_path):
  return pope_folder(tmp_path / "data")


# --- Samples on disk


def test_a_torn_line_is_made_again_and_whole_ones_stay(tmp_path):
  samples = Samples(tmp_path, {"a": 1})
  samples.add({"key": "x", "answer": "größer"})
  with open(tmp_path / "records.jsonl", "ab") as file:
    file.write(b'{"key": "y", "ans')
  samples.close()
  again = Samples(tmp_path, {"a": 1})
  assert list(again.read()) == ["x"]
  again.add({"key": "y", "answer": ""})
  assert list(again.read()) == ["x", "y"] and again.read()["x"]["answer"] == "größer"


def test_other_settings_and_a_second_writer_are_refused(tmp_path):
  first = Samples(tmp_path, {"guidance": 2.0, "limit": None})
  with refused("records.jsonl"):
    Samples(tmp_path, {"guidance": 2.0, "limit": None})
  first.close()
  with refused("guidance", "2.0", "3.0"):
    Samples(tmp_path, {"guidance": 3.0, "limit": None})


@pytest.mark.parametrize(
  "name, text",
  [
    *(("settings.json", text) for text in (b"", b"{", b"[]", b"\0\0\0", b"\xff", b"[" * 100_000, b"7")),
    *(
      ("records.jsonl", text + b"\n")
      for text in (
        b"{",
        b"[]",
        b"\0\0",
        b"\xff",
        b"[" * 100_000,
        b'{"key": [1]}',
        b'{"answer": "x"}',
        b'{"key": "1", "answer": 7}',
      )
    ),
  ],
)
def test_damaged_files_of_an_evaluation_are_named_and_stay(tmp_path, name, text):
  samples = Samples(tmp_path, {"a": 1})
  samples.add({"key": "0", "answer": "x"})
  samples.close()
  whole = b'{"key": "2", "answer": "y"}\n' if name == "records.jsonl" else b""
  with open(tmp_path / name, "ab" if whole else "wb") as file:
    file.write(text + whole)
  before = (tmp_path / "records.jsonl").read_bytes()
  with refused(name, "delete", *(["line 2"] if whole else [])):
    Samples(tmp_path, {"a": 1}).read()
  assert (tmp_path / "records.jsonl").read_bytes() == before and (tmp_path / name).read_bytes().endswith(text + whole)


def test_records_without_their_settings_are_no_other_evaluations(tmp_path):
  samples = Samples(tmp_path, {"guidance": 2.0})
  samples.add({"key": "0", "answer": "x"})
  samples.close()
  (tmp_path / "settings.json").unlink()
  for _ in range(2):
    with refused("settings.json"):
      Samples(tmp_path, {"guidance": 3.0})


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"scores": {"a": 1}, "settings": {}, "notes": []}', "[" * 9999])
def test_a_damaged_report_is_named(tmp_path, text):
  (tmp_path / "report.json").write_text(text)
  with refused("report.json"):
    report.scored_before(tmp_path, {})


def test_parts_cover_every_sample_once_and_read_each_other(tmp_path):
  keys = [str(i) for i in range(11)]
  parts = [Samples(tmp_path, {}, (k, 3)) for k in range(3)]
  assert sorted(key for part in parts for key in part.mine(keys)) == sorted(keys)
  for part in parts:
    for key in part.mine(keys):
      part.add({"key": key})
  assert set(parts[0].read()) == set(keys)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
  samples = Samples(tmp_path, {})
  whole, samples._file = samples._file, open("/dev/full", "wb", buffering=0)
  with refused("records.jsonl", "No space left", error=Stopped):
    samples.add({"key": "x"})
  monkeypatch.setattr(samples, "_file", types.SimpleNamespace(write=lambda line: len(line) - 1))
  with refused("records.jsonl", "No space left", error=Stopped):
    samples.add({"key": "x"})
  whole.close()

  def full(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  with refused("a.png", "No space left", error=Stopped):
    tasks.save(Image.new("RGB", (4, 4)), tmp_path / "a.png")
  with refused("report.json", "No space left", error=Stopped):
    report.write(tmp_path, "n", "what", Result({}), {}, {})
  assert not list(tmp_path.glob("*.part")) and not (tmp_path / "a.png").exists()


def test_two_processes_that_write_a_file_at_the_same_time_do_not_take_it_from_each_other(tmp_path, monkeypatch):
  """The second one begins and ends while the first one writes."""
  picture, real = Image.new("RGB", (4, 4)), pathlib.Path.replace

  def replace(new, path):
    monkeypatch.setattr(pathlib.Path, "replace", real)
    with monkeypatch.context() as other:
      other.setattr(os, "getpid", lambda: 1)
      write()
    return real(new, path)

  for write in (lambda: tasks.save(picture, tmp_path / "a.png"), lambda: outputs.replace(tmp_path / "b.json", "{}")):
    monkeypatch.setattr(pathlib.Path, "replace", replace)
    write()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.json"]


# --- The whole command


def test_a_reading_benchmark_from_file_to_report(tiny_checkpoint, data, tmp_path, capsys):
  output = tmp_path / "out"
  flags = [f"--checkpoint={tiny_checkpoint}", f"--data={data}", f"--output={output}", "--batch_size=3"]
  assert main(["evaluate", "--benchmark=pope", *flags]) == 0
  body = json.loads((output / "report.json").read_text())
  records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
  assert sorted(record["key"] for record in records) == list("012345")
  model = jflow.load(tiny_checkpoint)
  image = tables.Table(data / "POPE.tsv").images("4")
  alone = model.understand(prompts.pope(pope_rows()[4]), image)
  assert next(record["answer"] for record in records if record["key"] == "4") == alone
  assert body["scores"]["F1"]["paper"] == {"384": 88.0, "256": 85.3}
  settings = body["settings"]
  assert len(settings["fingerprint"]) == 64 and settings["system"] == "" and settings["dtype"] == "float32"
  assert settings["prompt"].startswith("<image>\nQUESTION\nAnswer") and settings["max_tokens"] == 512
  text = (output / "report.html").read_text()
  assert "88.00" in text and body["settings"]["fingerprint"] in text and "http" not in text
  assert "paper 384: 88.00" in capsys.readouterr().out
  before = (output / "records.jsonl").read_bytes()
  assert main(["evaluate", "--benchmark=pope", *flags]) == 0  # nothing is left to do
  assert (output / "records.jsonl").read_bytes() == before
  assert main(["evaluate", "--benchmark=pope", "--weights=raw", *flags]) == 2
  assert "holds predictions of another checkpoint" in capsys.readouterr().err
  write_table(data / "POPE.tsv", pope_rows()[:-1] + [pope_rows()[-1] | {"answer": "No"}])  # another file of that name
  assert main(["evaluate", "--benchmark=pope", *flags]) == 2
  assert "holds predictions made with data=" in capsys.readouterr().err


def test_the_dtype_of_the_first_predictions_stays(tiny_checkpoint, data, tmp_path, monkeypatch):
  """Begun on an accelerator, where bfloat16 is usual, and ended on a CPU."""
  flags = ["--benchmark=pope", f"--checkpoint={tiny_checkpoint}", f"--data={data}", f"--output={tmp_path / 'out'}"]
  monkeypatch.setattr(loading, "usual_dtype", lambda: "bfloat16")
  assert main(["evaluate", *flags, "--part=1/2"]) == 0
  monkeypatch.undo()
  opened = []
  load = loading.load
  monkeypatch.setattr(
    loading, "load", lambda *_, dtype, **more: opened.append(dtype) or load(tiny_checkpoint, dtype=dtype)
  )
  assert main(["evaluate", *flags, "--part=2/2"]) == 0
  assert opened == ["bfloat16"]
  assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["dtype"] == "bfloat16"
  assert main(["evaluate", *flags, "--dtype=float32"]) == 2


def test_a_step_that_is_saved_meanwhile_is_not_taken_for_the_one_that_was_hashed(
  tiny_checkpoint, data, tmp_path, monkeypatch
):
  workdir = tmp_path / "run"
  shutil.copytree(tiny_checkpoint, workdir)
  made, load, opened = report.fingerprint, loading.load, []

  def fingerprint(*arguments):
    found = made(*arguments)
    shutil.copytree(workdir / "checkpoints" / "0", workdir / "checkpoints" / "5")
    return found

  monkeypatch.setattr(report, "fingerprint", fingerprint)
  monkeypatch.setattr(loading, "load", lambda path, **more: opened.append(path) or load(path, **more))
  flags = ["--benchmark=pope", f"--checkpoint={workdir}", f"--data={data}", f"--output={tmp_path / 'out'}"]
  assert main(["evaluate", *flags]) == 0
  settings = json.loads((tmp_path / "out" / "report.json").read_text())["settings"]
  assert opened == [workdir / "checkpoints" / "0"] and settings["read_from"] == str(workdir / "checkpoints" / "0")
  assert "read_from" not in json.loads((tmp_path / "out" / "settings.json").read_text())


def test_parts_share_the_work_and_the_last_one_writes_the_report(tiny_checkpoint, data, tmp_path, capsys):
  flags = ["--benchmark=pope", f"--checkpoint={tiny_checkpoint}", f"--data={data}", f"--output={tmp_path / 'out'}"]
  assert main(["evaluate", *flags, "--part=2/2"]) == 0
  assert "3 of 6 samples are left to the other parts" in capsys.readouterr().err
  assert not (tmp_path / "out" / "report.json").exists()
  assert main(["evaluate", *flags, "--part=1/2"]) == 0
  body = json.loads((tmp_path / "out" / "report.json").read_text())
  assert main(["evaluate", *flags[:3], f"--output={tmp_path / 'whole'}"]) == 0
  assert body["scores"] == json.loads((tmp_path / "whole" / "report.json").read_text())["scores"]


def test_mistakes_are_one_line_and_exit_code_2(tiny_checkpoint, tmp_path, capsys):
  flags = [f"--checkpoint={tiny_checkpoint}", f"--output={tmp_path / 'out'}"]
  for more, message in (
    (["--benchmark=pope"], "needs --data=DIR: download https"),
    (["--benchmark=pope", f"--data={tmp_path / 'no'}"], "does not exist: download https"),
    (["--benchmark=mme", f"--data={tmp_path}"], "MME.tsv does not exist: download https"),
    (
      ["--benchmark=mme", "--guidance=3"],
      "--guidance=3.0 does not belong to --benchmark=mme, but to dpg, geneval, lone, mj",
    ),
    (["--benchmark=shapes", "--features=x.npz"], "--features=x.npz does not belong"),
    (["--benchmark=geneval", "--only=pictures"], "--only=pictures does not belong"),
    (["--benchmark=geneval", "--results=no.jsonl"], "--results=no.jsonl does not exist"),
    (["--benchmark=shapes", "--guidance=0.5"], "--guidance=0.5 must be at least 1"),
    (["--benchmark=shapes", "--steps=0", "--checkpoint=nowhere"], "--steps=0 must be at least 1"),
    (["--benchmark=mme", "--solver=heun"], "--solver=heun does not belong to --benchmark=mme, but to dpg"),
    (["--benchmark=shapes", "--sweep_guidance=2,0.5"], "--guidance=0.5 must be at least 1"),
    (["--benchmark=shapes", "--limit=1", "--seed=-1"], "seed=-1 "),
    (["--benchmark=shapes", f"--seed={2**32}", "--limit=1"], "seed=4294967296 "),
    (["--benchmark=shapes", f"--seed={2**32 - 1}", "--limit=1"], "seed=4294967295 "),
    (["--benchmark=shapes", "--limit=1", f"--output={tiny_checkpoint}/config.json"], "cannot be made: File exists"),
    (["--benchmark=shapes", "--limit=1", "--output=/proc"], "--output: directory /proc cannot be written"),
  ):
    assert main(["evaluate", *flags, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jflow: ") and error.count("\n") == 1 and message in error
  assert not (tmp_path / "out").exists()


_KILLED = """
import os, signal, sys
from jflow.__main__ import main
from jflow.evaluation.samples import Samples
add, added = Samples.add, []
def struck(self, record):
  add(self, record)
  added.append(record)
  if len(added) == 3:
    os.kill(os.getpid(), signal.SIGKILL)
Samples.add = struck
main(sys.argv[1:])
"""


def test_a_killed_evaluation_goes_on_and_ends_as_if_it_had_not_been(tiny_checkpoint, tmp_path):
  """kill -9 in the middle of painting; the pictures and the scores are those of a run without it."""
  flags = [
    "--benchmark=shapes",
    f"--checkpoint={tiny_checkpoint}",
    "--limit=6",
    "--pictures=1",
    "--steps=2",
    "--batch_size=2",
  ]
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  command = [sys.executable, "-c", _KILLED, "evaluate", *flags, f"--output={killed}"]
  assert subprocess.run(command, cwd=tiny.ROOT).returncode == -signal.SIGKILL
  assert (killed / "records.jsonl").read_bytes().count(b"\n") == 3 and not (killed / "report.json").exists()
  assert main(["evaluate", *flags, f"--output={killed}"]) == 0
  assert main(["evaluate", *flags, f"--output={whole}"]) == 0
  scores = [json.loads((path / "report.json").read_text())["scores"] for path in (killed, whole)]
  assert scores[0] == scores[1]
  pictures = sorted(whole.rglob("pictures/**/*.png"))
  assert pictures
  for picture in pictures:
    other = killed / picture.relative_to(whole)
    assert np.abs(np.asarray(Image.open(picture), int) - np.asarray(Image.open(other), int)).max() <= 1


def test_noise_of_a_seed_is_that_of_generate(tiny_checkpoint):
  model = jflow.load(tiny_checkpoint)
  noise = model.sampler.start([5, 6]).transpose(0, 3, 1, 2)
  by_seed = model.generate("a picture of a star", steps=2, seed=5, num_images=2)
  by_noise = model.generate(["a picture of a star"] * 2, steps=2, noise=noise)
  for a, b in zip(by_seed, by_noise):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- The built-in world


def shapes_benchmark(output, **more):
  return benchmarks.get("shapes")(Settings("shapes", "x", output, cache="", **more))


def test_predictions_about_another_world_are_refused(tmp_path, monkeypatch):
  benchmark = shapes_benchmark(tmp_path / "out")
  assert {path.name for path in benchmark.data_files()} == {"scenes.py", "words.py", "questions.py", "source.py"}
  settings = lambda: runner.identity_of(benchmark, "f", benchmark.data_files())
  Samples(tmp_path / "out", settings()).close()
  Samples(tmp_path / "out", settings()).close()
  edited = tmp_path / "scenes.py"
  edited.write_text(pathlib.Path(scenes.__file__).read_text() + "# edited\n")
  monkeypatch.setattr(world, "CODE", (edited, *world.CODE[1:]))
  with refused("data="):
    Samples(tmp_path / "out", settings())


def test_every_picture_of_the_world_starts_from_noise_of_its_own(tmp_path):
  benchmark = shapes_benchmark(tmp_path, limit=12, pictures=2)
  painted = [task for task in benchmark.tasks() if isinstance(task, tasks.Generation)]
  assert len({task.seed for task in painted}) == len(painted) == 2 * 2 * 12  # two splits


def test_true_pictures_and_true_answers_score_one(tmp_path):
  """Renders of what each prompt asks for, and the world's own answers, in the place of a model's."""
  benchmark = shapes_benchmark(tmp_path, limit=48, pictures=1)
  records = {}
  rng = np.random.default_rng(0)
  for task in benchmark.tasks():
    if isinstance(task, tasks.Generation):
      split, number = task.key.split("/")[1:3]
      metadata = benchmark._prompts[split][int(number)][1]
      tasks.save(Image.fromarray(_drawn(metadata, split, rng).render(64)), tmp_path / task.file)
      records[task.key] = {"file": task.file}
    elif isinstance(task, tasks.RoundTrip):
      tasks.save(Image.fromarray(task.picture(64)), tmp_path / task.file)
      records[task.key] = {"file": task.file}
    else:
      split, number = task.key.split("/")[1:]
      records[task.key] = {"answer": benchmark._questions[split][int(number)][1].answer}
  result = benchmark.score(records)
  for name, score in result.scores.items():
    if "FD-" not in name and "MMD" not in name and "less" not in name:
      assert score.value == 1, name
  for split in ("seen", "held-out"):
    overall = result.scores[f"{split} pictures: overall"]
    assert overall.chance < 0.25 and overall.low < 1 and overall.beside == {"ceiling of the autoencoder": 1}
    assert all(value < 0.8 for value in result.scores[f"{split} questions: overall"].beside.values())
    fd, floor = (result.scores[f"{split} pictures: FD-state{end}"] for end in ("", ", floor"))
    assert fd.value < 2 * floor.value and floor.low <= floor.value <= floor.high and fd.low < fd.value < fd.high
    assert f"{split} pictures: FD-tex, floor" not in result.scores  # fewer pictures than features
  assert len(result.pictures) == 6 + 4


def test_lone_objects_are_those_that_size_quick_learns(tmp_path):
  benchmark = benchmarks.get("lone")(Settings("lone", "x", tmp_path, cache="", pictures=1))
  quick = stage2.get_config("quick").data.shapes
  assert benchmark.scope[3:] == (quick.large, quick.spread) and set(benchmark.scope.prompts) == set(quick.tags)
  records, rng = {}, np.random.default_rng(0)
  for task in benchmark.tasks():
    if isinstance(task, tasks.Question):
      split, number = task.key.split("/")[1:]
      scene, question = benchmark._questions[split][int(number)]
      (thing,) = scene.objects
      assert max(abs(thing.x - 0.5), abs(thing.y - 0.5)) <= quick.spread and question.kind in benchmark.scope.kinds
      records[task.key] = {"answer": question.answer}
    else:
      picture = task.picture if isinstance(task, tasks.RoundTrip) else None
      if picture is None:
        split, number = task.key.split("/")[1:3]
        picture = _drawn(benchmark._prompts[split][int(number)][1], split, rng, *benchmark.scope[3:]).render
      tasks.save(Image.fromarray(picture(64)), tmp_path / task.file)
      records[task.key] = {"file": task.file}
  result = benchmark.score(records)
  (tmp_path / "pictures" / "val" / "0000_0.png").write_bytes(b"x")
  with refused(tmp_path / "pictures" / "val" / "0000_0.png", "delete"):
    benchmark.score(records)
  scores = result.scores
  assert "FD-tex" not in "".join([*result.notes, *scores])
  for split, count in (("seen", 68), ("held-out", 12)):
    assert scores[f"{split} pictures: overall"].value == scores[f"{split} questions: overall"].value == 1
    assert scores[f"{split} pictures: colors"].count == count and scores[f"{split} pictures: colors"].chance < 0.1
  assert len({text for text, _ in benchmark._prompts["val"]}) == len(scenes.SEEN_PAIRS) == 68
  assert scores["seen pictures: FD-state"].value < 2 * scores["seen pictures: FD-state, floor"].value


def _drawn(metadata, split, rng, *sizes):
  """A scene that shows what the metadata ask for."""
  wanted = {(one["class"], one.get("color"), one.get("count")) for one in metadata["include"]}
  while True:
    scene, combination = scenes.sample(metadata["tag"], split, rng, *sizes)
    have = {(shape, color, combination.count) for shape, color in combination.pairs}
    relation = [one["position"][0] for one in metadata["include"] if "position" in one]
    if have == wanted and (not relation or relation[0] == combination.relation):
      if not relation or combination.pairs[0][0] == metadata["include"][1]["class"]:
        return scene


def test_the_nearest_picture_answers_for_a_picture_that_is_almost_one_of_training():
  known = questions.for_evaluation("train", references.LEARNED, 1)[:200]
  asked = [(scene._replace(background=scene.background + 1), question) for scene, question in known]
  for kind, found in references.baselines(asked).items():
    assert found[references.NEAREST] >= 0.95, kind
    answers = [q.answer for _, q in asked if q.kind == kind]
    assert found[references.FREQUENT] == max(map(answers.count, answers)) / len(answers)


def test_features_of_true_pictures_are_kept(tmp_path, monkeypatch):
  make = lambda name, **kinds: references.features_of_renders(
    "val", ["colors", "counting"], 4, 48, name, tmp_path, **kinds
  )
  first, other = make("a"), make("b")
  alone = make("a", kinds=("state",))
  assert alone.keys() == {"state"} and np.array_equal(alone["state"], first["state"])  # not the file of both
  (kept,) = [path for path in tmp_path.iterdir() if np.array_equal(np.load(path).get("tex"), first["tex"])]
  monkeypatch.setattr(references, "renders", lambda *_: pytest.fail("drawn again"))
  np.testing.assert_array_equal(make("a")["state"], first["state"])
  assert first["tex"].shape == (4, 228) and not np.array_equal(first["tex"], other["tex"])


def test_answers_to_the_world_are_judged_by_kind():
  asked = lambda answer, kind, text="?": questions.Question(text, answer, kind)
  assert benchmark.right(asked("yes", "existence"), "Yes.") and not benchmark.right(asked("no", "existence"), "Yes.")
  assert not benchmark.right(asked("no", "relation"), "maybe")
  assert benchmark.right(asked("two", "count"), "2") and benchmark.right(asked("zero", "count"), "none")
  assert benchmark.right(asked("red", "color"), "Red.") and not benchmark.right(asked("red", "color"), "dark red")
  options = "What color is it?\nA. red\nB. blue\nC. pink\nD. brown\nAnswer with"
  assert benchmark.right(asked("B", "choice", options), "B.") and benchmark.right(asked("B", "choice", options), "blue")
  assert not benchmark.right(asked("B", "choice", options), "A")


# --- Reports


def test_a_report_escapes_what_it_shows_and_holds_its_pictures(tmp_path):
  result = Result({"a<b": Score(0.5, 0.4, 0.6, 10, 0.1)}, ["x & y"], [("Sheet", Image.new("RGB", (4, 4), "red"))])
  body = report.write(tmp_path, "n", "what", result, {"a<b": {"384": 0.7}}, {"prompt": "<script>"})
  text = (tmp_path / "report.html").read_text()
  assert "a&lt;b" in text and "x &amp; y" in text and "&lt;script&gt;" in text and "<script>" not in text
  assert "data:image/png;base64," in text and (tmp_path / "sheet.png").is_file()
  assert body["scores"]["a<b"] == {
    "value": 0.5,
    "low": 0.4,
    "high": 0.6,
    "count": 10,
    "chance": 0.1,
    "paper": {"384": 0.7},
  }
  assert "0.500  [0.400, 0.600]  chance 0.100  paper 384: 0.700" in report.table(body)


def test_a_report_opens_with_a_verdict_and_bars_and_folds_the_numbers(tmp_path):
  scores = {"seen: a": Score(0.5, 0.4, 0.6, 10), "seen: b": Score(0.9, 0.8, 0.95, 10), "overall": Score(0.7)}
  goals = {"seen: a": 0.8, "seen: b": 0.9}
  sheet, settings = ("Sheet", Image.new("RGB", (4, 4), "red")), {"checkpoint": "runs/mine"}
  body = report.write(tmp_path, "n", "what", Result(scores, ["x"], [sheet]), {}, settings, goals)
  assert [body["scores"][name].get("goal") for name in scores] == [0.8, 0.9, None]
  text = (tmp_path / "report.html").read_text()
  places = [text.index(x) for x in ("runs/mine", body["date"][:10], "1 of 2 goals", 'class="bars', "<img", "<table")]
  assert places == sorted(places) and text.count('class="fill"') == 2 and "seen: a, 0.500 of 0.800" in text
  assert "left:80.00%" in text and "left:40.00%;width:20.00%" in text  # the goal; the interval
  before = [text[: found.start()] for found in re.finditer("<table", text)]
  assert len(before) == 3 and all(part.count("<details") == part.count("</details") + 1 for part in before)


@pytest.mark.parametrize(
  ("scores", "said"),
  [
    ({}, "No scores yet"),
    ({"FID": {"value": 9.8, "paper": {"384": 9.51}}, "x": {"value": 1.0}}, "FID 9.80, in the paper 9.51 (384)."),
    ({"a": {"value": 0.1}, "a: overall": {"value": 0.5, "low": 0.4, "high": 0.6}}, "a: overall 0.500 [0.400, 0.600]."),
    ({"a": {"value": 0.9, "goal": 0.9}}, "The goal is reached."),
  ],
)
def test_the_verdict_compares_with_what_there_is(scores, said):
  assert page.verdict(scores).startswith(said)


def test_a_fingerprint_changes_with_weights_and_configuration(tiny_checkpoint, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(tiny_checkpoint, copy)
  fingerprint = lambda path, *more: report.fingerprint(checkpoints.locate(path), *more)
  assert fingerprint(tiny_checkpoint, "ema") == fingerprint(copy, "ema") != fingerprint(copy, "raw")
  vae = tmp_path / "vae"
  vae.mkdir()
  with refused("--vae=", "config.json"):
    fingerprint(tiny_checkpoint, "ema", vae)
  (vae / "config.json").write_text("{}")
  found = []
  for content in (b"a", b"b"):
    (vae / "model.safetensors").write_bytes(content)
    found.append(fingerprint(tiny_checkpoint, "ema", vae))
  assert len({*found, fingerprint(tiny_checkpoint, "ema")}) == 3
  config = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(config | {"more": 1}))
  assert fingerprint(tiny_checkpoint, "ema") != fingerprint(copy, "ema")


def test_an_outside_scorers_findings_stay_and_are_plotted(tiny_checkpoint, tmp_path, capsys):
  """GenEval: a sweep paints, its evaluator's results go into each setting, the same sweep then has its plot."""
  (tmp_path / "evaluation_metadata.jsonl").write_text(
    '{"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}\n'
  )
  base = ["evaluate", "--benchmark=geneval", f"--checkpoint={tiny_checkpoint}", f"--data={tmp_path}", "--pictures=2"]
  swept = [*base, f"--output={tmp_path / 'out'}", "--sweep_guidance=1,3", "--sweep_steps=1"]
  assert main(swept) == 0
  assert "no scores to plot yet" in capsys.readouterr().out
  for w in (1, 3):
    output = tmp_path / "out" / f"guidance{w}_steps1"
    rows = [
      {
        "filename": f"{output}/pictures/00000/samples/0000{j}.png",
        "tag": "colors",
        "prompt": "a photo of a cow",
        "correct": j < w // 2,
      }
      for j in range(2)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = [*base, f"--output={output}", f"--guidance={w}", "--steps=1", f"--results={tmp_path / 'results.jsonl'}"]
    assert main(one) == 0
    body = json.loads((output / "report.json").read_text())
    assert any("Not the benchmark's settings: --guidance" in note for note in body["notes"])
    assert "sha256" in body["settings"]["results"]
  assert main(swept) == 0
  rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
  assert [(row["guidance"], row["overall"]) for row in rows] == [(1, 0), (3, 0.5)]


# --- Sweeps


def test_a_sweep_makes_a_plot_of_all_pairs_and_goes_on(tiny_checkpoint, tmp_path, capsys):
  flags = [
    "--benchmark=shapes",
    f"--checkpoint={tiny_checkpoint}",
    "--limit=2",
    "--pictures=1",
    f"--output={tmp_path / 'out'}",
  ]
  assert main(["evaluate", *flags, "--sweep_guidance=1.5,3", "--sweep_steps=2"]) == 0
  body = json.loads((tmp_path / "out" / "sweep.json").read_text())
  assert [(row["guidance"], row["steps"]) for row in body["rows"]] == [(1.5, 2), (3.0, 2)]
  one = json.loads((tmp_path / "out" / "guidance3_steps2" / "report.json").read_text())
  assert one["settings"]["guidance"] == 3.0
  assert body["rows"][1]["seen pictures: overall"] == one["scores"]["seen pictures: overall"]["value"]
  assert Image.open(tmp_path / "out" / "sweep.png").width > 400
  assert any(
    "Not the benchmark's settings: --guidance=3.0, --steps=2, --pictures=1, --limit=2." in note for note in one["notes"]
  )
  assert body["settings"]["fingerprint"] == one["settings"]["fingerprint"] and body["settings"]["limit"] == 2
  low, high = body["rows"][1]["intervals"]["seen pictures: overall"]
  assert low <= body["rows"][1]["seen pictures: overall"] <= high
  assert main(["evaluate", *flags, "--sweep_steps=1", "--guidance=3"]) == 0  # adds a point
  body = json.loads((tmp_path / "out" / "sweep.json").read_text())
  assert [(row["guidance"], row["steps"]) for row in body["rows"]] == [(1.5, 2), (3.0, 1), (3.0, 2)]
  capsys.readouterr()
  assert main(["evaluate", *flags, "--sweep_guidance=2", "--guidance=3"]) == 2
  assert "--guidance and --sweep_guidance exclude each other" in capsys.readouterr().err
  assert main(["evaluate", *flags, "--sweep_steps=5,0"]) == 2
  assert "--steps=0 must be at least 1" in capsys.readouterr().err
  assert main(["evaluate", "--benchmark=pope", "--sweep_steps=2", "--checkpoint=x", "--output=y"]) == 2
  assert "generates no pictures" in capsys.readouterr().err


def test_a_plot_has_a_line_per_number_of_steps_and_none_for_floors():
  score = lambda value: {"value": value, "low": value - 0.1, "high": value + 0.1}
  found = {
    (w, s): {
      "seen pictures: overall": score(w * s / 100),
      "seen pictures: FD-tex, floor": score(1),
      "FID": {"value": w},
    }
    for w in (1.0, 2.0, 4.0)
    for s in (5, 30)
  }
  names = sweep.plotted(found)
  assert names == ["seen pictures: overall", "FID"]
  panel = sweep.figure(found, names, ["guidance", "steps"]).axes[0]
  assert [line.get_label() for line in panel.lines] == ["steps 5", "steps 30"]
  np.testing.assert_allclose(panel.lines[1].get_xydata(), [(1, 0.3), (2, 0.6), (4, 1.2)])
