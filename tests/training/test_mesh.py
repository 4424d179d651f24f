"""The mesh is a choice of speed alone: the same losses on every one, and a run may go on on another.

What a device sends does not grow with their number: more of them take more rows in the same time.
"""

import json
import os
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import quick
import tiny
from refusals import refused

from jflow import sharding


@pytest.fixture(scope="module")
def worker(tmp_path_factory) -> subprocess.CompletedProcess:
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=16 {quick.FLAGS}",
    "PYTHONPATH": f"{tiny.ROOT}:{tiny.ROOT / 'tests'}",
  }
  command = [sys.executable, tiny.ROOT / "tests" / "mesh_worker.py", tmp_path_factory.mktemp("mesh")]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr  # the head's loss and products in 8 bits are the plain ones on every mesh
  return done


@pytest.fixture(scope="module")
def result(worker) -> dict:
  return json.loads(worker.stdout)


def test_losses_and_gradient_do_not_depend_on_the_mesh(result):
  alone = result["losses"].pop("(1, 1, 1)")
  assert len(result["losses"]) == 2
  assert alone[2][0] < alone[0][0]  # it learns, so that equal steps mean equal updates
  for losses in result["losses"].values():
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
  result["losses"]["(1, 1, 1)"] = alone


def test_losses_of_codes_do_not_depend_on_the_mesh(result):
  alone, cut = result["codes"].values()
  assert alone[1][0] < alone[0][0]
  np.testing.assert_allclose(cut, alone, rtol=1e-5)


def test_losses_of_held_out_records_depend_on_neither_the_mesh_nor_the_accumulation(result, worker):
  alone, cut = result["held_out"]
  assert alone["val_loss_text"] > 0 and alone["val_loss_flow"] > 0
  assert alone.keys() == cut.keys()
  np.testing.assert_allclose(list(cut.values()), list(alone.values()), rtol=1e-5)
  assert alone["val_rejected"] == 1 and worker.stderr.count("a damaged record") == 2  # once a run


def test_one_device_with_too_many_images_leaves_no_number(result):
  """Each loss is NaN, although the other devices have room; such a step changes no parameter."""
  *losses, _ = result["overfull"]
  assert np.isnan(losses).all()


def test_weights_are_cut_over_fsdp_and_model(result):
  assert result["share"] == 1 / 4


def test_a_run_goes_on_on_another_mesh(result):
  """Restored bit for bit, and the next step is the one that the first mesh would have taken."""
  assert result["same_bits"] == {"(1, 1, 1)": True, "(1, 4, 2)": True}
  for losses in result["restored"].values():
    np.testing.assert_allclose(losses, result["losses"]["(2, 2, 2)"][2], rtol=1e-5)


def test_a_mesh_that_does_not_fit_the_devices_is_refused(result):
  assert "mesh.data x mesh.fsdp x mesh.model = 2 x 2 x 1 does not equal the 16 cpu device(s)" in result["refused"]


def test_twice_the_devices_send_no_more_each(result):
  eight, sixteen = result["collectives"]
  assert sum(sixteen.values()) == pytest.approx(sum(eight.values()), rel=0.02)
  assert sum(eight.values()) > 0


def test_between_groups_of_devices_only_gradients_travel(result):
  """Sums over `data`, no larger than all gradients in f32; activations and weights stay within a group."""
  for collectives in result["collectives"]:
    crossing = {name: size for name, size in collectives.items() if "data" in name.split(" ")[1]}
    assert {name.split(" ")[0] for name in crossing} == {"all-reduce"}
    assert 0 < sum(crossing.values()) < 4 * sum(x.size for x in jax.tree.leaves(tiny.shapes()))


def test_the_compiler_never_gives_up_on_a_layout(worker):
  """It warns where it gathers an activation whole on every device, to cut it anew."""
  assert "rematerialization" not in worker.stderr


def test_a_group_may_span_nodes_of_gpus_and_not_slices_of_tpus(monkeypatch):
  """JAX numbers the nodes of a GPU cluster as slices; two of two chips each."""
  monkeypatch.setattr(sharding, "Mesh", lambda grid, *_, **__: grid)
  cluster = lambda platform: [
    types.SimpleNamespace(platform=platform, device_kind=platform, id=i, process_index=i // 2, slice_index=i // 2)
    for i in range(4)
  ]
  ids = lambda *sizes: [device.id for device in sharding.make_mesh(*sizes, devices=cluster("gpu")).flat]
  assert ids(1, 4, 1) == ids(2, 2, 1) == ids(4, 1, 1) == [0, 1, 2, 3]
  with refused("mesh.data=1", "2 slices"):
    sharding.make_mesh(1, 4, 1, devices=cluster("tpu"))
