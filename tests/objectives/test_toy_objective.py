"""An objective that jflow does not know, in this file alone: a head predicts how bright an image to write is."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jflow.batch import WRITE
from jflow.models.config import ModelConfig
from jflow.models.layers import Linear
from jflow.objectives.base import OBJECTIVES, Part
from jflow.training import setup


@dataclasses.dataclass(frozen=True)
class BrightnessConfig:
  layer: int  # of the LLM, counted from 1
  width: int

  def check(self, model: Any) -> None:
    pass


class Brightness(nn.Module):
  model: ModelConfig
  config: BrightnessConfig
  dtype: Any

  def setup(self) -> None:
    self.brightness_hidden = Linear(self.config.width, ("embed", None), self.dtype, use_bias=True)
    self.brightness_head = Linear(1, (None, None), self.dtype, use_bias=True)

  def __call__(self, forward):
    hidden = jax.nn.silu(self.brightness_hidden(forward.patches(forward.layer).mean(1)))
    guess = self.brightness_head(hidden)[:, 0]
    bright = forward.images(forward.batch.images).astype(jnp.float32).mean((1, 2, 3)) / 255
    return jnp.sum(jnp.where(forward.written, jnp.square(guess - bright), 0.0))

  @staticmethod
  def count(batch):
    return jnp.maximum(jnp.sum(batch.image_kind == WRITE), 1).astype(jnp.float32)


@pytest.fixture(scope="module", autouse=True)
def registered():
  OBJECTIVES.register("brightness", Part(config=BrightnessConfig, module=Brightness))
  yield
  OBJECTIVES.unregister("brightness")


def test_it_trains_beside_the_others_and_is_logged_by_its_name():
  weights = dict(text=1.0, flow=1.0, alignment=0.0, brightness=2.0)
  trained = tuple(p for p in tiny.configuration().optimizer.trained if p != "alignment_head") + ("brightness_.*",)
  model = ModelConfig.from_dict(tiny.DICT | dict(objectives=dict(brightness=dict(layer=2, width=8))))
  optimizer = dict(trained=trained, learning_rate=1e-2)
  config = tiny.configuration(objective=dict(weights=weights), optimizer=optimizer).replace(model=model)
  setup.check(config)
  state, step = tiny.training(config)
  seen = []
  for _ in range(12):
    state, metrics = step(state, tiny.mixed())
    seen.append({name: float(metrics[name]) for name in ("loss", "loss_text", "loss_flow", "loss_brightness")})
  for row in seen:
    assert row["loss"] == pytest.approx(row["loss_text"] + row["loss_flow"] + 2 * row["loss_brightness"], rel=1e-5)
  assert np.mean([row["loss_brightness"] for row in seen[-3:]]) < 0.3 * seen[0]["loss_brightness"]
