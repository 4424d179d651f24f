"""The loss of held-out records along a run, its best step, and the early end."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from jflow.data.tokenizer import Tokenizer
from jflow.errors import Terminated
from jflow.interop import native
from jflow.models.unified import loss_counts
from jflow.training import loop, setup
from jflow.training.metrics import read_lines, read_metrics
from jflow.training.step import draw

NAMES = ("val_loss", "val_loss_text", "val_loss_flow")


def config(steps, **train):
  return tiny.configuration(
    train=dict(steps=steps, validation_every=3, early_stop=2, ema=0.0) | train,
    data=dict(
      sources={"understanding": (), "generation": (("shapes", 1.0),), "text": (("shapes", 1.0),)},
      mixture=((0, (3, 1, 1)),),  # nothing to read, and it goes without saying
      validation=0.2,
      validation_rows=8,
      shapes={**vars(tiny.configuration().data.shapes), "size": 60},
      plan_cache="",
    ),
    objective=dict(weights=dict(text=1.0, flow=2.0), logged=()),
    optimizer=dict(learning_rate=0.5, warmup_steps=1),  # so high that the loss rises soon
    checkpoint=dict(interval=6, keep=1),
  )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The folder of a run of at most 60 steps, and of one that was stopped at 6 and goes on."""
  folder = tmp_path_factory.mktemp("validation")
  loop.train(config(60), folder / "whole")
  loop.train(config(6), folder / "halves")
  loop.train(config(60), folder / "halves")
  return folder


def losses(workdir):
  return [(row["step"], *(row.get(name) for name in ("loss", *NAMES))) for row in read_metrics(workdir)]


def test_it_ends_early_and_its_best_step_is_loaded(runs, capsys):
  rows = read_metrics(runs / "whole")
  held = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
  assert rows[-1]["step"] < 60 and set(held) == set(range(3, rows[-1]["step"] + 1, 3))
  best = min(held, key=held.get)
  assert rows[-1]["step"] == best + 2 * 3
  assert json.loads((runs / "whole" / "best.json").read_text()) == {"step": best, "val_loss": held[best]}
  workdir, step = native.resolve(runs / "whole")
  assert step.name == str(best) and str(best) in capsys.readouterr().err
  assert {p.name for p in step.parent.iterdir()} == {str(best), str(rows[-1]["step"])}


def test_the_compilation_is_no_productive_time_where_the_first_step_is_validated(tmp_path):
  loop.train(config(2, validation_every=1), tmp_path / "run")
  rows = [(row["phase"], row["step"]) for row in read_lines(tmp_path / "run" / "goodput.jsonl")]
  assert rows.index(("validate", 0)) < rows.index(("compile", 1)) < rows.index(("validate", 1))
  assert [phase for phase, _ in rows if phase in ("compile", "steps")][0] == "compile" and ("steps", 2) in rows


def test_a_save_that_waits_for_an_earlier_one_has_the_time_of_a_slow_step(tmp_path, monkeypatch):
  allowed, at_save, beat, save = [], [], loop.Watchdog.beat, loop.Checkpointer.save

  def beaten(self, what, slow=False):
    allowed.append(slow)
    beat(self, what, slow)

  monkeypatch.setattr(loop.Watchdog, "beat", beaten)
  monkeypatch.setattr(loop.Checkpointer, "save", lambda *args: (at_save.append(allowed[-1]), save(*args)))
  loop.train(config(7, validation_every=0, early_stop=0), tmp_path / "run")
  assert at_save == [True, True] and allowed[-3:] == [True, False, True]  # the save, what follows, the last wait


def test_it_goes_on_bit_for_bit_with_its_patience(runs):
  assert losses(runs / "whole") == losses(runs / "halves")
  assert (runs / "whole" / "best.json").read_text() == (runs / "halves" / "best.json").read_text()


def test_a_run_that_has_ended_early_stays_so(runs, capsys):
  before = losses(runs / "halves")
  loop.train(config(60), runs / "halves")
  assert losses(runs / "halves") == before and "is complete" in capsys.readouterr().err


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_signal_saves_before_these_losses_which_the_continuation_computes(runs, tmp_path, at_the_end):
  """Bit for bit as in a run that goes on. The signal comes with the sample pictures of the step before."""
  rows = read_metrics(runs / "whole")
  at, run = rows[-1]["step"] if at_the_end else 6, tmp_path / "run"

  def ask(model, tokenizer, params, prompts):
    os.kill(os.getpid(), signal.SIGTERM)
    return [Image.new("RGB", (8, 8))] * len(prompts)

  with pytest.raises(Terminated):
    loop.train(config(60).replace(log=dict(sample_every=at - 1)), run, ask)
  stopped = read_metrics(run)
  assert stopped[-1]["step"] == at and "val_loss" not in stopped[-1] and native.load_params(run / f"checkpoints/{at}")
  loop.train(config(60), run)
  assert losses(run) == losses(runs / "whole")
  assert (run / "best.json").read_text() == (runs / "whole" / "best.json").read_text()


def test_patience_begins_anew_where_the_best_step_is_not_kept(runs, tmp_path, capsys):
  """As of a run that gets its patience later, and has kept the newest steps alone."""
  shutil.copytree(runs / "whole", tmp_path / "run")
  best, last = (
    json.loads((runs / "whole" / "best.json").read_text())["step"],
    read_metrics(runs / "whole")[-1]["step"],
  )
  shutil.rmtree(tmp_path / "run" / "checkpoints" / str(best))
  loop.train(config(last + 3), tmp_path / "run")
  found = json.loads((tmp_path / "run" / "best.json").read_text())
  assert found["step"] == last + 3 == read_metrics(tmp_path / "run")[-1]["step"]
  assert f"at step {best}," not in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{}", b'{"step": 1}', b'{"step": "3"}'])
def test_without_a_sound_best_step_it_is_the_newest(runs, tmp_path, capsys, content):
  shutil.copytree(runs / "whole", tmp_path / "run")
  (tmp_path / "run" / "best.json").write_bytes(content)
  assert native.resolve(tmp_path / "run")[1].name == str(read_metrics(runs / "whole")[-1]["step"])
  assert "is not used" in capsys.readouterr().err


def test_the_loss_is_the_mean_over_all_terms_of_the_held_out_rows(runs):
  """Of the best step, computed apart: text has no draws, so one row at a time gives its sum."""
  run, best = config(60), json.loads((runs / "whole" / "best.json").read_text())["step"]
  params = native.load_params(native.resolve(runs / "whole")[1])
  mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "model"))
  held = setup.open_held_out(run, Tokenizer.load(run.data.tokenizer), mesh)
  model, total, count = setup.build(run, jax.devices()[0]), 0.0, 0.0
  for batch in held.batches[0]:
    draws = draw(model, jax.random.key(0), batch, run.objective)
    total += float(tiny.loss_sums(model, params, batch, draws, ("text",))["text"])
    count += float(loss_counts(model.config, batch)["text"])
  row = next(row for row in read_metrics(runs / "whole") if row["step"] == best)
  assert np.isclose(row["val_loss_text"], total / count, rtol=1e-5)
  assert np.isclose(row["val_loss"], row["val_loss_text"] + 2 * row["val_loss_flow"], rtol=1e-6)
