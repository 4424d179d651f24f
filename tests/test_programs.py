"""Compiled programs are bounded, those that were used last stay, and what they compute does not change."""

import collections
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jflow.generation.flow import equations as flow
from jflow.generation.flow import sampler as painting
from jflow.programs import Programs

PROMPTS = ["a ring", "a red circle"]


def make(most, seen):
  def scaled(model, params, x, *, by):
    seen.append((x.shape, by))  # while it is traced
    return model * params["w"] * x * by

  return Programs(scaled, most)


def test_the_least_recently_used_goes_and_comes_back_the_same():
  seen = []
  scaled = make(2, seen)
  params = {"w": np.float32(3)}
  x = lambda n: np.arange(n, dtype=np.float32)
  first = scaled(2, params, x(3), by=1)
  for n, by in ((3, 1), (4, 1), (3, 1), (3, 2)):
    scaled(2, params, x(n), by=by)
  assert seen == [((3,), 1), ((4,), 1), ((3,), 2)] and len(scaled) == 2
  assert scaled.kept(2, x(4), by=1) is None and scaled.kept(2, x(3), by=1).shape == (3,)
  scaled(2, params, x(4), by=1)
  assert len(seen) == 4
  assert np.array_equal(scaled(2, params, x(3), by=1), first) and np.array_equal(first, 6 * x(3))


def test_compiling_ahead_runs_nothing_and_compiles_all(monkeypatch):
  seen = []
  scaled = make(4, seen)
  params, shape = {"w": np.float32(3)}, jax.ShapeDtypeStruct((5,), jnp.float32)
  assert scaled.kept(2, shape, by=1) is None
  worker = threading.Thread(target=lambda: scaled.compile(2, params, shape, by=1))
  worker.start(), worker.join()
  assert scaled.kept(2, shape, by=1).shape == (5,)
  with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
    patch.setattr("jax._src.compiler.compile_or_get_cached", lambda *_: 1 // 0)
    assert np.array_equal(scaled(2, params, np.ones(5, np.float32), by=1), np.full(5, 6))
  assert len(seen) == 1


def test_donated_arguments_are_used_up():
  def add(model, params, x, rows):
    return rows + x

  added = Programs(add, 2, donate=("rows",))
  rows = jnp.zeros(4)
  added(None, {}, jnp.ones(4), rows)
  assert rows.is_deleted()


@pytest.mark.parametrize("shift", [1.0, 0.01, 1 / 3, 2.0, 7.7, 100.0])
def test_the_time_grid_is_to_the_bit_that_of_jax(shift):
  for steps in (1, 2, 3, 7, 30, 33, 64, 101, 200, 333):
    t = jnp.linspace(0.0, 1.0, steps + 1, dtype=jnp.float32)
    np.testing.assert_array_equal(flow.time_grid(steps, shift), t / (t + shift * (1.0 - t)))


def test_what_is_prepared_is_what_is_run():
  model, counted = tiny.pipeline(), (painting.read_prompts, painting.solve, painting.decode)
  chosen, other = model.settings(steps=5), model.settings(steps=5, guidance=1.0, solver="heun")
  assert model.prepare_images(PROMPTS, chosen, rows=2)
  assert model.prepare_images(PROMPTS, chosen, rows=2, compile=False)
  assert not model.prepare_images(PROMPTS, other, rows=2, compile=False)
  kept = [len(x) for x in counted]
  model.generate(PROMPTS, 5)
  assert [len(x) for x in counted] == kept


def test_other_steps_are_no_other_program_and_a_padded_grid_changes_no_bit(monkeypatch):
  monkeypatch.setattr(painting.solve, "_kept", collections.OrderedDict())  # others may have filled it
  model = tiny.pipeline()
  few = model.generate(PROMPTS, 3, seed=4)
  kept = len(painting.solve)
  for steps in (1, 33, 65, 200):
    model.generate(PROMPTS, steps)
  assert len(painting.solve) == kept
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(painting, "_GRID", 1)
    exact = model.generate(PROMPTS, 3, seed=4)
  assert len(painting.solve) == kept + 1
  assert all(np.array_equal(a, b) for a, b in zip(few, exact, strict=True))
