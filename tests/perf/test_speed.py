"""Laws of what is said about speed: FLOPs by formula, HLO read with its loops, topologies, made-up rows."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import models
from jflow import chips
from jflow.batch import READ, WRITE
from jflow.cli import compile as command
from jflow.config import MeshConfig
from jflow.errors import UserError
from jflow.models import flops as model_flops
from jflow.models.config import ModelConfig
from jflow.perf import hlo, hlo_text, rows, targets
from jflow.training import flops

PAPER = ModelConfig.from_dict(models.janusflow_384())
STAGE_2 = ("language_model", "generation_encoder", "understanding_projector", "alignment_head")


def per_token(tokens, loss, read, written):
  work = model_flops.Work(tokens, tokens * (tokens + 1) / 2, loss, read, written)
  return sum(model_flops.step(PAPER, STAGE_2, work, ("text", "flow", "alignment"), False).values()) / tokens / 1e9


def test_stage_2_at_384_needs_9_34_gigaflops_per_token():
  """80 : 14 : 6 rows of written images (650 tokens), read ones (776, 200 learned) and text."""
  parts = per_token(650, 0, 0, 1), per_token(776, 200, 1, 0), per_token(4096, 4096, 0, 0)
  np.testing.assert_allclose(np.dot((0.80, 0.14, 0.06), parts), 9.34, atol=0.01)


def test_the_formula_of_the_encoders_is_that_of_published_counters():
  """SigLIP-L/16 and the encoder of SDXL's VAE at 384, counted by PyTorch's FlopCounterMode."""
  np.testing.assert_allclose(model_flops.siglip(PAPER) / 1e9, 383.9, rtol=0.01)
  np.testing.assert_allclose(PAPER.autoencoder.encoder_flops(384) / 1e9, 619.7, rtol=0.001)


def test_the_formula_agrees_with_what_xla_counts():
  """Forward and backward of an unrolled language model, whose full square of attention XLA counts."""
  wide = dict(embed_dim=256, mlp_dim=704, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64)
  config = ModelConfig.from_dict({**tiny.DICT, "language_model": tiny.DICT["language_model"] | wide})
  model, s = tiny.model(config, unroll=2), tiny.SHAPE.tokens

  def loss(p, x):
    positions = jnp.broadcast_to(jnp.arange(s), (2, s))
    out = model.apply({"params": p}, x, positions, jnp.ones_like(positions), method="backbone")
    return jnp.sum(jnp.square(model.apply({"params": p}, out.hidden, method="logits")))

  x = jax.ShapeDtypeStruct((2, s, config.language_model.embed_dim), jnp.float32)
  lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(tiny.shapes(config), x)
  work = model_flops.Work(2 * s, 2 * s * s, 2 * s, 0, 0)
  parts = model_flops.step(config, ("language_model",), work, ("text",), False)
  np.testing.assert_allclose(lowered.cost_analysis()["flops"], parts["llm"] + parts["head"], rtol=0.05)
  counts = hlo.count(lowered.compile().as_text(), {"data": 1}, lambda loop: 0)
  np.testing.assert_allclose(counts.flops, parts["llm"] + parts["head"], rtol=0.001)


def test_loops_count_as_often_as_they_run():
  def scanned(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  compiled = jax.jit(scanned).lower(jnp.ones((5, 16, 16)), jnp.ones((8, 16))).compile()
  counts = hlo.count(compiled.as_text(), {"data": 1}, lambda loop: 0)
  assert counts.flops == 5 * 2 * 8 * 16 * 16
  assert counts.memory_bytes >= 5 * 16 * 16 * 4


GROUPS = [
  ("replica_groups={{0,1,2,3},{4,5,6,7}}", "fsdp", 4),
  ("replica_groups=[4,2]<=[2,4]T(1,0)", "data", 2),
  ("replica_groups=[1,8]<=[8]", "data+fsdp", 8),
  ("replica_groups=mesh['a'=2,'b'=4] {'b'}", "fsdp", 4),
  ("replica_groups=mesh['axis_0'=8] {'axis_0'}", "data+fsdp", 8),
  ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", "fsdp", 4),
  ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", "data", 2),
  ("source_target_pairs={{0,4},{4,0}}", "data", 2),
]


@pytest.mark.parametrize("text, axes, size", GROUPS)
def test_a_collective_is_told_by_the_axes_that_it_runs_over(text, axes, size):
  assert hlo_text.axes_of(text, {"data": 2, "fsdp": 4, "model": 1}) == (axes, size)


def test_a_batched_product_written_as_a_convolution_counts_once():
  """TPU's form: the batch as a spatial axis that is mostly padding."""
  line = (
    "%c = f32[16,8,32]{2,1,0} convolution(%a, %b), window={size=16 pad=15_15 lhs_dilate=1 rhs_reversal=1}, "
    "dim_labels=0bf_0io->0bf"
  )
  text = (
    f"ENTRY %main (a: f32[16,8,64]) -> f32[16,8,32] {{\n  %a = f32[1,8,64]{{2,1,0}} parameter(0)\n"
    f"  %b = f32[16,64,32]{{2,1,0}} parameter(1)\n  ROOT {line}\n}}\n"
  )
  assert hlo.count(text, {"data": 1}, lambda loop: 0).flops == 2 * 16 * 8 * 64 * 32


