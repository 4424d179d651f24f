"""`bench attention` on a CPU, with functions in place of a GPU's kernels: what is wrong with one is seen."""

import jax.numpy as jnp
import pytest
import tiny
from refusals import refused

from jflow.errors import Stopped
from jflow.models import attention, kernels
from jflow.perf import attention as bench
from jflow.perf import generate, train

LONGER = ("config.data.row_tokens=256", "config.model.language_model.max_length=256")
CONFIG = f"{tiny.ROOT}/configs/stage2.py:tiny"


def reported(monkeypatch, kernel) -> dict:
  monkeypatch.setattr(kernels, "obstacle", lambda *_: "")
  monkeypatch.setitem(kernels.KERNELS, "packed", kernel)
  return bench.run(bench.Settings(CONFIG, rows=2, repeats=1, kernels=("xla", "packed"), fields=LONGER))


def plain(q, k, v, segments):
  return attention.packed_attention(q, k, v, segments, "xla")


def test_a_right_kernel_has_no_error_and_no_leak(monkeypatch):
  report = reported(monkeypatch, plain)
  for name in ("xla", "packed"):
    assert report[name]["finite"] is True and report[name]["leaks"] is False
    assert report[name]["seconds_with_gradients"]["min"] > 0
  for kind in ("error", "error_worst"):
    assert report["packed"][kind] == dict.fromkeys(("out", "query", "key", "value"), 0.0)


def test_a_kernel_that_sees_other_segments_leaks(monkeypatch):
  report = reported(monkeypatch, lambda q, k, v, segments: plain(q, k, v, jnp.minimum(segments, 1)))["packed"]
  assert report["leaks"] is True and report["error"]["out"] > 0.1


def test_one_wrong_position_is_seen_where_the_mean_hides_it(monkeypatch):
  wrong = lambda q, k, v, segments: plain(q, k, v, segments).at[0, 5].multiply(-1)
  report = reported(monkeypatch, wrong)["packed"]
  assert report["error_worst"]["out"] > 1 > 0.5 > report["error"]["out"] > 0


def test_a_kernel_that_fails_says_why_and_keeps_the_others(monkeypatch):
  def broken(q, k, v, segments):
    raise ValueError("no such tile\nmore")

  report = reported(monkeypatch, broken)
  assert report["packed"] == {"failed": "no such tile"} and report["xla"]["finite"] is True


def test_a_step_without_a_finite_gradient_is_no_measurement(monkeypatch):
  config = train.load(CONFIG, ("config.optimizer.learning_rate=1e38", "config.optimizer.warmup_steps=1"), 2)
  with pytest.raises(Stopped, match="skipped"):
    train.measure(config, 2, parts=False)


def test_a_cpu_has_no_fused_kernel():
  with refused("--attention=fused", "cpu"):
    generate.run(generate.Settings(config=f"{tiny.ROOT}/configs/stage3.py:tiny", attention="fused"))


def test_this_jax_has_the_private_function_that_cudnn_needs(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo as fused

  assert kernels._known_cudnn()
  monkeypatch.setattr(fused, "_dot_product_attention_bwd_rule", lambda config, res, grad: None)
  assert not kernels._known_cudnn()
  monkeypatch.delattr(fused, "_dot_product_attention_bwd_rule")
  assert not kernels._known_cudnn()
