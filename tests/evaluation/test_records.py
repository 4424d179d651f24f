"""One's own records: each has a loss as in training, and an answer or a picture beside the truth on the page."""

import json
import pathlib

import jax
import numpy as np
import pytest
import tiny
from data_config import data_config
from preparing import make_folder, run
from refusals import refused

from jflow.__main__ import main
from jflow.data.held_out import held_out
from jflow.data.pipeline import Pipeline
from jflow.data.store import prepare
from jflow.data.store.prepared import PreparedSource
from jflow.data.tokenizer import Tokenizer
from jflow.evaluation import runner
from jflow.evaluation.benchmarks.records import words_shared
from jflow.evaluation.settings import Settings
from jflow.interop import native


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
  """A prepared set of 12 pictures with a question each."""
  return run(make_folder(tmp_path_factory.mktemp("records") / "in"))[1]


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
  settings = Settings("records", tiny_checkpoint, tmp_path, data=pathlib.Path(chats), split="held-out:0.4")
  names = {task.key.split("/")[1] for task in runner.opened(settings).tasks()}
  assert names == {f"{i:08d}" for i in np.flatnonzero(found)} and names


@pytest.mark.parametrize(
  "given, named",
  [
    (dict(split="held-out"), "data.validation"),
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


@pytest.mark.parametrize(
  "said, truth, f1",
  [("A red cat.", "the red cat", 1.0), ("a dog", "cat", 0.0), ("red", "red cat", 2 / 3), ("", "", 1.0)],
)
def test_words_shared(said, truth, f1):
  assert words_shared(said, truth) == pytest.approx(f1)
