"""The models that ship: their cards tell the scores of their own weights alone, and they paint and read."""

import importlib.util
import json

import numpy as np
import pytest
import tiny
from refusals import refused

import jflow
from jflow.evaluation import report
from jflow.interop import checkpoints
from jflow.world import judge, source


@pytest.fixture(scope="module")
def ship():
  spec = importlib.util.spec_from_file_location("ship", tiny.ROOT / "launch" / "experiments" / "ship.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_card_is_of_the_weights_beside_it(tmp_path, tiny_checkpoint, ship):
  folder, scores = tmp_path / "model", tmp_path / "report.json"
  ship.pack(tiny_checkpoint, folder)
  assert {str(x.dtype) for x in checkpoints.read_checkpoint(folder).params["language_model"]["norm"].values()} == {
    "bfloat16"
  }
  found = {
    "seen pictures: colors": dict(value=0.5, low=0.25, high=0.75),
    "held-out questions: overall": dict(value=0.125, low=0.0, high=0.5),
  }
  settings = dict(fingerprint=report.fingerprint(folder, "ema"), seed=3, steps=30, guidance=2.0)
  told = dict(scores=found, settings=settings, commit="abc", date="2026-01-02T03:04")
  scores.write_text(json.dumps(told))
  text = ship.card(folder, scores, "bash train.sh")
  assert "| pictures: colors | 0.500 [0.250, 0.750] |  |" in text
  assert "| questions: overall |  | 0.125 [0.000, 0.500] |" in text
  assert "--checkpoint=world --prompt" in text and text.startswith("# world\n") and "bash train.sh" in text
  assert "abc, 2026-01-02; seed 3, steps 30, guidance 2." in text
  told["settings"]["fingerprint"] = "0" * 64
  scores.write_text(json.dumps(told))
  with refused(scores, folder):
    ship.card(folder, scores, "")


@pytest.mark.parametrize("name, scores", [("world", "world.json"), ("world-codes", "world_codes.json")])
def test_the_card_that_ships_is_of_the_weights_and_the_scores_that_are_told(ship, name, scores):
  results, folder = tiny.ROOT / "launch" / "experiments" / "results" / scores, checkpoints.locate(name)
  card = (folder / "README.md").read_text(encoding="utf-8")
  assert card == ship.card(folder, results, card.split("**Recipe**: ")[1].split("\n")[0])


@pytest.mark.parametrize("name", ["world", "world-codes"])
def test_a_model_that_ships_paints_what_it_is_asked_for_and_reads_it(name):
  model = jflow.load(name)
  asked = source.evaluation_prompts("val", 12, 0, ("colors",))
  pictures = model.generate([text for text, _ in asked])
  right = [judge.strict(judge.detect(np.asarray(x)), about) for x, (_, about) in zip(pictures, asked, strict=True)]
  assert sum(right) >= 9
  question = lambda about: f"What color is the {about['include'][0]['class']}?"
  said = [model.understand(question(about), [x], 8) for x, (_, about) in zip(pictures, asked, strict=True)]
  assert sum(word == about["include"][0]["color"] for word, (_, about) in zip(said, asked, strict=True)) >= 9
