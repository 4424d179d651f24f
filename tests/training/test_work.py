"""The work of a batch and its share of the peak: counted alike on host and device."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jflow import chips
from jflow.training import flops


def test_the_work_of_a_batch_is_counted_alike_on_host_and_device():
  batch = tiny.mixed()
  host, device = flops.counted(batch), jax.jit(lambda b: vars(flops.counted(b, jnp)))(batch)
  lengths = [np.bincount(row)[1:] for row in batch.segment_ids]
  pairs = sum((n * (n + 1) // 2).sum() for n in lengths)
  assert host.pairs == pairs == device["pairs"]
  assert {name: float(x) for name, x in device.items()} == {name: float(x) for name, x in vars(host).items()}


def test_mfu_is_null_where_no_table_has_the_device(monkeypatch):
  config = tiny.configuration(data=dict(stored=False))
  row = lambda: {f"work_{name}": value for name, value in vars(flops.counted(tiny.mixed())).items()}
  trained = {"language_model", "generation_encoder"}
  assert flops.mfu(config, trained, row(), 1.0) is None
  gpu = types.SimpleNamespace(device_kind="NVIDIA H200")
  monkeypatch.setattr(jax, "devices", lambda: [gpu])
  once, left = row(), flops.model_flops_of(config, tiny.CONFIG, trained, flops.counted(tiny.mixed()))
  np.testing.assert_allclose(
    flops.mfu(config, trained, once, 2.0), sum(left.values()) / 2.0 / chips.CHIPS["h200"].peak_flops
  )
  assert not once
  frozen = flops.model_flops_of(config, tiny.CONFIG, (), flops.counted(tiny.mixed()))
  assert sum(frozen.values()) < sum(left.values())
