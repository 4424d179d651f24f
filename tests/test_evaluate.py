"""The frame of `evaluate`: resumable samples, refused mistakes, reports; and the built-in world's benchmark."""

import base64
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from PIL import Image

import jflow
from jflow.__main__ import main
from jflow.data import images, scenes, shapes
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.evaluation import references, report, sweep, tables, tasks, world
from jflow.evaluation.command import parser, settings_of, with_flags
from jflow.evaluation.recipes import RECIPES
from jflow.evaluation.report import Result
from jflow.evaluation.samples import Samples
from jflow.evaluation.scores import Score
from jflow.training.checkpoint import save_params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("evaluate") / "model"
  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  save_params(path, tiny.params(), config, Tokenizer.load(str(tiny.TOKENIZER)))
  return str(path)


def png(color: str) -> str:
  buffer = io.BytesIO()
  Image.new("RGB", (8, 6), color).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def write_table(path, rows: list[dict]) -> None:
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
    writer.writeheader()
    writer.writerows(rows)


def pope_rows(count: int = 6) -> list[dict]:
  return [
    {
      "index": i,
      "image": png("red") if i % 3 == 0 else i - i % 3,
      "question": f"Is there a cat {i}? Please answer yes or no.",
      "answer": "Yes" if i % 2 else "No",
      "category": "random,popular",
    }
    for i in range(count)
  ]


@pytest.fixture
def data(tmp_path):
  folder = tmp_path / "data"
  folder.mkdir()
  write_table(folder / "POPE.tsv", pope_rows())
  return folder


# --- Samples on disk


def test_a_torn_line_is_made_again_and_whole_ones_stay(tmp_path):
  samples = Samples(tmp_path, {"a": 1})
  samples.add({"key": "x", "answer": "größer"})
  with open(tmp_path / "records.jsonl", "ab") as file:
    file.write(b'{"key": "y", "ans')
  samples._file.close()
  again = Samples(tmp_path, {"a": 1})
  assert list(again.read()) == ["x"]
  again.add({"key": "y", "answer": ""})
  assert list(again.read()) == ["x", "y"] and again.read()["x"]["answer"] == "größer"


def test_other_settings_and_a_second_writer_are_refused(tmp_path):
  first = Samples(tmp_path, {"guidance": 2.0, "limit": None})
  with pytest.raises(UserError, match="another process writes records.jsonl"):
    Samples(tmp_path, {"guidance": 2.0, "limit": None})
  first._file.close()
  with pytest.raises(UserError, match=r"guidance=2.0, not 3.0"):
    Samples(tmp_path, {"guidance": 3.0, "limit": None})


def test_parts_cover_every_sample_once_and_read_each_other(tmp_path):
  keys = [str(i) for i in range(11)]
  parts = [Samples(tmp_path, {}, (k, 3)) for k in range(3)]
  assert sorted(key for part in parts for key in part.mine(keys)) == sorted(keys)
  for part in parts:
    for key in part.mine(keys):
      part.add({"key": key})
  assert set(parts[0].read()) == set(keys)


# --- Tables


def test_images_come_from_their_row_or_the_row_they_refer_to(data):
  table = tables.Table(data / "POPE.tsv")
  for index in ("0", "1", "3", "5"):
    (image,) = table.images(index)
    assert image.size == (8, 6) and image.getpixel((0, 0)) == (255, 0, 0)
  assert "image" not in table.rows[0]


def test_several_images_and_line_breaks_in_a_row(tmp_path):
  rows = [
    {
      "index": 1,
      "image": str([png("red"), png("blue")]),
      "question": 'two\nlines "quoted"',
      "answer": "é\tx",
    },
    {"index": 2, "image": png("lime"), "question": "b", "answer": "c"},
  ]
  write_table(tmp_path / "t.tsv", rows)
  table = tables.Table(tmp_path / "t.tsv")
  assert [image.getpixel((1, 1)) for image in table.images("1")] == [(255, 0, 0), (0, 0, 255)]
  assert table.images("2")[0].getpixel((1, 1)) == (0, 255, 0)
  assert table.rows[0]["question"] == 'two\nlines "quoted"' and table.rows[0]["answer"] == "é\tx"


