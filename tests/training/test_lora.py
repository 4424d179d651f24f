"""A run with adapters: resumed, loaded, and tuned again."""

import functools

import numpy as np
import pytest
import runs
from flax.traverse_util import flatten_dict

from jflow.cli import convert
from jflow.interop import adapters
from jflow.interop.checkpoints import read_checkpoint
from jflow.models import lora
from jflow.training.metrics import read_metrics

FLAGS = ("--config=tune:tiny", "--config.lora.rank=2", "--config.optimizer.learning_rate=0.01")


run = functools.partial(runs.inside, FLAGS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """The folder of a run of 6 steps, and of one that stopped after 3 and went on."""
  folder = tmp_path_factory.mktemp("lora")
  run(folder / "whole", 6, "--config.checkpoint.interval=3")
  run(folder / "halves", 3)
  run(folder / "halves", 6)
  return folder


def weights(path, name="ema"):
  return flatten_dict(read_checkpoint(path, weights=name).params, sep="/")


def test_it_goes_on_bit_for_bit(runs):
  whole, halves = (
    [(row["step"], row["loss"], row["grad_norm"]) for row in read_metrics(runs / name)] for name in ("whole", "halves")
  )
  assert whole == halves and [step for step, *_ in whole] == [1, 2, 3, 4, 5, 6]


def test_its_checkpoint_loads_with_adapters_merged_and_all_else_as_it_was(runs):
  before, after = weights(runs / "whole/checkpoints/3"), weights(runs / "whole")
  assert not any(map(lora.is_adapter, after))
  moved = {path for path in after if not np.array_equal(before[path], after[path])}
  layers = {path for path in after if path.startswith("language_model/layers") and path.endswith("kernel")}
  assert layers and layers <= moved
  assert all(path.startswith(("language_model/layers", "generation_")) and path.endswith("kernel") for path in moved)
  raw = weights(runs / "whole", "raw")  # `train.ema` is off
  for path, x in after.items():
    np.testing.assert_array_equal(x, raw[path])


@pytest.fixture(scope="module")
def second(runs):
  """A run of one step that starts from the first one, and what it measured."""
  (first,) = run(runs / "next", 1, f"--config.train.init_from={runs / 'whole'}")
  return runs / "next", first


def test_the_next_run_starts_from_the_merged_weights(runs, second):
  workdir, first = second
  assert first["loss_flow"] < read_metrics(runs / "whole")[0]["loss_flow"]
  merged = weights(runs / "whole")
  base = weights(workdir)
  for path, x in merged.items():
    if not path.endswith("kernel"):
      np.testing.assert_array_equal(x, base[path])


def test_its_adapter_beside_its_base_is_its_checkpoint(runs, second, tmp_path):
  workdir, _ = second
  assert not convert.main(["--adapter", f"--input={workdir}", f"--output={tmp_path / 'adapter'}"])
  base, want = read_checkpoint(runs / "whole"), weights(workdir)
  changed = adapters.changed(base.params, base.config, adapters.describe(tmp_path / "adapter", base.config))
  assert changed and any(not np.array_equal(x, flatten_dict(base.params, sep="/")[path]) for path, x in changed.items())
  for path, x in (flatten_dict(base.params, sep="/") | changed).items():
    np.testing.assert_array_equal(x, want[path], strict=True)
