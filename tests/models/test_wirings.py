"""Decoders that differ from a Llama in a few places: packed, cached, trained and stored for a GPU as a Llama is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

from jflow.interop import layouts
from jflow.models.cache import Cache
from jflow.models.config import ModelConfig
from jflow.models.llm.config import Llama3Config
from jflow.models.llm.llama import LanguageModel
from jflow.models.unified import for_inference, separate_layers

SCALED = dict(rope_factor=8.0, rope_low=0.5, rope_high=2.0, rope_original_length=16)
KINDS = {"qwen2": {}, "qwen3": {}, "llama3": SCALED}
B, S = 2, 12
RNG = np.random.default_rng(0)


@functools.cache
def config(kind: str) -> ModelConfig:
  own = tiny.DICT["language_model"] | dict(kind=kind) | KINDS[kind]
  return ModelConfig.from_dict(tiny.DICT | dict(language_model=own))


def rows():
  """Embeddings of two rows, each of a segment of 5 and one of 7, and the positions of these."""
  x = RNG.standard_normal((B, S, config("qwen2").language_model.embed_dim)).astype(np.float32)
  positions = np.broadcast_to(np.r_[np.arange(5), np.arange(7)], (B, S)).astype(np.int32)
  return x, positions, np.broadcast_to(np.r_[np.full(5, 1), np.full(7, 2)], (B, S)).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_segment_is_that_of_a_cache_filled_in_pieces(kind):
  lm, (x, positions, segments) = config(kind).language_model, rows()
  params, model = tiny.params(config(kind))["language_model"], LanguageModel(lm, 0, jnp.float32, "none", 1, "xla")
  packed = jax.jit(lambda p: model.apply({"params": p}, x, positions, segments).hidden)(params)
  separate, alone = {"params": separate_layers(params, lm.num_layers)}, model.clone(unroll=0)
  step = jax.jit(lambda *a: alone.apply(separate, *a))
  cache, hidden = Cache.empty(lm, B, 9, jnp.float32), []
  for at in range(5, S):  # one by one
    cut = slice(at, at + 1)
    out = step(x[:, cut], positions[:, cut], np.ones((B, 1), np.int32), cache)
    cache = out.cache
    hidden.append(out.hidden)
  np.testing.assert_allclose(np.concatenate(hidden, axis=1), packed[:, 5:], atol=3e-6)


def test_a_decoder_with_biases_trains_and_stores_them_for_a_gpu():
  own = tiny.configuration(optimizer=dict(learning_rate=1e-2)).replace(model=config("qwen2"))
  state, step = tiny.training(own)
  before, losses = flatten_dict(state.trained, sep="/"), []
  for _ in range(4):
    state, metrics = step(state, tiny.mixed())
    losses.append(float(metrics["loss_text"]))
  assert losses[-1] < 0.95 * losses[0]
  after, path = flatten_dict(state.trained, sep="/"), "language_model/layers/attention/query/bias"
  assert not np.array_equal(before[path], after[path])
  ids, hidden = np.arange(S, dtype=np.int32)[None], []
  for gpu in (False, True):
    model, params = for_inference(tiny.model(config("qwen2")), tiny.params(config("qwen2")), gpu)
    run = jax.jit(lambda p, m=model: m.apply({"params": p}, ids, method=_hidden))
    hidden.append(run(params))
  assert set(params["language_model"]["layers_0"]["attention"]["query"]) == {"transposed_kernel", "bias"}
  np.testing.assert_allclose(*hidden, rtol=1e-5, atol=1e-5)


def _hidden(model, ids):
  return model.backbone(model.embed(ids), ids, jnp.ones_like(ids)).hidden


def test_slow_rotations_are_slower_and_fast_ones_as_they_were():
  own = Llama3Config(**{**vars(config("llama3").language_model), "head_dim": 64, "rope_original_length": 512})
  scales = own.rope_scales()
  turns = 512 * own.rope_theta ** (-np.arange(0, 64, 2) / 64) / (2 * np.pi)
  assert (scales[turns >= 2.0] == 1.0).all() and (scales[turns <= 0.5] == np.float32(1 / 8)).all()
  between = (turns > 0.5) & (turns < 2.0)
  assert between.any() and (np.diff(scales) <= 0).all() and ((scales[between] > 1 / 8) & (scales[between] < 1)).all()


@pytest.mark.parametrize("change, named", [(dict(rope_low=2.0), "rope_low=2"), (dict(rope_factor=0.0), "rope_factor")])
def test_rotations_that_cannot_be_are_refused(change, named):
  values = config("llama3").to_dict()
  with refused(f"model.language_model.{named}"):
    ModelConfig.from_dict(values | {"language_model": values["language_model"] | change})


@pytest.mark.parametrize("kind", KINDS)
def test_a_published_layout_holds_a_llama_alone(kind):
  with refused("model.language_model.kind", repr(kind), "official"):
    layouts.of(config(kind), "official")
