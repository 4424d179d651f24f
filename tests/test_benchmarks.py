"""Painting benchmarks write what their scorers read, and read what these write; VQAv2 from its own files."""

import json
import runpy
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from jflow.errors import UserError
from jflow.evaluation import distances, painted, scores, tasks
from jflow.evaluation.command import parser, with_flags
from jflow.evaluation.recipes import RECIPES
from jflow.evaluation.vqav2 import Vqav2Benchmark


def flags(name: str, tmp_path, *more: str):
  return parser().parse_args(
    [
      f"--benchmark={name}",
      "--checkpoint=x",
      f"--data={tmp_path / 'data'}",
      f"--output={tmp_path / 'out'}",
      *more,
    ]
  )


def benchmark(name: str, tmp_path, *more: str):
  args = flags(name, tmp_path, *more)
  return painted.BENCHMARKS[name](with_flags(RECIPES[name], args), args)


def paint(bench, tmp_path) -> dict:
  """A picture of its own color for each task."""
  records = {}
  for i, task in enumerate(bench.tasks()):
    tasks.save(Image.new("RGB", (8, 8), (i, 0, 0)), tmp_path / "out" / task.file)
    records[task.key] = {"file": task.file}
  return records


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
  lines = "".join(json.dumps(row) + "\n" for row in METADATA)
  (tmp_path / "data" / "evaluation_metadata.jsonl").write_text(lines)
  return tmp_path


def as_geneval_reads(folder) -> list[tuple[str, dict]]:
  """The walk of its evaluator: folders of digits, one JSON object, samples of digits."""
  found = []
  for sub in folder.iterdir():
    assert sub.is_dir() and sub.name.isdigit()
    with open(sub / "metadata.jsonl") as file:
      metadata = json.load(file)
    for image in (sub / "samples").iterdir():
      assert image.stem.isdigit() and image.suffix == ".png"
      found.append((str(image), metadata))
  return found


def test_geneval_layout_and_results(geneval):
  bench = benchmark("geneval", geneval)
  records = paint(bench, geneval)
  note = bench.score(records).notes[0]
  assert "evaluate_images.py" in note
  found = as_geneval_reads(geneval / "out" / "pictures")
  assert len(found) == 12
  assert {metadata["prompt"] for _, metadata in found} == {row["prompt"] for row in METADATA}
  # Three of four benches, no cow, every red cow.
  right = lambda name, metadata: (
    "bench" in metadata["prompt"] and "00000.png" not in name or "red" in metadata["prompt"]
  )
  results = [
    {
      "filename": name,
      "tag": m["tag"],
      "prompt": m["prompt"],
      "correct": right(name, m),
      "reason": "",
      "metadata": "{}",
    }
    for name, m in found
  ]
  path = geneval / "results.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in results))
  out = benchmark("geneval", geneval, f"--results={path}").score(records).scores
  assert out["single_object"].value == pytest.approx(3 / 8) and out["colors"].value == 1
  assert out["overall"].value == pytest.approx((3 / 8 + 1) / 2)  # the mean of categories, not of pictures
  path.write_text("".join(json.dumps(row) + "\n" for row in results[:-2]))
  with pytest.raises(UserError, match="2 of 12 samples are missing"):
    benchmark("geneval", geneval, f"--results={path}").score(records)
  path.write_text("".join(json.dumps(row) + "\n" for row in results + results[:1]))
  with pytest.raises(UserError, match="comes twice"):
    benchmark("geneval", geneval, f"--results={path}").score(records)


def test_geneval_seeds_are_pinned_and_prompts_share_them(geneval):
  seeds = [task.seed for task in benchmark("geneval", geneval).tasks()]
  assert seeds == [0, 1, 2, 3] * 3


def test_a_prompt_without_a_field_is_named(geneval):
  (geneval / "data" / "evaluation_metadata.jsonl").write_text('{"tag": "colors", "include": [1]}\n')
  with pytest.raises(UserError, match="line 1, has no field 'prompt'"):
    benchmark("geneval", geneval)


# --- DPG-Bench


@pytest.fixture
def dpg(tmp_path):
  folder = tmp_path / "data" / "prompts"
  folder.mkdir(parents=True)
  for i in range(3):
    (folder / f"diffusiondb{i}.txt").write_text(f"a long\nprompt, {i}\n")
  return tmp_path


