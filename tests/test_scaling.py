"""What a device sends does not grow with the number of devices: more of them take more rows in the same time."""

import json
import os
import subprocess
import sys

import jax
import pytest
import tiny


@pytest.fixture(scope="module")
def compiled() -> subprocess.CompletedProcess:
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0",
    "PYTHONPATH": f"{tiny.ROOT}:{tiny.ROOT / 'tests'}",
  }
  command = [sys.executable, str(tiny.ROOT / "tests" / "scaling_worker.py")]
  done = subprocess.run(command, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return done


def test_twice_the_devices_send_no_more_each(compiled):
  eight, sixteen = json.loads(compiled.stdout)
  assert sum(sixteen.values()) == pytest.approx(sum(eight.values()), rel=0.02)
  assert sum(eight.values()) > 0


def test_between_groups_of_devices_only_gradients_travel(compiled):
  """Sums over `data`, no larger than all gradients in f32; activations and weights stay within a group."""
  for collectives in json.loads(compiled.stdout):
    crossing = {name: size for name, size in collectives.items() if "data" in name.split(" ")[1]}
    assert {name.split(" ")[0] for name in crossing} == {"all-reduce"}
    assert 0 < sum(crossing.values()) < 4 * sum(x.size for x in jax.tree.leaves(tiny.shapes()))


def test_the_compiler_never_gives_up_on_a_layout(compiled):
  """It warns where it gathers an activation whole on every device, to cut it anew."""
  assert "rematerialization" not in compiled.stderr