@pytest.mark.parametrize(
  "name, said",
  [
    ("v5x:4x4", "unknown chip 'v5x'"),
    ("v5e:4x4x4", "takes 2 dimensions, as v5e:4x4"),
    ("h100:", "1x8 (hosts x GPUs)"),
  ],
)
def test_a_topology_that_cannot_be_is_refused_by_name(name, said):
  with pytest.raises(UserError) as error:
    targets.Topology.parse(name)
  assert said in str(error.value) and "\n" not in str(error.value)


def test_a_mesh_follows_the_topology_or_is_refused():
  config = tiny.configuration()
  fitted = command.fitted(config, targets.Topology.parse("v5e:16x16"), 2)
  assert fitted.mesh == MeshConfig(data=16, fsdp=16, model=1) and fitted.train.batch_size == 512
  hosts = command.fitted(config, targets.Topology.parse("h100:4x8"), 1)
  assert hosts.mesh == MeshConfig(data=4, fsdp=8, model=1)
  with pytest.raises(UserError, match="2 x 4 x 1 is not the 16 chips of v5e:4x4"):
    command.fitted(config.replace(mesh=dict(data=2, fsdp=4)), targets.Topology.parse("v5e:4x4"), 1)


def test_made_up_rows_hold_what_the_mixture_says():
  batch = rows.synthetic(8, tiny.SHAPE, (2, 5, 1), tiny.VOCABULARY)
  assert (batch.image_kind == READ).any(axis=1).sum() == 2 and (batch.image_kind == WRITE).any(axis=1).sum() == 5
  assert batch.loss_mask.all(axis=1).sum() == 1
  for row, kind in enumerate(batch.image_kind):
    for start in batch.image_start[row][kind > 0]:
      index = batch.image_index[row, start : start + tiny.SHAPE.image_slots]
      assert (np.diff(index) == 1).all()


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


@pytest.mark.parametrize("kind, peak", [("TPU v5 lite", 197e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)])
def test_peaks_are_found_by_the_kind_of_the_device(kind, peak):
  assert chips.peak_flops(kind) == peak


_STARTED = """\
HloModule step

%sliced (p.0: f32[24,64,64]) -> f32[64,64] {
  %p.0 = f32[24,64,64]{2,1,0} parameter(0)
  %zero = s32[] constant(0)
  %slice = f32[1,64,64]{2,1,0} dynamic-slice(%p.0, %zero, %zero, %zero), dynamic_slice_sizes={1,64,64}
  ROOT %cast = f32[64,64]{1,0} bitcast(%slice)
}

ENTRY %main (p: f32[24,64,64], q: f32[64,64]) -> f32[64,64] {
  %p = f32[24,64,64]{2,1,0} parameter(0)
  %q = f32[64,64]{1,0} parameter(1)
  %started = ((f32[24,64,64]{2,1,0}), f32[64,64]{1,0}, u32[]) fusion-start(%p), kind=kLoop, calls=%sliced
  %done = f32[64,64]{1,0} fusion-done(%started)
  ROOT %out = f32[64,64]{1,0} dot(%done, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/mlp/dot"}
}
"""


def test_what_is_started_to_run_beside_others_counts_as_what_it_reads():
  """One layer of 24, read and written, and a product; each by its slowest bound."""
  rates = hlo.Rates(products=1e6, convolutions=1.0, bandwidth=1e6, launch=0.01)
  counts = hlo.count(_STARTED, {}, lambda loop: 1.0, rates, lambda name: "mlp" if "mlp" in name else "rest")
  layer, product = 64 * 64 * 4, 2 * 64**3
  assert counts.memory_bytes == 2 * layer + 3 * layer and counts.flops == product and counts.launches == 2
  assert counts.seconds == pytest.approx(2 * layer / 1e6 + product / 1e6)
  assert counts.parts["mlp"].flops == product and counts.parts["rest"].memory_bytes == 2 * layer