def test_dpg_grids_are_cut_as_the_scorer_cuts_them(dpg):
  bench = benchmark("dpg", dpg)
  assert bench.tasks()[0].prompt == "a long prompt, 0"
  records = paint(bench, dpg)
  assert "--resolution 8" in bench.score(records).notes[0]
  names = sorted(path.name for path in (dpg / "out" / "grids").iterdir())
  assert names == [f"diffusiondb{i}.png" for i in range(3)]  # nothing else: the scorer lists the folder
  image = Image.open(dpg / "out" / "grids" / "diffusiondb1.png")
  r = 8
  crops = [(0, 0, r, r), (r, 0, 2 * r, r), (0, r, r, 2 * r), (r, r, 2 * r, 2 * r)]
  assert [image.crop(crop).getpixel((3, 3))[0] for crop in crops] == [4, 5, 6, 7]


def test_dpg_results_are_read_and_dropped_pictures_refused(dpg):
  bench = benchmark("dpg", dpg)
  records = paint(bench, dpg)
  lines = [f"/some, where/diffusiondb{i}.png, 1.0, 0.5, 0.5, 1.0, {0.75 - i / 4}\n" for i in range(3)]
  summary = "Model: x\nL1 category scores:\n\tentity: 87.5\n\tglobal: 50.0\nL2 category scores:\n\tentity - whole: 1\n"
  path = dpg / "results.txt"
  path.write_text("".join(lines) + summary + "DPG-Bench score: 50.0\n")
  out = benchmark("dpg", dpg, f"--results={path}").score(records).scores
  assert out["overall"].value == pytest.approx(50) and out["overall"].count == 3
  assert out["entity"].value == 87.5 and out["global"].value == 50 and len(out) == 3
  path.write_text("".join(lines[:2]) + summary)
  with pytest.raises(UserError, match=r"1 of 3 samples are missing \(diffusiondb2"):
    benchmark("dpg", dpg, f"--results={path}").score(records)


# --- MJHQ


@pytest.fixture
def mjhq(tmp_path):
  data = tmp_path / "data"
  rng = np.random.default_rng(0)
  meta = {}
  for i in range(6):
    name, category = f"id{i}", ("animals", "food")[i % 2]
    meta[name] = {"category": category, "prompt": f"prompt {i}"}
    path = data / "mjhq30k_imgs" / category / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
  (data / "meta_data.json").write_text(json.dumps(meta))
  return tmp_path


def test_mjhq_measures_features_of_all_its_pictures_by_name(mjhq):
  bench = benchmark("mjhq", mjhq)
  assert len({task.seed for task in bench.tasks()}) == 6
  records = paint(bench, mjhq)
  assert "launch/features.py" in bench.score(records).notes[0]
  rng = np.random.default_rng(1)
  generated, reference = (
    rng.normal(size=(6, 4)).astype(np.float32),
    rng.normal(size=(9, 4)).astype(np.float32),
  )
  pictures, prompts = rng.normal(size=(2, 6, 3)).astype(np.float32)
  names = np.array([f"id{i}" for i in range(6)])
  order = rng.permutation(6)
  path = mjhq / "features.npz"
  np.savez(
    path, names=names[order], generated=generated[order], reference=reference, clip_pictures=pictures[order],
    clip_prompts=prompts[order],
  )  # fmt: skip
  out = benchmark("mjhq", mjhq, f"--features={path}").score(records).scores
  assert out["FID"].value == pytest.approx(distances.frechet(generated, reference))
  cosine = [p @ q / np.linalg.norm(p) / np.linalg.norm(q) for p, q in zip(pictures, prompts)]
  assert out["CLIP similarity"].value == pytest.approx(100 * np.mean(cosine), rel=1e-5)
  np.savez(path, names=names[:4], generated=generated[:4], reference=reference)
  with pytest.raises(UserError, match="2 of 6 samples are missing"):
    benchmark("mjhq", mjhq, f"--features={path}").score(records)
  np.savez(path, names=names, generated=generated, reference=reference[:3])
  with pytest.raises(UserError, match="3 reference pictures for 6"):
    benchmark("mjhq", mjhq, f"--features={path}").score(records)


