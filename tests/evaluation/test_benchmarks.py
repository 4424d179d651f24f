"""Generation benchmarks write what their scorers read, and read what these write; VQAv2 from its own files."""

import dataclasses
import json
import re

import pytest
from generating import benchmark, commands, generate, settings
from PIL import Image
from refusals import refused

from jflow.cli.evaluate import parser, settings_of
from jflow.evaluation import benchmarks, runner, scores, tasks
from jflow.evaluation.benchmark import FLAGS
from jflow.evaluation.benchmarks import geneval as geneval_file


def write_lines(path, rows) -> None:
  path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")


# --- GenEval

METADATA = [
  {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
  {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
  {
    "tag": "colors",
    "include": [{"class": "cow", "count": 1, "color": "red"}],
    "prompt": "a photo of a red cow",
  },
]


@pytest.fixture
def geneval(tmp_path):
  (tmp_path / "data").mkdir()
  write_lines(tmp_path / "data" / "evaluation_metadata.jsonl", METADATA)
  return tmp_path


def as_geneval_reads(folder) -> list[tuple[str, dict]]:
  """The walk of its evaluator: folders of digits, one JSON object, samples of digits."""
  found = []
  for sub in sorted(folder.iterdir()):
    assert sub.is_dir() and sub.name.isdigit()
    with open(sub / "metadata.jsonl") as file:
      metadata = json.load(file)
    for image in sorted((sub / "samples").iterdir()):
      assert image.stem.isdigit() and image.suffix == ".png"
      found.append((str(image), metadata))
  return found


def geneval_results(folder) -> list[dict]:
  """The evaluator's lines if it finds three of four benches, no cow, every red cow."""
  return [
    {
      "filename": name,
      "tag": m["tag"],
      "prompt": m["prompt"],
      "correct": "bench" in m["prompt"] and "00000.png" not in name or "red" in m["prompt"],
      "reason": "",
      "metadata": "{}",
    }
    for name, m in as_geneval_reads(folder)
  ]


def test_geneval_layout_and_results(geneval):
  bench = benchmark("geneval", geneval)
  assert bench.data_files() == [geneval / "data" / "evaluation_metadata.jsonl"]
  records = generate(bench, geneval)
  notes = bench.score(records).notes
  assert "3 prompts, the published benchmark 553" in notes[-1] and "--sweep_guidance=2,3,5,7.5" in notes[-2]
  out = (geneval / "out").resolve()
  assert commands(notes[0])[0] == [
    "python",
    "evaluation/evaluate_images.py",
    f"{out}/pictures",
    "--outfile",
    f"{out}/results.jsonl",
    "--model-path",
    "OBJECT_DETECTOR_FOLDER",
  ]
  found = as_geneval_reads(geneval / "out" / "pictures")
  assert len(found) == 12
  assert {metadata["prompt"] for _, metadata in found} == {row["prompt"] for row in METADATA}
  path = geneval / "results.jsonl"
  write_lines(path, geneval_results(geneval / "out" / "pictures"))
  out = benchmark("geneval", geneval, results=path).score(records).scores
  assert out["single_object"].value == pytest.approx(3 / 8) and out["colors"].value == 1
  assert out["overall"].value == pytest.approx((3 / 8 + 1) / 2)  # the mean of categories, not of pictures


def test_the_printed_command_reads_the_results_with_all_flags_of_the_first(geneval, monkeypatch):
  """From another folder too: a relative --output of the first command is a whole path in the second."""
  monkeypatch.chdir(geneval)
  (geneval / "geneval").mkdir()  # a folder of the benchmark's name is not taken for it
  given = [
    "--benchmark=geneval",
    "--checkpoint=gs://a/b",
    "--data=data",
    "--output=with space",
    "--pictures=1",
    "--guidance=5",
    "--limit=2",
    "--seed=7",
    "--sweep_guidance=5,6",
    "--part=1/2",
    "--weights=raw",
  ]
  args = parser().parse_args(given)
  bench = benchmarks.get("geneval")(settings_of(args))
  records = {}
  for task in bench.tasks():
    tasks.save(Image.new("RGB", (8, 8)), geneval / "with space" / task.file)
    records[task.key] = {"file": task.file}
  notes = bench.score(records).notes
  assert not any("published benchmark" in note for note in notes)  # --limit says why there are fewer
  first, then = commands(notes[0])
  assert first[2] == str(geneval / "with space/pictures") and then[:4] == ["python", "-m", "jflow", "evaluate"]
  again = parser().parse_args(then[4:])
  assert again.output == geneval / "with space" and again.data == geneval / "data" and str(again.results) == first[4]
  kept = ("benchmark", "checkpoint", "pictures", "guidance", "limit", "seed", "weights", "steps", "vae", "dtype")
  assert all(getattr(again, name) == getattr(args, name) for name in kept)
  assert again.sweep_guidance is None and again.part == (1, 1)


def test_geneval_seeds_are_pinned_and_prompts_share_them(geneval):
  seeds = [task.seed for task in benchmark("geneval", geneval).tasks()]
  assert seeds == [0, 1, 2, 3] * 3


# --- DPG-Bench


@pytest.fixture
def dpg(tmp_path):
  folder = tmp_path / "data" / "prompts"
  folder.mkdir(parents=True)
  for i in range(3):
    (folder / f"diffusiondb{i}.txt").write_text(f"a long\nprompt, {i}\n")
  (folder / "._diffusiondb0.txt").write_bytes(b"what a Mac leaves")
  return tmp_path


def test_dpg_grids_are_cut_as_the_scorer_cuts_them(dpg):
  bench = benchmark("dpg", dpg)
  assert bench.tasks()[0].prompt == "a long prompt, 0"
  assert bench.data_files() == [dpg / "data" / "prompts" / f"diffusiondb{i}.txt" for i in range(3)]
  records = generate(bench, dpg)
  notes = bench.score(records).notes
  out = (dpg / "out").resolve()
  assert commands(notes[0])[0] == [
    "python",
    "dpg_bench/compute_dpg_bench.py",
    "--image-root-path",
    f"{out}/grids",
    "--resolution",
    "8",
    "--pic-num",
    "4",
    "--res-path",
    f"{out}/results.txt",
  ]
  assert "ELLA" in notes[0] and "3 prompts, the published benchmark 1,065" in notes[-1]
  names = sorted(path.name for path in (dpg / "out" / "grids").iterdir())
  assert names == [f"diffusiondb{i}.png" for i in range(3)]  # nothing else: the scorer lists the folder
  image = Image.open(dpg / "out" / "grids" / "diffusiondb1.png")
  r = 8
  crops = [(0, 0, r, r), (r, 0, 2 * r, r), (0, r, r, 2 * r), (r, r, 2 * r, 2 * r)]
  assert [image.crop(crop).getpixel((3, 3))[0] for crop in crops] == [4, 5, 6, 7]


DPG_SUMMARY = [
  "Model: x",
  "L1 category scores:",
  "\tentity: 87.5",
  "\tglobal: 50.0",
  "L2 category scores:",
  "\tentity - whole: 1",
  "Image path: /a, 1, 2, 3, 4, 5",
  "DPG-Bench score: 50.0",
]


def dpg_row(i: int, mean: float | None = None) -> str:
  numbers = [1.0, 0.5, 0.5 - i / 4, 1.0 - i / 4]
  return ", ".join(map(str, [f"/some, where/diffusiondb{i}.png", *numbers, sum(numbers) / 4 if mean is None else mean]))


DPG_ROWS = [dpg_row(i) for i in range(3)]


def test_dpg_results_are_read(dpg):
  bench = benchmark("dpg", dpg)
  records = generate(bench, dpg)
  path = dpg / "results.txt"
  write_lines(path, DPG_ROWS + DPG_SUMMARY)
  out = benchmark("dpg", dpg, results=path).score(records).scores
  assert out["overall"].value == pytest.approx(100 * (0.75 + 0.625 + 0.5) / 3) and out["overall"].count == 3
  assert out["entity"].value == 87.5 and out["global"].value == 50 and len(out) == 3


# --- wrong files


GENEVAL_LINE = {"filename": "/x/00000/samples/00000.png", "tag": "single_object", "correct": True}


def changed(number: int, **fields):
  """The results of all pictures, with other fields in one line."""
  return lambda rows: [row | (fields if i == number else {}) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
  "name, change, message",
  [
    ("geneval", lambda rows: rows[:-2], "2 of 12 samples are missing"),
    ("geneval", lambda rows: rows + rows[:1], "line 13"),
    (
      "geneval",
      lambda rows: rows + [GENEVAL_LINE | {"filename": "/x/00003/samples/00000.png"}],
      "1 of 13",
    ),
    ("geneval", changed(4, tag="colors"), "line 5, has tag='colors'"),
    ("geneval", changed(4, prompt="a photo of a dog"), "line 5, has prompt='a photo of a dog'"),
    ("geneval", changed(1, correct="true"), "line 2, has correct='true'"),
    ("geneval", changed(1, filename=7), "line 2, names 7"),
    ("geneval", lambda rows: [[1], *rows], "line 1"),
    ("geneval", lambda rows: [*rows, "{"], "line 13"),
    ("geneval", lambda rows: ["[" * 100_000], "line 1"),
    ("geneval", lambda rows: [rows[0], b"\xff"], "line 2, is not UTF-8"),
    ("dpg", lambda rows: DPG_ROWS[:2] + DPG_SUMMARY, "diffusiondb2"),
    ("dpg", lambda rows: DPG_ROWS + DPG_ROWS[:1], "line 4, names diffusiondb0"),
    ("dpg", lambda rows: DPG_ROWS + DPG_SUMMARY + DPG_ROWS[:1], "line 12, names diffusiondb0"),
    ("dpg", lambda rows: [*DPG_ROWS, dpg_row(1).replace("db1", "db9")], "1 of 4"),
    ("dpg", lambda rows: ["/x/diffusiondb0.png, (0, 0, 8, 8), is there a cow?, yes"], "_detail.txt"),
    ("dpg", lambda rows: ["/x/diffusiondb0.png, 1.0, 1.0"], "--pic-num 4"),
    ("dpg", lambda rows: [DPG_ROWS[0], dpg_row(1, mean=0.9)], "line 2"),
    ("dpg", lambda rows: [DPG_ROWS[0].replace("1.0", "nan")], "line 1, has 'nan'"),
    ("dpg", lambda rows: [*DPG_ROWS, "Model: x", "L1 category scores:", "\tentity: much"], "line 6, has 'much'"),
    ("dpg", lambda rows: [DPG_ROWS[0], b"\xff"], "line 2, is not UTF-8"),
  ],
)
def test_wrong_results_are_one_line_with_file_and_number(name, change, message, request, tmp_path):
  request.getfixturevalue(name)
  bench = benchmark(name, tmp_path)
  records = generate(bench, tmp_path)
  bench.score(records)
  path = tmp_path / "results.txt"
  rows = change(geneval_results(tmp_path / "out" / "pictures") if name == "geneval" else [])
  write_lines(path, [row for row in rows if not isinstance(row, bytes)])
  with open(path, "ab") as file:
    file.write(b"".join(row for row in rows if isinstance(row, bytes)))
  with refused(path, message):
    benchmark(name, tmp_path, results=path).score(records)


@pytest.mark.parametrize(
  "name, file, text, message",
  [
    ("geneval", "evaluation_metadata.jsonl", b'{"tag": "colors", "include": [1]}', "line 1, has no field 'prompt'"),
    (
      "geneval",
      "evaluation_metadata.jsonl",
      b'{"tag": "a", "include": [1], "prompt": 3}',
      "has prompt=3, which must be a text",
    ),
    ("geneval", "evaluation_metadata.jsonl", b"\n7", "line 2, must be a JSON object, got 7"),
    ("geneval", "evaluation_metadata.jsonl", b"{}x", "line 1"),
    ("geneval", "evaluation_metadata.jsonl", b"\n\n\xff", "line 3, is not UTF-8"),
    ("geneval", "evaluation_metadata.jsonl", b"\n", "holds no prompts"),
    ("dpg", "prompts/a.txt", b"\xff", "a.txt, line 1, is not UTF-8"),
    ("dpg", "prompts/a.txt", b" \n", "a.txt holds no prompt"),
    ("mjhq", "meta_data.json", b"[]", "meta_data.json must be a JSON object"),
    ("mjhq", "meta_data.json", b'{"a": 1}', "picture 'a', must be a JSON object, got 1"),
    ("mjhq", "meta_data.json", b'{"a": {"prompt": [1]}}', "picture 'a', has prompt="),
    ("mjhq", "meta_data.json", b'{"../a": {"prompt": "x"}}', "picture '../a', has no name that a file could bear"),
    ("mjhq10k", "meta_data.json", b'{"a": {"prompt": "x"}}', "picture 'a', has no field 'category'"),
    ("mjhq10k", "meta_data.json", b'{"a": {"prompt": "x", "category": "y"}}', "10,000 prompts cannot be drawn evenly"),
  ],
)
def test_wrong_prompts_are_one_line_with_file_and_place(name, file, text, message, tmp_path):
  path = tmp_path / "data" / file
  path.parent.mkdir(parents=True)
  path.write_bytes(text)
  with refused(path, message):
    benchmark(name, tmp_path)


# --- VQAv2


def vqav2(data, **more):
  return benchmarks.get("vqav2")(dataclasses.replace(settings("vqav2", data, **more), data=data))


def vqa_files(tmp_path, count: int = 2):
  pictures = tmp_path / "val2014"
  pictures.mkdir()
  Image.new("RGB", (5, 5)).save(pictures / "COCO_val2014_000000000042.jpg")
  questions = [{"question_id": 10 + i, "image_id": 42, "question": f"Why {i}?"} for i in range(3)]
  annotations = [
    {
      "question_id": 10 + i,
      "image_id": 42,
      "answer_type": "other",
      "answers": [{"answer": a} for a in ["cat"] * 9 + ["dog"]],
    }
    for i in range(count)
  ]
  (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions[:count]}))
  (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
  return questions


def test_vqav2_val_is_scored_and_names_what_is_missing(tmp_path):
  vqa_files(tmp_path)
  bench = vqav2(tmp_path)
  assert runner.identity_of(bench, "f")["split"] == "val"
  task = bench.tasks()[1]
  assert task.key == "11" and task.images()[0].size == (5, 5) and task.text.startswith("<image>Why 1?\nAnswer")
  out = bench.score({"10": {"answer": "Cat."}, "11": {"answer": "dog"}}).scores
  assert out["overall"].value == pytest.approx(100 * (1 + 0.3) / 2)
  with refused("1 of 2"):
    bench.score({"10": {"answer": "cat"}})
  (tmp_path / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": []}')
  with refused("2 of 2"):
    vqav2(tmp_path)


def test_vqav2_test_dev_gives_the_file_to_hand_in(tmp_path):
  questions = vqa_files(tmp_path)
  (tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps({"questions": questions}))
  (tmp_path / "test2015").mkdir()
  Image.new("RGB", (5, 5)).save(tmp_path / "test2015" / "COCO_test2015_000000000042.jpg")
  bench = vqav2(tmp_path, split="test-dev")
  assert runner.identity_of(bench, "f")["split"] == "test-dev"
  result = bench.score({str(10 + i): {"answer": f"a{i}"} for i in range(3)})
  assert result.files["submission.json"] == [{"question_id": 10 + i, "answer": f"a{i}"} for i in range(3)]
  with refused("'train'", "val, test-dev"):
    vqav2(tmp_path, split="train")


@pytest.mark.parametrize("split", ["val", "test-dev"])
@pytest.mark.parametrize(
  "writes, vqa, mmvet",
  [
    ("flow", {"79.8 (384)", "76.3 (256)"}, {"30.9 (384)", "27.4 (256)"}),
    ("codes", {"77.3 (Janus)"}, {"34.3 (Janus)", "39.8 (Pro-1B)", "50 (Pro-7B)"}),
    ("another", set(), set()),
  ],
)
def test_notes_have_the_numbers_of_the_models_own_paper(tmp_path, split, writes, vqa, mmvet):
  questions = vqa_files(tmp_path, 3)
  (tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps({"questions": questions}))
  (tmp_path / "test2015").mkdir()
  Image.new("RGB", (5, 5)).save(tmp_path / "test2015" / "COCO_test2015_000000000042.jpg")
  bench = vqav2(tmp_path, split=split)
  bench.writes = writes
  free = object.__new__(benchmarks.get("mmvet"))
  free.writes = writes
  for found, wanted in (
    (bench.score({str(10 + i): {"answer": "cat"} for i in range(3)}), vqa),
    (free.judge([{"index": "1", "prediction": "a cat"}]), mmvet),
  ):
    assert set(re.findall(r"[\d.]+ \([\w-]+\)", " ".join(found.notes))) == wanted
    assert writes == "flow" or "69.20" not in " ".join(found.notes)


def test_every_benchmark_is_complete():
  for name in benchmarks.names():
    kind = benchmarks.get(name)
    assert kind.name == name and kind.what and kind.where and kind.flags <= set(FLAGS)
    assert bool(kind.section) >= bool(kind.paper)
    for writes, found in kind.paper.items():
      for sizes in found.values():
        assert set(sizes) <= {"flow": {"384", "256"}, "codes": {"Janus", "Pro-1B", "Pro-7B"}}[writes]
  for geneval in benchmarks.get("geneval").paper.values():
    for size in geneval["overall"]:  # the paper's overall is the mean of its six
      mean = scores.average([scores.Score(geneval[tag][size], 0, 1, 1) for tag in geneval_file.TAGS]).value
      assert geneval["overall"][size] == pytest.approx(mean, abs=0.008)


@pytest.mark.parametrize(
  "answers, named",
  [
    (["yes"], ["answers=['yes']"]),
    (3, ["answers=3"]),
    ([], ["answers=[]"]),
    ([{"answer_id": 1}] * 10, ["'answer'", "answer_id"]),
    ([{"answer": "yes"}] * 3, ["3 answers"]),
    ([{"answer": ["yes"]}] * 10, ["answer=['yes']"]),
  ],
)
def test_vqav2_annotations_that_are_none_are_named(tmp_path, answers, named):
  vqa_files(tmp_path)
  path = tmp_path / "v2_mscoco_val2014_annotations.json"
  body = json.loads(path.read_text())
  body["annotations"][0]["answers"] = answers
  path.write_text(json.dumps(body))
  with refused("question 10", *named):
    vqav2(tmp_path)
  (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text('{"questions": [1]}')
  with refused("questions"):
    vqav2(tmp_path)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("question_id", [10], "questions 1, has question_id"),
    ("question_id", 11, "questions 2: question 11 comes twice"),
    ("question_id", True, "questions 1, has question_id=True"),
    ("image_id", "42", "question 10, has image_id='42'"),
    ("image_id", -1, "question 10, has image_id=-1"),
    ("question", 7, "question 10, has question=7"),
  ],
)
def test_vqav2_questions_that_are_none_are_named(tmp_path, field, value, message):
  vqa_files(tmp_path)
  path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
  body = json.loads(path.read_text())
  body["questions"][0][field] = value
  path.write_text(json.dumps(body), encoding="utf-8-sig")
  with refused(path, message):
    vqav2(tmp_path)
