"""One's own records: each has a loss as in training, and an answer or a picture beside the truth on the page."""

import dataclasses
import json
import pathlib

import fsspec
import jax
import numpy as np
import pytest
import tiny
from data_config import data_config
from PIL import ExifTags, Image
from preparing import chat, make_folder, run, write_lines
from refusals import refused

from jflow.__main__ import main
from jflow.data import images
from jflow.data.held_out import held_out
from jflow.data.pipeline import Pipeline
from jflow.data.records import Record
from jflow.data.store import prepare
from jflow.data.store.prepared import PreparedSource
from jflow.data.tokenizer import Tokenizer
from jflow.evaluation import losses, runner
from jflow.evaluation.benchmarks.records import words_shared
from jflow.evaluation.settings import Settings
from jflow.evaluation.tasks import Loss, Question
from jflow.inference.pipeline import prepare_image
from jflow.interop import native, remote
from jflow.models.config import ModelConfig


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  """A prepared set of 12 pictures with a question each."""
  return run(make_folder(tmp_path_factory.mktemp("records") / "in"))[1]


def met(checkpoint, data, output, **fields):
  """The benchmark as it is before its tasks, and the checkpoint."""
  settings = Settings("records", str(checkpoint), output, data=pathlib.Path(data), **fields)
  benchmark, opened = runner.opened(settings), runner.Checkpoint(settings)
  benchmark.meet(opened.config)
  benchmark.meet_run(opened.run, opened.described)
  return benchmark, opened


def evaluated(checkpoint, data, output, *flags):
  named = [f"--checkpoint={checkpoint}", f"--data={data}", f"--output={output}", "--batch_size=4", *flags]
  assert main(["evaluate", "--benchmark=records", *named]) == 0
  lines = (output / "records.jsonl").read_text().splitlines()
  return json.loads((output / "report.json").read_text()), {row["key"]: row for row in map(json.loads, lines)}


