"""Scalars and sample pictures: TensorBoard's own reader finds what was written; the plain line tells the time left."""

import importlib.util
import io
import sys
import types

import numpy as np
import pytest
import tiny
from PIL import Image
from refusals import refused

from jflow.progress import StepProgress
from jflow.training import setup, tracking

ROW = {
  "step": 3,
  "loss": 1.5,
  "loss_text": 1.0,
  "loss_flow": 0.5,
  "grad_norm": 2.0,
  "fill": 0.75,
  "mfu": None,
  "packs": {"understanding": 2, "text": 1},
  "rejected": {},
  "skipped": 0,
  "val_loss": 1.25,
  "val_loss_text": 0.75,
  "val_loss_flow": None,  # no held-out record has one
}


def test_tensorboard_reads_scalars_and_pictures_back(tmp_path):
  accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  rng = np.random.default_rng(0)
  images = [Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)) for _ in range(2)]
  opened = tracking.trackers(tiny.configuration(log=dict(tensorboard=True)), tmp_path)
  for tracker in opened:
    for step in (3, 4):
      tracker.scalars(step, tracking.scalars(ROW))
    tracker.pictures(4, ("a ring", "a star"), images)
    tracker.close()
  events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  wanted = {
    "loss/total": 1.5,
    "loss/text": 1.0,
    "loss/flow": 0.5,
    "run/grad_norm": 2.0,
    "run/fill": 0.75,
    "run/skipped": 0.0,
    "packs/understanding": 2.0,
    "packs/text": 1.0,
    "val/total": 1.25,
    "val/text": 0.75,
  }
  assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
    tag: [(3, value), (4, value)] for tag, value in wanted.items()
  }
  for number, prompt in enumerate(("a ring", "a star")):
    (event,) = events.Images(f"samples/{prompt}")
    assert event.step == 4 and (event.width, event.height) == (12, 8)
    for source in (io.BytesIO(event.encoded_image_string), tmp_path / "samples" / f"00000004_{number}.png"):
      np.testing.assert_array_equal(np.asarray(Image.open(source)), np.asarray(images[number]))


@pytest.mark.parametrize("name, value", [("tensorboard", True), ("wandb", "project")])
def test_a_missing_package_is_named_before_anything_starts(monkeypatch, name, value):
  there = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package == name else there(package))
  with refused(f"config.log.{name}", "pip install", repr(value)):
    setup.check(tiny.configuration(log={name: value}))
  setup.check(tiny.configuration())


def test_two_workdirs_of_one_name_are_two_runs_and_a_restart_is_the_same(monkeypatch, tmp_path):
  started = []
  fake = types.SimpleNamespace(init=lambda **fields: started.append((fields["name"], fields["id"])))
  monkeypatch.setitem(sys.modules, "wandb", fake)
  for name in ("a", "b", "a"):
    workdir = tmp_path / name / "stage2"
    workdir.mkdir(parents=True, exist_ok=True)
    tracking.trackers(tiny.configuration(log=dict(wandb="project")), workdir)
  (first, second, again) = started
  assert first == again != second and {name for name, _ in started} == {"stage2"}


def test_the_line_of_a_step_shows_every_loss_of_the_run(capsys):
  losses = {"loss": 3.0, "loss_text": 2.0, "loss_brightness": 1.0, "loss_codes": None}
  StepProgress(total=40, first=4, every_seconds=0.0).update({"step": 5, "tokens_per_second": 5.0} | losses)
  assert "loss 3.000 text 2.000 brightness 1.000 tok/s 5" in capsys.readouterr().err


def test_the_time_left_does_not_count_the_compilation(monkeypatch, capsys):
  """A minute to compile, then two seconds a step."""
  now = [100.0]
  monkeypatch.setattr("jflow.progress.time.monotonic", lambda: now[0])
  progress = StepProgress(total=40, first=4, every_seconds=0.0)
  for step, at in ((5, 160.0), (6, 162.0), (10, 170.0)):
    now[0] = at
    progress.update({"step": step, "loss": 1.0, "tokens_per_second": 5.0})
  lines = capsys.readouterr().err.splitlines()
  assert [line.split("tok/s 5 ")[1] for line in lines] == [
    "compiled in 1.0 min",
    "left 1.1 min",
    "left 1.0 min",
  ]
  StepProgress(total=40, first=4, every_seconds=0.0, shown=False).update(
    {"step": 5, "loss": 1.0, "tokens_per_second": 1}
  )
  assert capsys.readouterr().err == ""
