"""The page on the library: its code runs as it stands there, and does what it says."""

import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny
from refusals import refused

from jflow.errors import UserError
from jflow.objectives.base import OBJECTIVES
from jflow.training.loop import train

PAGE = tiny.ROOT / "jflow" / "README.md"


def blocks() -> list[str]:
  return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  """The names that the page's code leaves behind, and the folder where it ran; on a model that compiles sooner."""
  before, folder, names = os.getcwd(), tmp_path_factory.mktemp("page"), {"__name__": "page"}
  os.chdir(folder)
  try:
    for number, block in enumerate(blocks(), 1):
      block = block.replace('["--config.train.batch_size=4"]', str(list(runs.SMALL)))
      assert number > 1 or str(runs.SMALL[-1]) in block
      exec(compile(block, f"{PAGE}, block {number}", "exec"), names)
    yield names, folder
  finally:
    os.chdir(before)
    OBJECTIVES.unregister("brightness")


def lines(folder) -> list[dict]:
  text = pathlib.Path(folder, "runs/mine/metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_from_a_config_to_a_gradient_takes_less_than_ten_lines():
  code = [line for line in blocks()[0].splitlines() if line and not line.startswith(("import", "from"))]
  assert 0 < len(code) < 10


def test_the_loss_is_the_weighed_sum_of_its_parts_and_the_gradient_its_slope(page):
  names, _ = page
  config, params, gradient = names["config"], names["params"], names["gradient"]
  weights = config.objective.weights
  assert float(names["value"]) == pytest.approx(sum(weights[name] * float(x) for name, x in names["parts"].items()))
  norm = optax.global_norm(gradient)
  where = jax.tree.map(lambda p: p.sharding, params)  # so that the program of the page serves here too
  at = jax.jit(lambda size: jax.tree.map(lambda p, g: p + size * g / norm, params, gradient), out_shardings=where)
  value = lambda params: float(names["loss"](params, names["data"].batch(0), jax.random.key(0))[0][0])
  assert (value(at(0.003)) - value(at(-0.003))) / 0.006 == pytest.approx(float(norm), rel=0.03)


def test_the_loss_is_that_of_the_first_step_of_the_run(page):
  """Of the parts that both have, under the draws of (seed, step)."""
  names, folder = page
  key = jax.random.fold_in(jax.random.key(names["config"].train.seed), 0)
  _, parts = names["loss"](names["params"], names["data"].batch(0), key)[0]
  first = lines(folder)[0]
  for name, value in parts.items():
    assert first[f"loss_{name}"] == pytest.approx(float(value), rel=1e-5), name


def test_a_run_takes_the_objective_the_optimizer_and_the_logged_loss(page):
  names, folder = page
  rows = lines(folder)
  assert [row["step"] for row in rows] == [1, 2]
  for row in rows:
    want = row["loss_text"] + row["loss_flow"] + 0.1 * row["loss_brightness"]
    assert row["loss"] == pytest.approx(want, rel=1e-5) and np.isfinite(row["loss_alignment"])


def test_a_run_with_a_rule_of_its_own_goes_on_and_is_none_without_it(page):
  names, folder = page
  more = names["mine"].replace(train=dict(steps=3))
  with refused("model"):
    train(more, folder / "runs/mine")
  train(more, folder / "runs/mine", rule=optax.lion)
  assert [row["step"] for row in lines(folder)] == [1, 2, 3]


@pytest.mark.parametrize("field, value", [("weight_decay", 0.1), ("muon", ("language_model/layers",))])
def test_a_rule_of_ones_own_and_fields_that_it_does_not_read_are_refused(tmp_path, field, value):
  with pytest.raises(UserError) as error:
    train(tiny.configuration(optimizer={field: value}), tmp_path / "run", rule=optax.lion)
  assert f"optimizer.{field}={value!r}" in str(error.value)


def test_a_loss_on_pictures_reaches_parameters_and_noise(page):
  names, _ = page
  assert names["by_noise"].shape == names["noise"].shape and float(jnp.abs(names["by_noise"]).max()) > 0
  size, noise = 1e-2 / float(jnp.linalg.norm(names["by_noise"])), names["noise"]
  redder = float(jax.jit(names["redness"])(names["params"], noise + size * names["by_noise"]))
  assert redder > float(names["red"])