def test_answers_stand_beside_the_truth_with_the_loss_of_training(tiny_checkpoint, chats, tmp_path):
  body, records = evaluated(tiny_checkpoint, chats, tmp_path)
  config = data_config({"understanding": ((chats, 1.0),)}, mixture=((0, (1, 0, 0)),))
  pipeline = Pipeline(config, Tokenizer.load(str(tiny.TOKENIZER)), tiny.SHAPE, 4, 0)
  rows = pipeline.sources()[0].plan.rows
  params = native.load_params(native.resolve(tiny_checkpoint)[1])
  total, count = 0.0, 0
  for step in range(-(-rows // 4)):  # one epoch; the rows beyond it are the next one's
    batch = pipeline.batch(step)
    batch = jax.tree.map(lambda x, n=min(4, rows - 4 * step): np.concatenate([x[:n], 0 * x[n:]]), batch)
    total += float(tiny.loss_sums(tiny.model(), params, batch, tiny.draws(4), ("text",))["text"])
    count += int(batch.loss_mask.sum())
  assert sum(records[f"loss/{i:08d}"]["answer"][1] for i in range(12)) == count
  assert body["scores"]["loss of a token"]["value"] == pytest.approx(total / count, rel=1e-4)
  page = (tmp_path / "report.html").read_text()
  assert all(f"Number {i}, né." in page for i in range(12)) and page.count("<img") == 12
  assert {"same answer", "words shared"} <= set(body["scores"])


def test_pictures_stand_beside_the_truth(tiny_checkpoint, tmp_path):
  data = tmp_path / "painted"
  prepare.prepare("shapes", str(data), "generation", records=6, image_size=16, processes=1)
  body, records = evaluated(tiny_checkpoint, data, tmp_path / "out", "--limit=3", "--steps=2")
  assert sorted(records) == [f"{kind}/{i:08d}" for kind in ("loss", "paint") for i in (0, 2, 5)]
  page = (tmp_path / "out" / "report.html").read_text()
  assert page.count("<img") == 6 and "3 of 6 records" in page
  assert (
    body["scores"]["nearest"]["chance"] == pytest.approx(1 / 3) and body["scores"]["loss of a picture"]["count"] == 3
  )


def test_held_out_records_are_those_of_the_share(tiny_checkpoint, chats, tmp_path):
  found = held_out(PreparedSource(chats, "understanding"), 0.4)
  benchmark, _ = met(tiny_checkpoint, chats, tmp_path, split="held-out:0.4")
  names = {task.key.split("/")[1] for task in benchmark.tasks()}
  assert names == {f"{i:08d}" for i in np.flatnonzero(found)} and names


@pytest.mark.parametrize(
  "given, named",
  [
    (dict(split="half"), "--split=half"),
    (dict(split="held-out:0.00001"), "--split=held-out:0.00001"),
    (dict(sampling={"steps": 3}), "--steps"),
    (dict(data="nowhere"), "nowhere"),
  ],
)
def test_what_does_not_fit_is_refused(tiny_checkpoint, chats, tmp_path, given, named):
  fields = dict(data=chats) | given
  with refused(named):
    runner.opened(Settings("records", tiny_checkpoint, tmp_path, data=pathlib.Path(fields.pop("data")), **fields))


def test_a_run_without_held_out_records_has_none_to_evaluate(tiny_checkpoint, chats, tmp_path):
  with refused("--split=held-out", "data.validation"):
    met(tiny_checkpoint, chats, tmp_path, split="held-out")


def test_a_seed_beyond_the_last_is_refused(tiny_checkpoint, chats, tmp_path):
  with refused("seed"):
    runner.evaluate(Settings("records", tiny_checkpoint, tmp_path, data=pathlib.Path(chats), seed=2**32 - 1))


def test_the_model_sees_what_training_shows_and_what_is_too_long_is_left_out(tiny_checkpoint, tmp_path):
  folder, pictures = tmp_path / "in", []
  folder.mkdir()
  grey = np.full((9, 12, 4), 99, np.uint8)
  grey[:4, :, 3] = 0
  turned = Image.Exif()
  turned[ExifTags.Base.Orientation] = 6
  for i, format, more in ((0, "PNG", {}), (1, "JPEG", {"exif": turned})):
    Image.fromarray(grey[..., : 4 - i]).save(folder / f"{i}", format, **more)
    pictures.append((folder / f"{i}").read_bytes())
  answers = ("This.", "That.", "Word " * 200)
  write_lines(folder / "chat.jsonl", [chat(str(min(i, 1)), answer=text) for i, text in enumerate(answers)])
  benchmark, _ = met(tiny_checkpoint, run(folder)[1], tmp_path)
  asked = [task for task in benchmark.tasks() if isinstance(task, Question)]
  assert [task.key for task in asked] == ["ask/00000000", "ask/00000001"]
  for task, picture in zip(asked, pictures, strict=True):
    want = images.for_understanding(picture, 16)
    np.testing.assert_array_equal(prepare_image(task.images()[0], 16), want)


def test_a_picture_to_write_has_the_patches_of_the_writers_grid(tiny_checkpoint, tmp_path):
  """Also where SigLIP's grid is another one: 25 patches are read here, and 16 written."""
  settings = Settings(benchmark="records", checkpoint=tiny_checkpoint, output=tmp_path, data=tmp_path)
  opened = runner.Checkpoint(settings)
  tower = tiny.DICT["understanding_encoder"] | dict(patch_size=3)
  config = ModelConfig.from_dict(tiny.DICT | dict(objectives={}, understanding_encoder=tower))
  found = opened.described()._replace(config=config)
  image = np.zeros((16, 16, 3), np.uint8)
  record = lambda: Record("a", (image,), "a red ring", ())
  for name, patches in (("generation", config.written_patches), ("understanding", config.patches)):
    (made,) = losses.pieces(found, Loss("loss/0", record, name, 0), opened.run)
    words = losses.pieces(opened.described(), Loss("loss/0", record, name, 0), opened.run)[0]
    assert len(made.tokens) - len(words.tokens) == patches - tiny.CONFIG.patches


def test_a_text_longer_than_the_context_is_read_in_pieces(tiny_checkpoint, tmp_path):
  words = "word " * 200
  (tmp_path / "a.txt").write_text(words)
  _, data = run(tmp_path, "text", name="a.txt", format="text", output=str(tmp_path / "out"))
  benchmark, opened = met(tiny_checkpoint, data, tmp_path / "report")
  (task,) = benchmark.tasks()
  found = opened.described()
  cut = losses.pieces(found, task, opened.run)
  tokens = found.tokenizer.encode(words.strip())
  assert len(cut) > 1 and max(len(piece.tokens) for piece in cut) <= tiny.CONFIG.language_model.max_length
  targets = np.concatenate([piece.targets[piece.loss_mask] for piece in cut])
  assert targets.tolist() == [*tokens, found.tokenizer.eos]


def test_what_the_run_knows_is_read_of_the_copy_of_a_store(tiny_checkpoint, tmp_path, monkeypatch):
  monkeypatch.setattr(remote.fetch, "__defaults__", (tmp_path / "cache",))
  memory = fsspec.filesystem("memory")
  memory.put(tiny_checkpoint, "/records/run", recursive=True)
  config = json.loads(memory.cat("/records/run/config.json"))
  config["data"] |= {"caption_prompt": "What is this?", "validation": 0.25, "crop": "pad"}
  memory.pipe("/records/run/config.json", json.dumps(config).encode())
  settings = Settings("records", "memory://records/run", tmp_path)
  told, usual = (
    runner.Checkpoint(settings).run,
    runner.Checkpoint(dataclasses.replace(settings, checkpoint=tiny_checkpoint)).run,
  )
  memory.rm("/records", recursive=True)
  assert (told.caption_prompt, told.validation, told.crop) == ("What is this?", 0.25, "pad")
  assert (usual.validation, usual.crop) == (0.0, "center")


@pytest.mark.parametrize(
  "said, truth, f1",
  [("A red cat.", "the red cat", 1.0), ("a dog", "cat", 0.0), ("red", "red cat", 2 / 3), ("", "", 1.0)],
)
def test_words_shared(said, truth, f1):
  assert words_shared(said, truth) == pytest.approx(f1)
