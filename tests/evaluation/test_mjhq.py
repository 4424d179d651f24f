"""MJHQ: features that launch/experiments/features.py makes of pictures with networks on disk, and what is measured on
them."""

import collections
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
from generating import benchmark, commands, generate
from PIL import Image
from refusals import refused

from jflow.evaluation import distances
from jflow.evaluation.benchmarks.mjhq import Mjhq10k, evenly

NAMES = [f"id{i}" for i in range(6)]


@pytest.fixture
def mjhq(tmp_path):
  """Metadata of six pictures in two categories."""
  (tmp_path / "data").mkdir()
  meta = {name: {"category": ("animals", "food")[i % 2], "prompt": f"prompt {i}"} for i, name in enumerate(NAMES)}
  (tmp_path / "data" / "meta_data.json").write_text(json.dumps(meta))
  return tmp_path


def features_of(names, reference_names=NAMES, resize="lanczos", seed=1) -> dict[str, np.ndarray]:
  """The arrays of launch/experiments/features.py: a picture's features are a function of its name."""
  drawn = lambda kind, one, width: np.random.default_rng([seed, kind, NAMES.index(one)]).normal(size=width)
  stack = lambda kind, names, width: np.stack([drawn(kind, one, width) for one in names]).astype(np.float32)
  return {
    "names": np.array(names),
    "generated": stack(0, names, 4),
    "reference": stack(1, reference_names, 4),
    "reference_names": np.array(reference_names),
    "resize": np.array(resize),
    "clip_pictures": stack(2, names, 3),
    "clip_prompts": stack(3, names, 3),
  }


def test_mjhq_measures_features_of_all_its_pictures_by_name(mjhq):
  bench = benchmark("mjhq", mjhq)
  assert len({task.seed for task in bench.tasks()}) == 6 and bench.data_files() == [mjhq / "data" / "meta_data.json"]
  records = generate(bench, mjhq)
  notes = bench.score(records).notes
  first, then = commands(notes[0])
  assert first[1].endswith("launch/experiments/features.py") and f"--output={mjhq / 'out/features.npz'}" in first
  assert f"--features={mjhq / 'out/features.npz'}" in then and "6 prompts, the published benchmark 30,000" in notes[-1]
  path = mjhq / "features.npz"
  order = np.random.default_rng(1).permutation(6)
  arrays = features_of([NAMES[i] for i in order], NAMES[::-1])
  np.savez(path, **arrays)
  result = benchmark("mjhq", mjhq, features=path).score(records)
  expected = distances.frechet(arrays["generated"], arrays["reference"])
  assert result.scores["FID"].value == pytest.approx(expected) and "Lanczos to 256, as" in result.notes[0]
  pairs = zip(arrays["clip_pictures"], arrays["clip_prompts"])
  cosine = [p @ q / np.linalg.norm(p) / np.linalg.norm(q) for p, q in pairs]
  assert result.scores["CLIP similarity"].value == pytest.approx(100 * np.mean(cosine), rel=1e-5)
  np.savez(path, **arrays | {"resize": np.array("bicubic")})
  result = benchmark("mjhq", mjhq, features=path).score(records)
  assert result.scores["FID, bicubic to 256"].value == pytest.approx(expected) and "FID" not in result.scores
  assert result.notes[0].startswith("Pictures were resized bicubic to 256") and "--resize=lanczos" in result.notes[0]


def without(name: str):
  return lambda arrays: {key: value for key, value in arrays.items() if key != name}


def with_nan(arrays):
  arrays["generated"][2, 1] = np.nan
  return arrays


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda a: features_of(NAMES[:4]), "id4, id5"),
    (lambda a: features_of(NAMES, NAMES[:4]), "reference: 2 of 6"),
    (lambda a: a | {"reference_names": np.array([*NAMES[:5], "other"])}, "reference: 1 of 6"),
    (lambda a: a | {"names": np.array([*NAMES[:5], "other"])}, "other"),
    (lambda a: a | {"names": np.array([*NAMES[:5], "id0"])}, "1 of 6"),
    (without("reference_names"), "'reference_names'"),
    (without("resize"), "'resize'"),
    (without("clip_pictures"), "clip_pictures"),
    (lambda a: a | {"resize": np.array("box")}, "resize='box'"),
    (lambda a: a | {"generated": a["generated"][:5]}, "generated float32[5, 4]"),
    (lambda a: a | {"reference": a["reference"][:, :3]}, "reference"),
    (lambda a: a | {"reference": a["reference"].astype(np.complex64)}, "reference complex64"),
    (lambda a: a | {"names": np.arange(6)}, "names int64[6]"),
    (with_nan, "generated"),
    (lambda a: a | {"clip_prompts": a["clip_prompts"][:, :2]}, "clip_prompts"),
    (lambda a: a | {"names": np.array(NAMES, object)}, "features.py"),  # pickled
    (lambda a: None, "features.py"),
    (lambda a: b"", "features.py"),
    (lambda a: b"PK\3\4 and no zip", "features.py"),
  ],
)
def test_wrong_features_are_one_line_with_the_file(change, message, mjhq):
  bench = benchmark("mjhq", mjhq)
  records, path = generate(bench, mjhq), mjhq / "features.npz"
  arrays = change(features_of(NAMES))
  if isinstance(arrays, dict):
    np.savez(path, **arrays)
  elif arrays is None:  # one array
    np.save(path.with_suffix(".npy"), np.zeros((6, 4), np.float32))
    path.with_suffix(".npy").rename(path)
  else:
    path.write_bytes(arrays)
  with refused(path, message):
    benchmark("mjhq", mjhq, features=path).score(records)


