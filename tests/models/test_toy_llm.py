"""An LLM that jflow does not know, in this file alone: Llama with GeGLU in place of SwiGLU."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jflow.models.config import ModelConfig
from jflow.models.llm import llama
from jflow.models.llm.base import ARCHITECTURES, Architecture
from jflow.models.llm.config import LanguageModelConfig
from jflow.models.unified import for_inference
from jflow.training import setup


@dataclasses.dataclass(frozen=True)
class GegluConfig(LanguageModelConfig):
  tanh: bool


class GegluMlp(nn.Module):
  config: GegluConfig
  dtype: Any

  @nn.compact
  def __call__(self, x_BSD):
    c = self.config
    linear = lambda features, axes, name: llama.Linear(features, axes, self.dtype, use_bias=False, name=name)
    gate, up = (linear(c.mlp_dim, ("embed", "mlp"), name)(x_BSD) for name in ("gate", "up"))
    return linear(c.embed_dim, ("mlp", "embed"), "down")(jax.nn.gelu(gate, approximate=c.tanh) * up)


class GegluBlock(llama.Block):
  mlp = GegluMlp


class GegluLanguageModel(llama.LanguageModel):
  block = GegluBlock


@pytest.fixture(scope="module", autouse=True)
def registered():
  ARCHITECTURES.register("geglu", Architecture(config=GegluConfig, module=GegluLanguageModel))
  yield
  ARCHITECTURES.unregister("geglu")


def test_it_trains_and_is_no_llama():
  language_model = tiny.DICT["language_model"] | dict(kind="geglu", tanh=True)
  sizes = ModelConfig.from_dict(tiny.DICT | dict(language_model=language_model))
  config = tiny.configuration(optimizer=dict(learning_rate=1e-2)).replace(model=sizes)
  model = setup.build(config, jax.devices()[0])
  params = tiny.params(model.config)
  ids = np.arange(12, dtype=np.int32)[None]

  def logits(built):
    bound = built.bind({"params": params})
    return bound.logits(bound.backbone(bound.embed(ids), ids, jnp.ones_like(ids)).hidden)

  assert np.abs(logits(model) - logits(tiny.model())).max() > 1e-3
  state, step = tiny.training(config)
  losses = []
  for _ in range(6):
    state, metrics = step(state, tiny.mixed())
    losses.append(float(metrics["loss_text"]))
  assert losses[-1] < 0.9 * losses[0]


def test_its_matrices_are_transposed_and_not_merged_for_a_gpu():
  """Its own MLP names no maps to merge."""
  language_model = tiny.DICT["language_model"] | dict(kind="geglu", tanh=True)
  config = ModelConfig.from_dict(tiny.DICT | dict(language_model=language_model))
  ids = np.arange(12, dtype=np.int32)[None]
  hidden = []
  for gpu in (False, True):
    model, params = for_inference(tiny.model(config), tiny.params(config), gpu)
    bound = model.bind({"params": params})
    hidden.append(bound.backbone(bound.embed(ids), ids, jnp.ones_like(ids)).hidden)
  layer = params["language_model"]["layers_0"]
  assert set(layer["mlp"]) == {"gate", "up", "down"} and "query_key_value" in layer["attention"]
  np.testing.assert_allclose(*hidden, rtol=1e-5, atol=1e-5)
