"""Programs of XLA as text: loops, products and collectives are counted as they run."""

import jax
import jax.numpy as jnp
import pytest

from jflow.perf import hlo, hlo_text


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
