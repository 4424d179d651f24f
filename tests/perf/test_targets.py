"""Topologies, and the mesh of a config on one."""

import pytest
import tiny
from refusals import refused

from jflow.cli import compile as command
from jflow.config import MeshConfig
from jflow.perf import targets


@pytest.mark.parametrize(
  "name, said",
  [
    ("v5x:4x4", "v5x"),
    ("v5e:4x4x4", "v5e:4x4"),
    ("h100:", "1x8 (hosts x GPUs)"),
  ],
)
def test_a_topology_that_cannot_be_is_refused_by_name(name, said):
  with refused(said):
    targets.Topology.parse(name)


def test_a_mesh_follows_the_topology_or_is_refused():
  config = tiny.configuration()
  fitted = command.fitted(config, targets.Topology.parse("v5e:16x16"), 2)
  assert fitted.mesh == MeshConfig(data=16, fsdp=16, model=1) and fitted.train.batch_size == 512
  hosts = command.fitted(config, targets.Topology.parse("h100:4x8"), 1)
  assert hosts.mesh == MeshConfig(data=4, fsdp=8, model=1)
  with refused("2 x 4 x 1", "16", "v5e:4x4"):
    command.fitted(config.replace(mesh=dict(data=2, fsdp=4)), targets.Topology.parse("v5e:4x4"), 1)
