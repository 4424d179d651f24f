"""The table of the ablations: signs against F, missing letters, what the files hold."""

import argparse
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

sys.path.insert(0, str(tiny.ROOT / "launch" / "experiments"))

import ablation_report as made
import ablation_table as paper
import ablations

from configs import ablation
from jflow.cli import evaluate
from jflow.evaluation import benchmarks, runner
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Generation, Question, save
from jflow.training import config_files
from jflow.world import scenes, source


def entry(shift: float, steps: int = 100, half: float = 0.05) -> dict:
  """`shift` is how much better than F it is, in every score."""
  scores = {}
  for row in paper.ROWS:
    value = 5 - shift if row.low_is_good else 0.5 + shift
    scores[f"seen {row.score}"] = {"value": value, "low": value - half, "high": value + half, "count": 9}
  accuracy = 0.7 + shift
  scores["seen questions: existence"] = {"value": accuracy, "low": accuracy - half, "high": accuracy + half, "count": 9}
  return {"steps": steps, "budget": 100, "pictures": {"read": 1234, "painted": 5}, "scores": scores, "groups": {}}


def test_differences_have_newcombes_interval_and_a_distance_that_is_less_is_better():
  letters = {"A": entry(-0.3), "B": entry(0.01), "C": None, "F": entry(0)}
  out = {(one["letter"], one["score"]): one for one in paper.compare(letters)}
  assert {letter for letter, _ in out} == {"A", "B"} and len(out) == 2 * len(paper.ROWS)
  for row in paper.ROWS:
    one = out["A", f"seen {row.score}"]
    assert one["better_by"] == pytest.approx(-0.3)
    assert (one["low"], one["high"]) == pytest.approx((-0.3 - 0.05 * 2**0.5, -0.3 + 0.05 * 2**0.5))
  # In the paper A is worse than F in FID, CLIP and POPE, and better in VQAv2.
  assert out["A", "seen pictures: FD-tex"]["paper_better_by"] == pytest.approx(17.61 - 19.84)
  assert out["A", "seen pictures: FD-tex"]["agrees"] and out["A", "seen questions: existence, F1"]["agrees"]
  assert out["A", "seen questions: overall"]["agrees"] is False
  assert out["B", "seen questions: overall"]["agrees"] is None  # 0 is within the interval
  for letter in "AF":  # both answer by chance: how often they say yes decides nothing
    letters[letter]["scores"]["seen questions: existence"]["low"] = 0.49
  (one,) = [one for one in paper.compare({x: letters[x] for x in "AF"}) if one["score"].endswith(", F1")]
  assert one["agrees"] is None


def test_trainings_of_two_letters_widen_the_interval_by_students_t():
  """Two of A, four of F: 4 degrees of freedom, t = 2.776, as tables of Student's distribution have it; B counts not."""
  name, shifts = "seen questions: overall", {"A": (-0.02, 0.02), "B": (-0.3, 0.3), "F": (-0.06, -0.06, 0.06, 0.06)}
  letters = {x: made.merged({i: entry(-0.2 - d) for i, d in enumerate(each)}) for x, each in shifts.items()}
  assert letters["A"]["scores"][name]["value"] == pytest.approx(0.3)
  assert letters["A"]["scores"][name]["each"] == pytest.approx([0.32, 0.28])
  assert letters["A"]["scores"][name]["count"] == 9 and set(letters["A"]["trainings"]) == {0, 1}
  variance = (2 * 0.02**2 + 4 * 0.06**2) / 4
  (one,) = [x for x in paper.compare(letters) if (x["letter"], x["score"]) == ("A", name)]
  half = (2 * 0.05**2 + 2.776**2 * variance * (1 / 2 + 1 / 4)) ** 0.5
  assert (one["low"], one["high"]) == pytest.approx((-half, half), rel=1e-3)
  once = paper.compare({x: made.merged({0: entry(0)}) for x in shifts})
  assert all(x["high"] == pytest.approx(0.05 * 2**0.5) for x in once)  # one training says nothing about others


@pytest.mark.parametrize("few", [{}, {"x": np.ones(1)}, {"x": np.ones(3)}, {"x": np.ones(4), "y": np.ones(2)}])
def test_without_pairs_the_interval_is_that_of_scores_apart(few):
  name = "seen pictures: overall"
  letters = {"A": entry(-0.2) | {"groups": {name: few}}, "F": entry(0) | {"groups": {name: {"x": np.zeros(4)}}}}
  (one,) = [x for x in paper.compare(letters) if x["score"] == name]
  assert one["high"] - one["low"] == pytest.approx(0.1 * 2**0.5)