def test_mjhq10k_takes_as_many_prompts_of_each_category_and_the_whole_reference(mjhq, monkeypatch):
  kind = Mjhq10k
  assert (kind.prompts, kind.usual) == (10_000, {"flow": {"guidance": 7.5}})
  monkeypatch.setattr(kind, "prompts", 4)
  bench = benchmark("mjhq10k", mjhq)
  keys = [task.key for task in bench.tasks()]
  assert sorted(keys) == keys and [int(key[2:]) % 2 for key in keys].count(0) == 2
  records, path = generate(bench, mjhq), mjhq / "features.npz"
  np.savez(path, **features_of(keys))
  result = benchmark("mjhq10k", mjhq, features=path).score(records)
  assert result.scores["FID"].count == 4 and "the reference is all 6 true pictures" in " ".join(result.notes)
  np.savez(path, **features_of(NAMES))  # of an evaluation of all prompts
  with refused("2 of 6"):
    benchmark("mjhq10k", mjhq, features=path).score(records)


def test_prompts_are_drawn_evenly_and_the_same_in_any_order():
  rows = {f"{i:05d}": {"category": f"c{i % 10}"} for i in range(30_000)}
  names = evenly(rows, 10_000, "x")
  assert names == sorted(set(names)) and len(names) == 10_000
  assert set(collections.Counter(rows[name]["category"] for name in names).values()) == {1000}
  backward = evenly(dict(reversed(rows.items())), 10_000, "x")
  assert backward == names[::-1] and names[:3] == ["00000", "00003", "00007"]


# --- The extractor


