"""The choice of what is kept for the backward pass: the first that fits, by the bytes of the compiled step."""

import sys
import types

import jax
import jax.numpy as jnp
import pytest
import tiny
from refusals import refused

from jflow import sharding
from jflow.models.llm.base import ARCHITECTURES
from jflow.training import cost, remat, setup
from jflow.training.step import make_loss


class Refusing:
  def lower(self, *args):
    return self

  def compile(self):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm.")


KIBIBYTES = {"none": 64, "save:query,key,value,attended,gate,up": 16, "full": 4}  # that a step needs


REFUSED = set()  # names that the compiler refuses for their memory, as TPU's does


def make(model):
  if model.remat in REFUSED:
    return types.SimpleNamespace(step=Refusing(), state=None)
  size = KIBIBYTES[model.remat] * 256
  step = jax.jit(lambda state, batch: jnp.zeros(size, jnp.float32) + state + batch)
  return types.SimpleNamespace(step=step, state=jax.ShapeDtypeStruct((), jnp.float32))


def chosen(limit, name="auto", tokens=0, first=0):
  mesh = types.SimpleNamespace(devices=types.SimpleNamespace(flat=jax.devices()))
  batch = jax.ShapeDtypeStruct((), jnp.float32)
  return remat.fit(tiny.model(remat=name, unroll=2), mesh, make, batch, tokens, limit, first)


@pytest.mark.parametrize("kibibytes, name", [(None, "none"), (80, "none"), (40, "save"), (8, "full")])
def test_the_fastest_choice_that_fits_is_taken_and_said(kibibytes, name, capsys):
  found = chosen(kibibytes and kibibytes * 1024)
  assert found.model.remat.startswith(name) and found.model.unroll == 2
  assert found.needed == pytest.approx(1024 * KIBIBYTES[found.model.remat], abs=64)
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith(f"jflow: compute.remat={found.model.remat} with compute.unroll=2 needs") and "taken" in last


def test_nothing_is_taken_where_nothing_fits():
  assert chosen(1024) is None


def test_what_cannot_fit_is_not_compiled(capsys):
  """50 tokens of two blocks keep 119 KiB where all is kept, and 88 KiB by name."""
  found = chosen(100 * 1024, tokens=50)
  assert found.model.remat.startswith("save")
  first, last = capsys.readouterr().err.splitlines()
  assert "compute.remat=none" in first and "needs at least" in first and "taken" in last


def test_what_the_compiler_refuses_for_its_memory_is_passed_over(monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "REFUSED", {"none"})
  assert chosen(None).model.remat.startswith("save")
  with pytest.raises(jax.errors.JaxRuntimeError):
    chosen(None, "none")


def test_a_choice_of_ones_own_is_not_changed():
  assert chosen(1024, "none").model.remat == "none"


def test_a_gpu_that_keeps_everything_has_no_loop_over_layers():
  first, *rest = remat.candidates(tiny.model(remat="auto"), "gpu")
  assert (first.remat, first.unroll) == ("none", tiny.CONFIG.language_model.num_layers)
  assert [model.unroll for model in rest] == [1, 1]


def test_a_language_model_that_recomputes_nothing_keeps_everything(monkeypatch):
  import dataclasses

  plain = dataclasses.replace(ARCHITECTURES.get("llama"), remat=None)
  monkeypatch.setattr(ARCHITECTURES, "get", lambda kind: plain)
  assert [model.remat for model in remat.candidates(tiny.model(remat="auto"), "cpu")] == ["none"]


def test_auto_is_a_value_of_the_config():
  setup.check(tiny.configuration(compute=dict(remat="auto")))


def test_a_model_outside_a_run_keeps_least():
  """So that every config of the recipes is one to build, initialise and differentiate."""
  auto, full = (tiny.configuration(compute=dict(remat=name)) for name in ("auto", "full"))
  model = setup.build(auto, jax.devices()[0])
  assert model == setup.build(full, jax.devices()[0]) and model.remat == "full"
  assert setup.undecided(auto, jax.devices()[0]).remat == "auto"
  loss = make_loss(model, auto.objective)
  params = jax.eval_shape(lambda: sharding.unbox(setup.initial_params(auto, model)))
  (value, _), gradient = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), params, tiny.mixed(), jax.random.key(0))
  assert value.shape == () and jax.tree.structure(gradient) == jax.tree.structure(params)


KINDS = {"frozen weights": 4 * 2**30, "adapters": 2**26, "averages": 0, "activations": 2**30}


def test_a_step_that_does_not_fit_is_refused_with_the_fields_to_change():
  needed = sum(KINDS.values())
  cost.check(KINDS, needed, needed)
  cost.check(KINDS, needed, None)
  with refused("5.1 GiB", "4.0 GiB", "adapters 64.0 MiB", "train.accumulation", "compute.remat", "lora.rank"):
    cost.check(KINDS, needed, 4 * 2**30)


def test_kinds_add_up_to_what_a_step_takes():
  state, _ = tiny.training(tiny.configuration())
  batch = tiny.mixed()
  kinds = cost.by_kind(state, jax.device_put(batch), 10**9)
  size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
  assert sum(kinds.values()) == 10**9 and kinds["adapters"] == 0
  assert kinds["trained weights"] == kinds["averages"] == kinds["gradients"] == size(state.trained)
  assert (kinds["frozen weights"], kinds["batch"]) == (size(state.frozen), size(batch))


def test_a_limit_that_is_given_counts_on_a_cpu():
  mesh = sharding.make_mesh(1, 1, 1)
  assert remat.device_limit(mesh, 1.5) == 3 * 2**29


def device_mesh():
  return sharding.make_mesh(1, 1, 1, jax.devices()[:1])


def test_a_continuation_begins_with_the_run_s_choice(tmp_path, capsys):
  """Which is kept where more would fit by now, and left where it no longer fits."""
  model, mesh = tiny.model(remat="auto", unroll=2), device_mesh()
  assert remat.earlier(tmp_path, model, mesh, 1) == 0
  remat.remember(tmp_path, chosen(40 * 1024).model, mesh, 1)
  first = remat.earlier(tmp_path, model, mesh, 1)
  assert chosen(None, first=first).model.remat.startswith("save")
  assert chosen(8 * 1024, first=first).model.remat == "full"
  assert remat.FILE in capsys.readouterr().err
  assert remat.earlier(tmp_path, model.clone(attention="triton"), mesh, 1) == 0
  assert remat.earlier(tmp_path, model, mesh, 2) == 0
  remat.remember(tmp_path, chosen(8 * 1024).model, mesh, 1, 8.0)
  assert remat.earlier(tmp_path, model, mesh, 1, 8.0) and not remat.earlier(tmp_path, model, mesh, 1)  # a trial's limit


@pytest.mark.parametrize(
  "content", ["", "[]", "{}", '{"remat": "full"', '{"remat": ["full"], "unroll": {}, "layout": 3}']
)
def test_a_damaged_record_is_a_choice_anew(tmp_path, content):
  (tmp_path / remat.FILE).write_text(content)
  assert remat.earlier(tmp_path, tiny.model(remat="auto"), device_mesh(), 1) == 0