def test_overall_scores_are_compared_by_pairs_of_equal_prompts():
  """Two kinds whose prompts differ much among themselves and little between letters; by hand."""
  name = "seen pictures: overall"
  f = {"x": np.array([0.0, 1.0, 1.0, 0.0]), "y": np.array([1.0, 0.0])}
  a = {"x": f["x"] - (0.1, 0.1, 0.3, 0.3), "y": f["y"] - 0.2}
  letters = {letter: entry(shift) | {"groups": {name: of}} for letter, shift, of in (("A", -0.2, a), ("F", 0.0, f))}
  (one,) = [x for x in paper.compare(letters) if x["score"] == name]
  half = 1.96 * ((4 * 0.1**2 / 3) / 4) ** 0.5 / 2  # the second kind's differences are all equal
  assert (one["better_by"], one["low"], one["high"]) == pytest.approx((-0.2, -0.2 - half, -0.2 + half), rel=1e-3)
  whole = made.merged({0: entry(0) | {"groups": {name: a}}, 1: entry(0) | {"groups": {name: f}}})
  np.testing.assert_allclose(whole["groups"][name]["x"], (a["x"] + f["x"]) / 2)
  other = entry(0) | {"groups": {name: {"x": np.zeros(3)}}}
  assert made.merged({0: entry(0) | {"groups": {name: a}}, 1: other})["groups"] == {}