@pytest.fixture
def extractor(monkeypatch):
  """launch/experiments/features.py as a module, with three pictures in a part."""
  pytest.importorskip("torch")
  spec = importlib.util.spec_from_file_location("features", tiny.ROOT / "launch" / "experiments" / "features.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  monkeypatch.setattr(module, "PART", 3)
  return module


@pytest.fixture
def pictures(mjhq):
  """mjhq with its true pictures, and a painted one of its own color for each."""
  rng = np.random.default_rng(0)
  for i, name in enumerate(NAMES):
    path = mjhq / "data" / "mjhq30k_imgs" / ("animals", "food")[i % 2] / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
  (mjhq / "data" / ".Trash-1000").mkdir()
  (mjhq / "data" / ".Trash-1000" / path.name).write_bytes(b"what was deleted")
  generate(benchmark("mjhq", mjhq), mjhq)
  return mjhq


def save_network(path) -> None:
  """A network with the interface of inception-2015-12-05.pt: mean and deviation of each channel."""
  import torch

  class Layers(torch.nn.Module):
    def forward(self, x: torch.Tensor):
      return torch.cat([x.mean((2, 3)), x.std((2, 3))], 1)[:, :, None, None]

  class Network(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.layers = Layers()

    def forward(self, x: torch.Tensor):
      return self.layers(x)

  torch.jit.script(Network()).save(str(path))


def extract(extractor, folder, monkeypatch, *more: str, output: str = "features.npz") -> int:
  """Runs the script; returns its exit code."""
  if not (folder / "inception.pt").exists():
    save_network(folder / "inception.pt")
  arguments = [
    f"--pictures={folder / 'out/pictures'}",
    f"--reference={folder / 'data'}",
    f"--output={folder / output}",
    f"--inception={folder / 'inception.pt'}",
    "--device=cpu",
    "--batch_size=2",
  ]
  monkeypatch.setattr(sys, "argv", ["features.py", *arguments, *more])
  return extractor.main()


def arrays_of(path) -> dict[str, np.ndarray]:
  with np.load(path) as file:
    return {name: file[name] for name in file.files}


def test_the_extractor_normalises_as_clean_fid_and_feeds_the_benchmark(pictures, extractor, monkeypatch):
  Image.new("RGB", (9, 9)).save(pictures / "data" / "a_picture_of_no_prompt.png")  # is not of the reference
  assert extract(extractor, pictures, monkeypatch) == 0
  arrays = arrays_of(pictures / "features.npz")
  assert sorted(arrays["reference_names"]) == NAMES == arrays["names"].tolist() and arrays["resize"] == "lanczos"
  assert len(arrays["reference"]) == 6 and not (pictures / "features.npz.parts").exists()
  np.testing.assert_allclose(arrays["generated"][5][:3], [(5 - 128) / 128, -1, -1], atol=1e-6)  # of color (5, 0, 0)
  records = {name: {"file": f"pictures/{name}.png"} for name in NAMES}
  lanczos = benchmark("mjhq", pictures, features=pictures / "features.npz").score(records).scores
  assert np.isfinite(lanczos["FID"].value) and lanczos["FID"].count == 6
  assert extract(extractor, pictures, monkeypatch, "--resize=bicubic", output="bicubic.npz") == 0
  other = arrays_of(pictures / "bicubic.npz")
  true = [Image.open(next((pictures / "data").rglob(f"{name}.jpg"))) for name in other["reference_names"]]
  means = [(distances.inception_input(image, lanczos=False).mean((0, 1)) - 128) / 128 for image in true]
  np.testing.assert_allclose(other["reference"][:, :3], means, atol=1e-5)
  assert np.abs(other["reference"] - arrays["reference"]).max() > 1e-3
  scores = benchmark("mjhq", pictures, features=pictures / "bicubic.npz").score(records).scores
  assert set(scores) == {"FID, bicubic to 256"}


def test_the_extractor_goes_on_where_it_was_stopped(pictures, extractor, monkeypatch):
  assert extract(extractor, pictures, monkeypatch, output="whole.npz") == 0
  opened, picture = [], extractor.picture

  def stops(path):
    opened.append(path)
    if len(opened) == 11:  # the two parts of the painted ones and one of two of the true ones are whole
      raise KeyboardInterrupt
    return picture(path)

  monkeypatch.setattr(extractor, "picture", stops)
  with pytest.raises(KeyboardInterrupt):
    extract(extractor, pictures, monkeypatch)
  folder = pictures / "features.npz.parts"
  parts = sorted(folder.iterdir())
  assert [path.name[:16] for path in parts] == ["generated-000000", "generated-000003", "reference-000000"]
  assert not (pictures / "features.npz").exists()
  parts[1].write_bytes(parts[1].read_bytes()[:100])  # damaged: made again
  changed = next((pictures / "data").rglob(f"{NAMES[0]}.jpg"))
  changed.touch()  # perhaps another picture: its part is made again
  opened.clear()
  monkeypatch.setattr(extractor, "picture", lambda path: opened.append(path) or picture(path))
  assert extract(extractor, pictures, monkeypatch) == 0
  assert len(opened) == 3 + 6 and not folder.exists()
  whole, result = arrays_of(pictures / "whole.npz"), arrays_of(pictures / "features.npz")
  assert whole.keys() == result.keys()
  for name in whole:
    np.testing.assert_array_equal(whole[name], result[name])


def test_parts_of_another_way_to_resize_are_not_taken(pictures, extractor, monkeypatch):
  assert extract(extractor, pictures, monkeypatch, "--resize=bicubic", output="whole.npz") == 0
  save, saved = extractor.save, []
  monkeypatch.setattr(extractor, "save", lambda path, arrays: saved.append(path) or save(path, arrays))
  monkeypatch.setattr(extractor.Parts, "remove", lambda self: None)
  assert extract(extractor, pictures, monkeypatch) == 0 and len(saved) == 5
  assert extract(extractor, pictures, monkeypatch, "--batch_size=3") == 0 and len(saved) == 6  # the .npz alone
  assert extract(extractor, pictures, monkeypatch, "--resize=bicubic") == 0 and len(saved) == 11
  np.testing.assert_array_equal(*(arrays_of(pictures / f"{x}.npz")["reference"] for x in ("whole", "features")))


def unlink(folder):
  next((folder / "data").rglob("id3.jpg")).unlink()


@pytest.mark.parametrize(
  "change, message",
  [
    (unlink, "data: 1 of 6 pictures of meta_data.json are missing (id3): unpack"),
    (lambda f: Image.new("RGB", (9, 9)).save(f / "data" / "id3.png"), "data: 1 pictures lie there twice, for example"),
    (lambda f: Image.new("RGB", (9, 9)).save(f / "out/pictures/id3.jpg"), "out/pictures: 1 pictures lie there twice"),
    (lambda f: Image.new("RGB", (9, 9)).save(f / "out/pictures/x.png"), "1 of 7 pictures have no prompt in meta_data"),
    (lambda f: (f / "out/pictures/id2.png").write_bytes(b"\x89PNG"), "out/pictures/id2.png is no readable picture"),
    (lambda f: (f / "data/meta_data.json").write_text("[]"), "meta_data.json is no object of names with prompts"),
    (lambda f: (f / "data/meta_data.json").unlink(), "meta_data.json does not exist"),
    (lambda f: (f / "inception.pt").write_bytes(b"x"), "inception.pt is no TorchScript file"),
    (lambda f: (f / "out/pictures").rename(f / "elsewhere"), "out/pictures holds no pictures"),
  ],
)
def test_the_extractor_refuses_pictures_that_do_not_fit(change, message, pictures, extractor, monkeypatch, capsys):
  change(pictures)
  assert extract(extractor, pictures, monkeypatch) == 2
  said = capsys.readouterr().err
  assert said.startswith("features: ") and said.count("\n") == 1 and message in said


def test_an_evaluation_inside_the_reference_does_not_count_as_true_pictures(pictures, extractor, monkeypatch, capsys):
  (pictures / "out").rename(pictures / "data" / "out")
  assert extract(extractor, pictures, monkeypatch, f"--pictures={pictures / 'data/out/pictures'}") == 2
  assert "6 pictures lie there twice" in capsys.readouterr().err


def save_clip(folder) -> None:
  """A CLIP of random weights with a tokenizer of the words of the test."""
  tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
  import torch

  words = ["[pad]", "[unk]", "[start]", "[end]", "a", "photo", "depicts", "prompt", *map(str, range(6))]
  raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[unk]"))
  raw.normalizer, raw.pre_tokenizer = tokenizers.normalizers.Lowercase(), tokenizers.pre_tokenizers.Whitespace()
  raw.post_processor = tokenizers.processors.TemplateProcessing(
    single="[start] $A [end]", special_tokens=[("[start]", 2), ("[end]", 3)]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw,
    pad_token="[pad]",
    unk_token="[unk]",
    bos_token="[start]",
    eos_token="[end]",
    model_max_length=12,
  ).save_pretrained(folder)
  small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
  special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
  text = small | special | {"vocab_size": 20, "max_position_embeddings": 12}
  vision = small | {"image_size": 24, "patch_size": 8}
  torch.manual_seed(0)
  config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
  transformers.CLIPModel(config).save_pretrained(folder)
  size = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
  transformers.CLIPImageProcessor(**size).save_pretrained(folder)


def test_clip_features_are_those_of_one_picture_and_prompt_at_a_time(pictures, extractor, monkeypatch):
  """Against the model's own forward pass without a batch; one prompt is longer than the context."""
  save_clip(pictures / "clip")
  import torch
  from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

  path = pictures / "data" / "meta_data.json"
  meta = json.loads(path.read_text())
  meta["id4"]["prompt"] = "prompt 4 " * 20
  path.write_text(json.dumps(meta))
  assert extract(extractor, pictures, monkeypatch, f"--clip={pictures / 'clip'}") == 0
  arrays = arrays_of(pictures / "features.npz")
  model = CLIPModel.from_pretrained(pictures / "clip").eval()
  process, tokenize = (x.from_pretrained(pictures / "clip") for x in (CLIPImageProcessor, AutoTokenizer))
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  for i, name in enumerate(arrays["names"]):
    image = process(Image.open(pictures / "out/pictures" / f"{name}.png").convert("RGB"), return_tensors="pt")
    for key, before in (("clip_prompts", ""), ("clip_prompts_depicts", "A photo depicts ")):
      with torch.no_grad():
        words = tokenize(before + meta[name]["prompt"], return_tensors="pt", truncation=True)
        out = model(pixel_values=image.pixel_values, input_ids=words.input_ids, attention_mask=words.attention_mask)
      np.testing.assert_allclose(unit(arrays[key][i]), out.text_embeds[0].numpy(), atol=1e-5)
      np.testing.assert_allclose(unit(arrays["clip_pictures"][i]), out.image_embeds[0].numpy(), atol=1e-5)
  assert np.ptp(unit(arrays["clip_prompts"]), 0).max() > 1e-3 and arrays["clip_prompts"].shape == (6, 8)
  records = {name: {"file": f"pictures/{name}.png"} for name in NAMES}
  scores = benchmark("mjhq", pictures, features=pictures / "features.npz").score(records).scores
  assert {"FID", "CLIP similarity", 'CLIP similarity, "A photo depicts"'} == set(scores)
  assert extract(extractor, pictures, monkeypatch, f"--clip={pictures / 'data'}") == 2  # no model


def test_the_features_say_that_they_need_pytorch():
  program = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('launch/experiments/features.py', run_name='__main__')"
  done = subprocess.run([sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True)
  assert done.returncode == 2
  assert (
    done.stderr == "launch/experiments/features.py needs PyTorch, which jflow does not install: pip install torch\n"
  )
