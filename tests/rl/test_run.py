"""Runs of reinforcement learning as a user starts them: resumed bit for bit, stopped by a reward that fails."""

import functools

import numpy as np
import pytest
import runs
from flax.traverse_util import flatten_dict

from jflow.cli import train
from jflow.errors import Stopped, UserError
from jflow.interop.checkpoints import read_checkpoint
from jflow.training.metrics import read_metrics

OWN = f"(('{__name__}:brightness',1.0),('true',0.1))"
FLAGS = (
  *runs.SMALL[1:],
  "--config=grpo:tiny",
  "--config.checkpoint.interval=2",
  f"--config.rl.rewards={OWN}",
  "--config.rl.explore.steps=3",
  "--config.rl.kl=0.1",
  "--config.model.language_model.num_layers=1",
)
FAILS = []


def brightness(images, prompts, metadata):
  """A reward of one's own."""
  if FAILS:
    raise RuntimeError("the scorer is gone")
  return images.mean((1, 2, 3)) / 255


run = functools.partial(runs.inside, FLAGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Holds a run of 4 steps, and one whose reward fails after 2 and that goes on."""
  folder = tmp_path_factory.mktemp("grpo")
  run(folder / "whole", 4)
  run(folder / "halves", 2)
  FAILS.append(True)
  with pytest.raises(Stopped) as stopped:
    run(folder / "halves", 4)
  FAILS.clear()
  assert f"{__name__}:brightness" in str(stopped.value) and str(folder / "halves/checkpoints/2") in str(stopped.value)
  run(folder / "halves", 4)
  return folder


def test_it_goes_on_bit_for_bit(folder):
  timed = {"tokens_per_second", "mfu"}
  whole, halves = (
    [{key: x for key, x in row.items() if key not in timed} for row in read_metrics(folder / name)]
    for name in ("whole", "halves")
  )
  assert whole == halves and [row["step"] for row in whole] == [1, 2, 3, 4]
  a, b = (flatten_dict(read_checkpoint(folder / name).params) for name in ("whole", "halves"))
  for path, x in a.items():
    np.testing.assert_array_equal(x, b[path])


def test_its_metrics_say_what_is_to_watch(folder):
  first, *_, last = read_metrics(folder / "whole")
  own = f"{__name__}:brightness"
  total = first[f"reward_{own}"] + 0.1 * first["reward_true"]
  assert first["reward"] == pytest.approx(total, rel=1e-4)
  assert first["kl"] == pytest.approx(0, abs=1e-8) and last["kl"] > 0 and first["ratio"] == pytest.approx(1, abs=1e-5)
  assert first[f"reward_spread_{own}"] > 0 and first["diversity"] > 0 and first["clipped"] == 0


def test_its_checkpoint_is_a_model_like_any_other(folder):
  before = flatten_dict(read_checkpoint(folder / "whole/checkpoints/2").params, sep="/")
  after = flatten_dict(read_checkpoint(folder / "whole").params, sep="/")
  assert before.keys() == after.keys() and not any("reference" in path for path in after)
  moved = {path.split("/")[0] for path in after if not np.array_equal(before[path], after[path])}
  assert moved == {"language_model"} | {path.split("/")[0] for path in after if path.startswith("generation")}


@pytest.mark.parametrize(
  "flags, said",
  [
    (["--config.compute.remat=auto"], "config.compute.remat"),
    (["--config.compute.memory_gib=2"], "config.compute.memory_gib"),
    (["--config.lora.rank=2", "--config.optimizer.trained=('language_model/norm',)"], "config.optimizer.trained"),
  ],
)
def test_what_it_does_not_compute_is_refused(tmp_path, flags, said):
  with pytest.raises(UserError) as error:
    train.main([*FLAGS, f"--workdir={tmp_path / 'run'}", *flags])
  assert said in str(error.value)