@pytest.mark.parametrize("only", ["pictures", "questions", ""])
def test_what_is_right_of_each_prompt_makes_the_overall_scores(only, tmp_path):
  """True pictures for every second prompt, gray ones for the others; the answers to a question and its opposite."""
  settings = Settings("lone", "x", tmp_path, cache="", pictures=1, limit=6)
  lone = benchmarks.get("lone")(settings)
  records, rng = {}, np.random.default_rng(0)
  for task in lone.tasks():
    split, number = task.key.split("/")[1:3] if isinstance(task, Generation | Question) else ("", 0)
    if isinstance(task, Question):
      records[task.key] = {"key": task.key, "answer": "yes"}
      continue
    image = Image.new("RGB", (48, 48), (128, 128, 128))
    if isinstance(task, Generation) and int(number) % 2:
      wanted = lone._prompts[split][int(number)][1]
      while True:
        scene, combination = scenes.sample("colors", split, rng, *lone.scope[3:])
        if source.prompt(combination)[1] == wanted:
          break
      image = Image.fromarray(scene.render(48))
    save(image, tmp_path / task.file)
    records[task.key] = {"key": task.key, "file": task.file}
  (tmp_path / "records.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records.values()))
  if only == "pictures":
    (tmp_path / "records.jsonl").write_text("")
  if only == "questions":
    shutil.rmtree(tmp_path / "pictures/val")
    shutil.rmtree(tmp_path / "pictures/held_out")
  found = made.judged(tmp_path, {"benchmark": "lone"})
  expected = {} if only else lone.score(records).scores
  names = [f"{split} {kind}: overall" for split in ("seen", "held-out") for kind in ("pictures", "questions")]
  assert set(found) == {name for name in names if not only or only in name}
  for name, kinds in found.items():
    if name in expected:
      assert np.mean([x.mean() for x in kinds.values()]) == pytest.approx(expected[name].value)
  if only != "questions":
    np.testing.assert_array_equal(found["seen pictures: overall"]["colors"], [0, 1, 0, 1, 0, 1])


def test_a_training_that_has_not_come_as_far_is_left_out():
  whole = made.merged({0: entry(0, steps=50), 1: entry(0.2)})
  assert whole["steps"] == 100 and set(whole["trainings"]) == {1}
  assert whole["scores"]["seen questions: overall"]["each"] == [0.7]


def test_the_table_names_what_is_missing_and_unfinished():
  letters = {"A": entry(-0.3, steps=40), "B": None, "F": entry(0)}
  letters["F"]["scores"]["seen pictures: overall"]["chance"] = 0.02
  text = paper.table({"command": "c", "commit": "abc", "letters": letters, "comparisons": paper.compare(letters)})
  assert "Not trained yet: B (one latent encoder for both)." in text
  assert "| steps | 40 of 100 |  | 100 |" in text and "1,234 / 5" in text
  assert "0.500 (0.02)" in text and "| A | POPE / seen questions: existence, F1 | -2.33 | -0.300 |" in text
  rows = [line for line in text.splitlines() if line.startswith("| ")]
  assert len([line for line in rows if line.startswith("| paper: FID")]) == 1
  assert len({line.count("|") for line in rows if line.startswith(("| paper", "| seen", "| steps"))}) == 1


def test_the_files_are_of_all_trainings(tmp_path):
  """Two of A and F, each a config, a tokenizer, metrics and a report, but no weights."""
  config = config_files.load(f"{tiny.ROOT}/configs/ablation.py:F-tiny-20")
  reports = {}
  for letter, value in (("A", 0.2), ("F", 0.6)):
    for seed in (0, 4):
      workdir, scored = (tmp_path / f"seed{seed}" / x for x in (letter, f"scores/{letter}-20"))
      scored.mkdir(parents=True)
      shutil.copytree(tiny.TOKENIZER, workdir / "tokenizer")
      (workdir / "config.json").write_text(json.dumps(config.to_dict()))
      rows = [{"step": i, "loss_flow": 1 / i, "loss_text": float(seed)} for i in range(1, 21)]
      (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
      score = {"value": value + seed / 100, "low": 0.1, "high": 0.9, "count": 7}
      body = {"benchmark": "lone", "settings": {"fingerprint": f"{letter}{seed}", "only": None}, "commit": "c"}
      (scored / "report.json").write_text(json.dumps(body | {"scores": {"seen pictures: overall": score}, "notes": []}))
      for i in range(made.SHEET):
        (scored / "pictures/val").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "gray").save(scored / f"pictures/val/{i:04d}_0.png")
      (scored / "records.jsonl").write_text(json.dumps({"key": "ask/val/0000", "answer": "yes"}) + "\n")
      reports.setdefault(letter, {})[seed] = scored
  made.write(tmp_path, reports, {"A": 20, "B": 20, "F": 20}, "the command")
  body = json.loads((tmp_path / "results.json").read_text())
  assert body["letters"]["B"] is None
  whole = body["letters"]["F"]
  assert whole["trainings"]["4"]["fingerprint"] == "F4" and whole["pictures"]["painted"] > whole["pictures"]["read"] > 0
  assert whole["scores"]["seen pictures: overall"]["value"] == pytest.approx(0.62)
  assert whole["losses_of_the_last_twentieth"] == {"flow": 0.05, "text": 2.0}
  (one,) = body["comparisons"]
  assert (one["letter"], one["better_by"]) == ("A", pytest.approx(-0.4))
  text = (tmp_path / "table.md").read_text()
  assert "by 2 trainings of a letter" in text and "relation" not in text
  assert all((tmp_path / name).stat().st_size for name in ("losses.png", "pictures.png"))


@pytest.mark.parametrize("size, benchmark", [("quick", "lone"), ("world", "shapes")])
def test_each_size_is_scored_by_the_benchmark_of_its_scenes(size, benchmark, monkeypatch, tmp_path):
  monkeypatch.setattr(ablations, "steps_done", lambda _: 7)
  monkeypatch.setattr(ablations.checkpoints, "locate", lambda path: path)
  monkeypatch.setattr(ablations.report, "fingerprint", lambda *_: "of the weights")
  args = argparse.Namespace(folder=tmp_path, size=size, limit=None, guidance=3.0, pictures=None, batch_size=16)
  (command,) = ablations.scoring(args, ablations.Trial("D", 2))
  assert command == [
    "evaluate",
    f"--benchmark={benchmark}",
    f"--checkpoint={tmp_path}/seed2/D",
    f"--output={tmp_path}/seed2/scores/D-7-guidance3",
    "--batch_size=16",
    "--only=questions",
  ]
  runner.opened(evaluate.settings_of(evaluate.parser().parse_args(command[1:])))  # which it takes


def test_json_has_a_line_per_score_and_stays_what_it_was():
  body = {"letters": {"A": entry(0.123456)}}
  text = made.compact(body)
  assert json.loads(text)["letters"]["A"]["scores"]["seen questions: overall"]["value"] == 0.6235
  assert any('"seen questions: overall": { "value"' in line and '"count"' in line for line in text.splitlines())


def test_the_papers_table_has_what_each_letter_can_do():
  assert set(paper.WHAT) == set(ablation.LETTERS)
  for name, row in paper.PAPER.items():
    paints = name in ("FID", "CLIP")
    assert set(row) == set(ablation.LETTERS) - ({"D"} if paints else {"E"})


@pytest.mark.parametrize(
  "argument",
  [
    "--letters=AG",
    "--steps=0",
    "--steps=4",
    "--start=nowhere",
    "--seeds=0;1",
    "--config.train.seed=7",
    "--confg.train.seed=1",
  ],
)
def test_mistakes_end_before_any_training(argument, monkeypatch, capsys):
  monkeypatch.setattr(ablations, "run", lambda *_: pytest.fail("a command was started"))
  monkeypatch.setattr(sys, "argv", ["ablations.py", argument])
  with pytest.raises(SystemExit) as error:
    ablations.main()
  assert error.value.code == 2 and argument.split("=")[0] in capsys.readouterr().err


def test_slices_train_every_letter_in_turn(monkeypatch, tmp_path):
  """Each turn takes a letter as large a part of its steps as every other."""
  done, called = {}, []

  class Trained:  # at once
    returncode = 0

    def __init__(self, command, **_):
      flags = dict(one.removeprefix("--").split("=", 1) for one in command[4:])
      folder, letter = flags["workdir"].split("/")[-2:]
      assert folder == f"seed{flags['config.train.seed']}"
      done[folder, letter] = int(flags["config.train.steps"])
      called.append((folder, letter, done[folder, letter]))

    def poll(self):
      return self.returncode

  monkeypatch.setenv("GLIBC_TUNABLES", ablations.tunables())
  monkeypatch.setattr(ablations, "tunables", lambda: os.environ["GLIBC_TUNABLES"])
  monkeypatch.setattr(ablations.subprocess, "Popen", Trained)
  monkeypatch.setattr(ablations, "steps_done", lambda workdir: done.get(workdir.parts[-2:], 0))
  monkeypatch.setattr(ablations, "scoring", lambda *_: iter(()))
  monkeypatch.setattr(ablations.checkpoints, "locate", lambda path: path)
  monkeypatch.setattr(
    made, "write", lambda folder, reports, ends, command: called.append({x: sorted(y) for x, y in reports.items() if y})
  )
  flags = ["--size=tiny", "--steps=100", "--slice=40", "--start=s", "--letters=FD", "--seeds=3,5"]
  monkeypatch.setattr(sys, "argv", ["x", str(tmp_path), *flags])
  assert ablations.main() == 0
  turns = [("F", 33), ("D", 8), ("F", 66), ("D", 17), ("F", 100), ("D", 26)]
  trained, written = called[:-1], called[-1]
  of = lambda seed: [x[1:] for x in trained if x[0] == f"seed{seed}"]
  assert of(3) == turns == of(5) and written == {"D": [3, 5], "F": [3, 5]}


@pytest.fixture
def scripts(monkeypatch):
  """Lets `run` start the Python source that stands in a command's place."""
  popen = subprocess.Popen
  monkeypatch.setattr(
    ablations.subprocess, "Popen", lambda command, **rest: popen([sys.executable, "-c", command[3]], **rest)
  )


def test_two_queues_run_side_by_side_and_each_in_its_order(scripts, tmp_path):
  """The first of each queue waits for the other's: one at a time they would never end."""
  wait = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.05)"
  touch = "import pathlib; pathlib.Path({!r}).touch()\n"
  a, b = str(tmp_path / "a"), str(tmp_path / "b")
  seen = []

  def queue(name, *commands):
    for i, command in enumerate(commands):
      seen.append((name, i))
      yield [command]

  first = queue("x", touch.format(a) + wait.format(b), touch.format(a + "2"))
  ablations.run({"x": first, "y": queue("y", touch.format(b) + wait.format(a))}, tmp_path, jobs=2)
  assert seen[:2] == [("x", 0), ("y", 0)] and seen[2:] == [("x", 1)] and (tmp_path / "a2").exists()


def test_the_first_failure_ends_the_others_and_is_told(scripts, tmp_path, capfd):
  forever = "import time; time.sleep(600)"
  later = iter([["print('steps'); print('no such folder'); raise SystemExit(7)"], ["never"]])
  with pytest.raises(SystemExit) as error:
    ablations.run({"x": iter([[forever]]), "y": later}, tmp_path, jobs=2)
  assert error.value.code == 7 and list(later) == [["never"]]
  assert capfd.readouterr().err.splitlines()[-1] == "no such folder"
