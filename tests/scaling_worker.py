"""Compiles the step for 8 and 16 virtual CPU devices; prints the bytes of collectives per device, by kind and axes.

A process of its own, since the number of devices is fixed when jax starts. Nothing runs.
"""

import json

import jax
import tiny

from jflow import sharding
from jflow.compilation import hlo
from jflow.models import generation
from jflow.training.program import abstract_batch, make_program

MESHES = ((2, 4, 1), (4, 4, 1))
ROWS = 2  # per device


def collectives(sizes: tuple[int, int, int]) -> dict[str, float]:
  """Kind and mesh axes -> bytes in one step, with the convolution that TPU and GPU get."""
  devices = sizes[0] * sizes[1] * sizes[2]
  config = tiny.configuration(train=dict(batch_size=ROWS * devices))
  mesh = sharding.make_mesh(*sizes, devices=jax.devices()[:devices])
  with jax.set_mesh(mesh):
    program = make_program(config, tiny.model(), mesh)
    batch = abstract_batch(config, tiny.model(), mesh)
    text = program.step.lower(program.state, batch).compile().as_text()
  counts = hlo.count(text, dict(mesh.shape), lambda loop: 1.0)
  return {f"{kind} {axes}": size for (kind, axes), size in counts.collective_bytes.items()}


if __name__ == "__main__":
  generation.depthwise = generation._convolution
  print(json.dumps([collectives(sizes) for sizes in MESHES]))