@pytest.mark.parametrize(
  "change, message",
  [
    ({"answer": ""}, "index 2, has no field 'answer'"),
    ({"image": "77"}, "index 2: its image '77' is no row with an image"),
    ({"image": "A" * 80}, "index 2: its image cannot be decoded"),
    ({"image": str([7, 8]) + " " * 80}, "index 2: its image cannot be decoded"),
    ({"index": 1}, "index 1 comes twice"),
  ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
  rows = pope_rows()
  rows[2] |= change
  write_table(tmp_path / "POPE.tsv", rows)
  with pytest.raises(UserError, match=message):
    benchmark = tables.TableBenchmark(RECIPES["pope"], tmp_path, None)
    for task in benchmark.tasks():
      task.images()


def test_the_prompts_are_those_of_the_kit():
  mark, short = "<image>", "\nAnswer the question using a single word or phrase."
  asked = {"question": "Is it? Please answer yes or no."}
  assert tables.yes_no_prompt(asked) == f"{mark}\n{asked['question']}{short}"
  assert tables.pope_prompt(asked) == f"{mark}\nIs it?{short}"
  assert tables.short_prompt({"question": "Who?"}) == f"{mark}Who?{short}"
  row = {"question": "Which?", "A": "x", "B": "y", "C": "", "hint": "Look."}
  letter = "Answer with the option's letter from the given choices directly."  # a blank line stands before it
  assert tables.choice_prompt(row) == f"{mark}\nHint: Look.\nWhich?\nA. x\nB. y\n\n{letter}"
  assert (
    tables.choice_prompt({"question": "Why?", "A": ""}) == f"{mark}\nWhy?\nAnswer the question directly. "
  )


def test_open_questions_of_mmmu_have_their_answer_as_first_option(tmp_path):
  row = {
    "index": 1,
    "image": png("red"),
    "question": "q",
    "A": "",
    "answer": "42 m",
    "category": "x",
    "split": "validation",
  }
  write_table(tmp_path / "MMMU_DEV_VAL.tsv", [row, row | {"index": 2}, row | {"index": 3, "split": "dev"}])
  benchmark = tables.TableBenchmark(RECIPES["mmmu"], tmp_path, None)
  out = benchmark.score({"1": {"answer": "about 42 m"}, "2": {"answer": "41 m"}})
  assert out.scores["overall"].value == 50 and out.scores["overall"].count == 2


def test_a_question_with_several_pictures_is_asked_with_all_of_them_first(checkpoint, tmp_path):
  """As the kit asks MMMU; the marks inside its texts are words."""
  row = {
    "index": 1, "image": str([png("red"), png("blue")]), "question": "Is <image 1> like <image 2>?", "A": "yes", "B": "no",
    "answer": "A", "category": "x", "split": "validation",
  }  # fmt: skip
  write_table(tmp_path / "MMMU_DEV_VAL.tsv", [row, row | {"index": 2, "image": png("red")}])
  benchmark = tables.TableBenchmark(RECIPES["mmmu"]._replace(max_tokens=3), tmp_path, None)
  model, samples, done = jflow.load(checkpoint), Samples(tmp_path / "out", {}), []
  tasks.answer(model, benchmark.tasks(), samples, 2, done.append)
  images = tables.Table(tmp_path / "MMMU_DEV_VAL.tsv").images("1")
  text = tables.choice_prompt(row).removeprefix("<image>")
  alone = model.understand(f"<image><image>{text}", images, 3)
  assert samples.read()["1"]["answer"] == alone and sum(done) == 2


def test_rows_about_one_picture_are_known_to_be(data):
  table = tables.Table(data / "POPE.tsv")
  assert [table.picture(str(i)) for i in range(6)] == ["0", "0", "0", "3", "3", "3"]


def test_a_limit_keeps_whole_questions(tmp_path):
  rows = [
    {"index": i + 1_000_000 * turn, "image": png("red"), "question": "q", "A": "x", "answer": "A", "category": "c"}
    for turn in range(3)
    for i in (5, 6, 7)
  ]
  write_table(tmp_path / "MMBench_DEV_EN.tsv", rows)
  benchmark = tables.TableBenchmark(RECIPES["mmbench"], tmp_path, 2)
  assert [task.key for task in benchmark.tasks()] == ["5", "6", "1000005", "1000006", "2000005", "2000006"]
  write_table(tmp_path / "MMBench_DEV_EN.tsv", [rows[0] | {"index": "a7"}])
  with pytest.raises(UserError, match="row 1: the index 'a7' is no number"):
    tables.TableBenchmark(RECIPES["mmbench"], tmp_path, None)
  (tmp_path / "MME.tsv").write_text("index\tquestion\n")
  with pytest.raises(UserError, match="--limit=5: MME adds up whole categories"):
    tables.TableBenchmark(RECIPES["mme"], tmp_path, 5)


def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path):
  (tmp_path / "POPE.tsv").write_bytes(b"index\tquestion\n1\t\xff\xfe\n")
  with pytest.raises(UserError, match="POPE.tsv, row 1, is no tab-separated UTF-8 text"):
    tables.Table(tmp_path / "POPE.tsv")


def test_pictures_of_tables_keep_to_the_limits_of_images(tmp_path, monkeypatch):
  """Alpha is dropped, as the published code opens pictures; more pixels than `images` allows are refused."""
  buffer = io.BytesIO()
  Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(buffer, "PNG")
  row = pope_rows(1)[0] | {"image": base64.b64encode(buffer.getvalue()).decode()}
  write_table(tmp_path / "POPE.tsv", [row])
  table = tables.Table(tmp_path / "POPE.tsv")
  assert table.images("0")[0].getpixel((0, 0)) == (200, 100, 50)
  monkeypatch.setattr(images, "MAX_PIXELS", 15)
  with pytest.raises(UserError, match="index 0: its image cannot be decoded: 4 x 4 is more than 15 pixels"):
    table.images("0")


def test_missing_samples_are_counted(data):
  benchmark = tables.TableBenchmark(RECIPES["pope"], data, None)
  with pytest.raises(UserError, match=r"pope: 4 of 6 samples are missing \(2, 3, 4"):
    benchmark.score({"0": {"answer": "yes"}, "1": {"answer": "no"}})


# --- The whole command


def test_a_reading_benchmark_from_file_to_report(checkpoint, data, tmp_path, capsys):
  output = tmp_path / "out"
  flags = [f"--checkpoint={checkpoint}", f"--data={data}", f"--output={output}", "--batch_size=3"]
  assert main(["evaluate", "--benchmark=pope", *flags]) == 0
  body = json.loads((output / "report.json").read_text())
  records = [json.loads(line) for line in (output / "records.jsonl").read_text().splitlines()]
  assert sorted(record["key"] for record in records) == list("012345")
  model = jflow.load(checkpoint)
  image = tables.Table(data / "POPE.tsv").images("4")
  alone = model.understand(tables.pope_prompt(pope_rows()[4]), image)
  assert next(record["answer"] for record in records if record["key"] == "4") == alone
  assert body["scores"]["F1"]["paper"] == {"384": 88.0, "256": 85.3}
  settings = body["settings"]
  assert len(settings["fingerprint"]) == 64 and settings["system"] == "" and settings["dtype"] == "float32"
  assert settings["prompt"].startswith("<image>\nQUESTION\nAnswer") and settings["max_tokens"] == 512
  page = (output / "report.html").read_text()
  assert "88.00" in page and body["settings"]["fingerprint"] in page and "http" not in page
  assert "paper 384: 88.00" in capsys.readouterr().out
  before = (output / "records.jsonl").read_bytes()
  assert main(["evaluate", "--benchmark=pope", *flags]) == 0  # nothing is left to do
  assert (output / "records.jsonl").read_bytes() == before
  assert main(["evaluate", "--benchmark=pope", "--weights=raw", *flags]) == 2
  assert "fingerprint" in capsys.readouterr().err
  write_table(data / "POPE.tsv", pope_rows()[:-1] + [pope_rows()[-1] | {"answer": "No"}])  # another file of that name
  assert main(["evaluate", "--benchmark=pope", *flags]) == 2
  assert "holds predictions made with data=" in capsys.readouterr().err


def test_parts_share_the_work_and_the_last_one_writes_the_report(checkpoint, data, tmp_path, capsys):
  flags = ["--benchmark=pope", f"--checkpoint={checkpoint}", f"--data={data}", f"--output={tmp_path / 'out'}"]
  assert main(["evaluate", *flags, "--part=1/2"]) == 0
  assert "3 of 6 samples are left to the other parts" in capsys.readouterr().err
  assert not (tmp_path / "out" / "report.json").exists()
  assert main(["evaluate", *flags, "--part=0/2"]) == 0
  body = json.loads((tmp_path / "out" / "report.json").read_text())
  assert main(["evaluate", *flags[:3], f"--output={tmp_path / 'whole'}"]) == 0
  assert body["scores"] == json.loads((tmp_path / "whole" / "report.json").read_text())["scores"]


def test_mistakes_are_one_line_and_exit_code_2(checkpoint, tmp_path, capsys):
  flags = [f"--checkpoint={checkpoint}", f"--output={tmp_path / 'out'}"]
  for more, message in (
    (["--benchmark=pope"], "needs --data=DIR: download https"),
    (["--benchmark=pope", f"--data={tmp_path / 'no'}"], "does not exist: download https"),
    (["--benchmark=mme", f"--data={tmp_path}"], "MME.tsv does not exist: download https"),
    (["--benchmark=mme", "--guidance=3"], "--guidance=3.0 does not belong to --benchmark=mme, but to dpg, geneval, mj"),
    (["--benchmark=shapes", "--features=x.npz"], "--features=x.npz does not belong"),
    (["--benchmark=geneval", "--only=pictures"], "--only=pictures does not belong"),
    (["--benchmark=geneval", "--results=no.jsonl"], "--results=no.jsonl does not exist"),
    (["--benchmark=shapes", "--guidance=0.5"], "--guidance=0.5 must be at least 1"),
    (["--benchmark=shapes", "--sweep_guidance=2,0.5"], "--guidance=0.5 must be at least 1"),
  ):
    assert main(["evaluate", *flags, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jflow: ") and error.count("\n") == 1 and message in error
  assert not (tmp_path / "out").exists()


def test_a_killed_evaluation_goes_on_and_ends_as_if_it_had_not_been(checkpoint, tmp_path):
  """kill -9 in the middle of painting; the pictures and the scores are those of a run without it."""
  flags = [
    "--benchmark=shapes",
    f"--checkpoint={checkpoint}",
    "--limit=6",
    "--pictures=1",
    "--steps=2",
    "--batch_size=2",
  ]
  killed, whole = tmp_path / "killed", tmp_path / "whole"
  run = subprocess.Popen(
    [sys.executable, "-m", "jflow", "evaluate", *flags, f"--output={killed}"], cwd=tiny.ROOT
  )
  deadline = time.time() + 300
  while run.poll() is None and time.time() < deadline:
    path = killed / "records.jsonl"
    if path.exists() and path.read_bytes().count(b"\n") >= 2:
      os.kill(run.pid, signal.SIGKILL)
      break
    time.sleep(0.01)
  assert run.wait(timeout=300) in (-signal.SIGKILL, 0)
  assert main(["evaluate", *flags, f"--output={killed}"]) == 0
  assert main(["evaluate", *flags, f"--output={whole}"]) == 0
  scores = [json.loads((path / "report.json").read_text())["scores"] for path in (killed, whole)]
  assert scores[0] == scores[1]
  for picture in sorted(whole.rglob("pictures/**/*.png")):
    other = killed / picture.relative_to(whole)
    assert np.abs(np.asarray(Image.open(picture), int) - np.asarray(Image.open(other), int)).max() <= 1


def test_noise_of_a_seed_is_that_of_generate(checkpoint):
  model = jflow.load(checkpoint)
  noise = np.stack([tasks.noise_of(model, seed) for seed in (5, 6)])
  by_seed = model.generate("a picture of a star", steps=2, seed=5, num_images=2)
  by_noise = model.generate(["a picture of a star"] * 2, steps=2, noise=noise)
  for a, b in zip(by_seed, by_noise):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- The built-in world


def shapes_benchmark(output, *flags: str):
  args = parser().parse_args(["--benchmark=shapes", "--checkpoint=x", f"--output={output}", "--cache=", *flags])
  recipe = with_flags(RECIPES["shapes"], args)
  return world.ShapesBenchmark(recipe, args), settings_of(recipe, args, "f")


def test_every_picture_of_the_world_starts_from_noise_of_its_own(tmp_path):
  benchmark, _ = shapes_benchmark(tmp_path, "--limit=12", "--pictures=2")
  painted = [task for task in benchmark.tasks() if isinstance(task, tasks.Painting)]
  assert len({task.seed for task in painted}) == len(painted) == 2 * 2 * 12  # two splits


def test_true_pictures_and_true_answers_score_one(tmp_path):
  """Renders of what each prompt asks for, and the world's own answers, in the place of a model's."""
  benchmark, _ = shapes_benchmark(tmp_path, "--limit=24", "--pictures=1")
  records = {}
  rng = np.random.default_rng(0)
  for task in benchmark.tasks():
    if isinstance(task, tasks.Painting):
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
    assert overall.chance < 0.25 and overall.low < 1 and overall.beside == {"ceiling of the VAE": 1}
    assert all(value < 0.8 for value in result.scores[f"{split} questions: overall"].beside.values())
    fd, floor = (result.scores[f"{split} pictures: FD-state{end}"] for end in ("", ", floor"))
    assert fd.value < 2 * floor.value and floor.low <= floor.value <= floor.high and fd.low < fd.value < fd.high
  assert len(result.pictures) == 6 + 4


def _drawn(metadata, split, rng):
  """A scene that shows what the metadata ask for."""
  wanted = {(one["class"], one.get("color"), one.get("count")) for one in metadata["include"]}
  while True:
    scene, combination = scenes.sample(metadata["tag"], split, rng)
    have = {(shape, color, combination.count) for shape, color in combination.pairs}
    relation = [one["position"][0] for one in metadata["include"] if "position" in one]
    if have == wanted and (not relation or relation[0] == combination.relation):
      if not relation or combination.pairs[0][0] == metadata["include"][1]["class"]:
        return scene


def test_the_nearest_picture_answers_for_a_picture_that_is_almost_one_of_training():
  known = shapes.evaluation_questions("train", references.LEARNED, 1)[:200]
  asked = [(scene._replace(background=scene.background + 1), question) for scene, question in known]
  for kind, found in references.baselines(asked).items():
    assert found[references.NEAREST] >= 0.95, kind
    answers = [q.answer for _, q in asked if q.kind == kind]
    assert found[references.FREQUENT] == max(map(answers.count, answers)) / len(answers)


def test_features_of_true_pictures_are_kept(tmp_path, monkeypatch):
  make = lambda name: references.features("val", ["colors", "counting"], 4, 48, name, tmp_path)
  first, other = make("a"), make("b")
  (kept,) = [path for path in tmp_path.iterdir() if np.array_equal(np.load(path)["tex"], first["tex"])]
  monkeypatch.setattr(references, "renders", lambda *_: pytest.fail("drawn again"))
  np.testing.assert_array_equal(make("a")["state"], first["state"])
  assert first["tex"].shape == (4, 228) and not np.array_equal(first["tex"], other["tex"])


def test_answers_to_the_world_are_judged_by_kind():
  asked = lambda answer, kind, text="?": shapes.Question(text, answer, kind)
  assert world.right(asked("yes", "existence"), "Yes.") and not world.right(asked("no", "existence"), "Yes.")
  assert not world.right(asked("no", "relation"), "maybe")
  assert world.right(asked("two", "count"), "2") and world.right(asked("zero", "count"), "none")
  assert world.right(asked("red", "color"), "Red.") and not world.right(asked("red", "color"), "dark red")
  options = "What color is it?\nA. red\nB. blue\nC. pink\nD. brown\nAnswer with"
  assert world.right(asked("B", "choice", options), "B.") and world.right(
    asked("B", "choice", options), "blue"
  )
  assert not world.right(asked("B", "choice", options), "A")


# --- Reports


def test_a_report_escapes_what_it_shows_and_holds_its_pictures(tmp_path):
  result = Result(
    {"a<b": Score(0.5, 0.4, 0.6, 10, 0.1)}, ["x & y"], [("Sheet", Image.new("RGB", (4, 4), "red"))]
  )
  body = report.write(tmp_path, "n", "what", result, {"a<b": {"384": 0.7}}, {"prompt": "<script>"})
  page = (tmp_path / "report.html").read_text()
  assert "a&lt;b" in page and "x &amp; y" in page and "&lt;script&gt;" in page and "<script>" not in page
  assert "data:image/png;base64," in page and (tmp_path / "sheet.png").is_file()
  assert body["scores"]["a<b"] == {
    "value": 0.5,
    "low": 0.4,
    "high": 0.6,
    "count": 10,
    "chance": 0.1,
    "paper": {"384": 0.7},
  }
  assert "0.500  [0.400, 0.600]  chance 0.100  paper 384: 0.700" in report.table(body)


def test_a_fingerprint_changes_with_weights_and_configuration(checkpoint, tmp_path):
  import shutil

  copy = tmp_path / "copy"
  shutil.copytree(checkpoint, copy)
  assert (
    report.fingerprint(checkpoint, "ema")
    == report.fingerprint(copy, "ema")
    != report.fingerprint(copy, "raw")
  )
  config = json.loads((copy / "config.json").read_text())
  (copy / "config.json").write_text(json.dumps(config | {"more": 1}))
  assert report.fingerprint(checkpoint, "ema") != report.fingerprint(copy, "ema")


def test_an_outside_scorers_findings_stay_and_are_plotted(checkpoint, tmp_path, capsys):
  """GenEval: a sweep paints, its evaluator's results go into each setting, the same sweep then has its plot."""
  (tmp_path / "evaluation_metadata.jsonl").write_text(
    '{"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}\n'
  )
  base = ["evaluate", "--benchmark=geneval", f"--checkpoint={checkpoint}", f"--data={tmp_path}", "--pictures=2"]
  swept = [*base, f"--output={tmp_path / 'out'}", "--sweep_guidance=1,3", "--sweep_steps=1"]
  assert main(swept) == 0
  assert "no scores to plot yet" in capsys.readouterr().out
  for w in (1, 3):
    output = tmp_path / "out" / f"guidance{w}_steps1"
    rows = [
      {"filename": f"{output}/pictures/00000/samples/0000{j}.png", "tag": "colors", "prompt": "a photo of a cow",
       "correct": j < w // 2} for j in range(2)
    ]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = [*base, f"--output={output}", f"--guidance={w}", "--steps=1", f"--results={tmp_path / 'results.jsonl'}"]
    assert main(one) == 0
    body = json.loads((output / "report.json").read_text())
    assert any("Not the recipe: --guidance" in note for note in body["notes"]) and "sha256" in body["settings"]["results"]
  assert main(swept) == 0
  rows = json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"]
  assert [(row["guidance"], row["overall"]) for row in rows] == [(1, 0), (3, 0.5)]


# --- Sweeps


def test_a_sweep_makes_a_plot_of_all_pairs_and_goes_on(checkpoint, tmp_path, capsys):
  flags = [
    "--benchmark=shapes",
    f"--checkpoint={checkpoint}",
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
  capsys.readouterr()
  assert main(["evaluate", "--benchmark=pope", "--sweep_steps=2", "--checkpoint=x", "--output=y"]) == 2
  assert "paints nothing" in capsys.readouterr().err


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
  panel = sweep.figure(found, names).axes[0]
  assert [line.get_label() for line in panel.lines] == ["5 steps", "30 steps"]
  np.testing.assert_allclose(panel.lines[1].get_xydata(), [(1, 0.3), (2, 0.6), (4, 1.2)])