def test_the_extractor_normalises_as_clean_fid_and_feeds_the_benchmark(mjhq, monkeypatch):
  torch = pytest.importorskip("torch")

  class Layers(torch.nn.Module):
    def forward(self, x: torch.Tensor):
      return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)[:, :, None, None]

  class Network(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.layers = Layers()

    def forward(self, x: torch.Tensor):
      return self.layers(x)

  bench = benchmark("mjhq", mjhq)
  records = paint(bench, mjhq)
  network, features = mjhq / "inception.pt", mjhq / "features.npz"
  torch.jit.script(Network()).save(str(network))
  arguments = [
    f"--pictures={mjhq / 'out/pictures'}",
    f"--reference={mjhq / 'data'}",
    f"--inception={network}",
  ]
  monkeypatch.setattr(
    sys, "argv", ["features.py", *arguments, f"--output={features}", "--device=cpu", "--batch_size=4"]
  )
  runpy.run_path(str(tiny.ROOT / "launch" / "features.py"), run_name="__main__")
  with np.load(features) as file:
    assert len(file["reference"]) == 6
    first = file["generated"][file["names"].tolist().index("id5")]
  np.testing.assert_allclose(
    first[:3], [(5 - 128) / 128, -1, -1], atol=1e-6
  )  # a picture of the color (5, 0, 0)
  out = benchmark("mjhq", mjhq, f"--features={features}").score(records).scores
  assert np.isfinite(out["FID"].value) and out["FID"].count == 6


# --- VQAv2


def vqa_files(tmp_path, count: int = 2):
  pictures = tmp_path / "val2014"
  pictures.mkdir()
  Image.new("RGB", (5, 5)).save(pictures / "COCO_val2014_000000000042.jpg")
  questions = [{"question_id": 10 + i, "image_id": 42, "question": f"Why {i}?"} for i in range(3)]
  annotations = [
    {"question_id": 10 + i, "answer_type": "other", "answers": [{"answer": a} for a in ["cat"] * 9 + ["dog"]]}
    for i in range(count)
  ]
  (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(
    json.dumps({"questions": questions[:count]})
  )
  (tmp_path / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
  return questions


def test_vqav2_val_is_scored_and_names_what_is_missing(tmp_path):
  vqa_files(tmp_path)
  bench = Vqav2Benchmark(RECIPES["vqav2"], tmp_path, "val", None)
  task = bench.tasks()[1]
  assert task.key == "11" and task.images()[0].is_file() and task.text.startswith("<image>Why 1?\nAnswer")
  out = bench.score({"10": {"answer": "Cat."}, "11": {"answer": "dog"}}).scores
  assert out["overall"].value == pytest.approx(100 * (1 + 0.3) / 2)
  with pytest.raises(UserError, match="1 of 2 samples are missing"):
    bench.score({"10": {"answer": "cat"}})
  (tmp_path / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": []}')
  with pytest.raises(UserError, match="2 of 2 samples are missing"):
    Vqav2Benchmark(RECIPES["vqav2"], tmp_path, "val", None)


def test_vqav2_test_dev_gives_the_file_to_hand_in(tmp_path):
  questions = vqa_files(tmp_path)
  (tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(
    json.dumps({"questions": questions})
  )
  (tmp_path / "test2015").mkdir()
  Image.new("RGB", (5, 5)).save(tmp_path / "test2015" / "COCO_test2015_000000000042.jpg")
  bench = Vqav2Benchmark(RECIPES["vqav2"], tmp_path, "test-dev", None)
  result = bench.score({str(10 + i): {"answer": f"a{i}"} for i in range(3)})
  assert result.details["submission"] == [{"question_id": 10 + i, "answer": f"a{i}"} for i in range(3)]
  with pytest.raises(UserError, match="'train' must be one of val, test-dev"):
    Vqav2Benchmark(RECIPES["vqav2"], tmp_path, "train", None)


def test_every_recipe_is_complete():
  for name, recipe in RECIPES.items():
    assert recipe.name == name and recipe.what and recipe.data
    for sizes in recipe.paper.values():
      assert set(sizes) <= {"384", "256"}
  geneval = RECIPES["geneval"].paper
  for size in ("384", "256"):  # the paper's overall is the mean of its six
    mean = scores.average([scores.Score(geneval[tag][size], 0, 1, 1) for tag in painted.GENEVAL_TAGS]).value
    assert geneval["overall"][size] == pytest.approx(mean, abs=0.008)
