"""A reader with another grid of patches than the writer's, floored as transformers does: SigLIP so400m, patch 14 at
384."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from refusals import refused

from jflow.batch import RowShape
from jflow.generation.flow.writer import Draws
from jflow.models.config import ModelConfig
from jflow.models.siglip import patchify
from jflow.models.unified import for_inference
from jflow.training import setup

VALUES = tiny.DICT | dict(objectives={})
VISION = tiny.DICT["understanding_encoder"]
CONFIG = ModelConfig.from_dict(VALUES | dict(understanding_encoder=VISION | dict(patch_size=3)))
READ, WRITTEN = 25, 16


def shape() -> RowShape:
  config = tiny.configuration().replace(model=CONFIG, objective=dict(weights=dict(text=1.0, flow=1.0), logged=()))
  return dataclasses.replace(setup.row_shape(config, CONFIG), tokens=96, images=3)


def reading(seed: int):
  sample = tiny.reading(seed)
  more = READ - tiny.CONFIG.patches
  wide = lambda x, fill: np.concatenate([x[:2], np.full(more, fill, x.dtype), x[2:]])
  tokens = wide(sample.tokens, tiny.IMAGE)
  positions = np.arange(len(tokens), dtype=np.int32)
  targets, loss = wide(sample.targets, tiny.IMAGE), wide(sample.loss_mask, False)
  return sample._replace(tokens=tokens, targets=targets, loss_mask=loss, positions=positions)


def draws(rows: int, images: int, seed: int) -> Draws:
  rng, size = np.random.default_rng(seed), (CONFIG.latent_size, CONFIG.latent_size, CONFIG.autoencoder.latent_channels)
  normal = lambda: rng.standard_normal((rows, images, *size)).astype(np.float32)
  return Draws(rng.uniform(0.1, 0.9, (rows, images)).astype(np.float32), normal(), normal())


def test_rows_hold_images_of_both_grids():
  made = shape()
  assert (CONFIG.patches, CONFIG.written_patches, made.image_slots) == (READ, WRITTEN, 1 + READ)
  assert (made.patches_of("understanding"), made.patches_of("generation")) == (READ, WRITTEN)
  assert made.slots_of(2) == 1 + WRITTEN


def test_packed_together_equals_one_by_one():
  model, params = tiny.model(CONFIG), tiny.params(CONFIG)
  samples, drawn = [reading(1), tiny.writing(2), reading(4)], draws(1, 3, 0)
  sums = functools.partial(tiny.loss_sums, model, params, wanted=("text", "flow"))
  together = sums(tiny.batch(samples, shape=shape()), drawn)
  alone = {"text": 0.0, "flow": 0.0}
  for i, sample in enumerate(samples):
    own = jax.tree.map(lambda x, i=i: np.roll(x, -i, axis=1), drawn)  # the draws of its slot
    for name, value in sums(tiny.batch([sample], shape=shape()), own).items():
      alone[name] += float(value)
  for name, value in together.items():
    assert float(value) == pytest.approx(alone[name], rel=1e-5) and alone[name]


def test_what_is_left_of_a_grid_is_not_seen():
  x = np.random.default_rng(0).standard_normal((1, 16, 16, 3)).astype(np.float32)
  cut = np.asarray(patchify(jnp.asarray(x), 3))
  np.testing.assert_array_equal(cut, patchify(jnp.asarray(x[:, :15, :15]), 3))
  assert cut.shape == (1, READ, 27)


def test_it_answers_and_writes():
  model, params = for_inference(tiny.model(CONFIG), tiny.params(CONFIG))
  bound = model.bind({"params": params})
  size = CONFIG.image_size
  assert bound.read(jnp.zeros((1, size, size, 3))).shape[1] == 1 + READ
  z = jnp.zeros((1, CONFIG.latent_size, CONFIG.latent_size, CONFIG.autoencoder.latent_channels))
  assert bound.writer.slots(z, jnp.zeros(1))[0].shape[1] == 1 + WRITTEN


@pytest.mark.parametrize(
  "change, named",
  [
    (dict(objectives=tiny.DICT["objectives"]), "model.objectives.alignment"),
    (dict(reader=dict(kind="separate", start="learned", layers=1)), "model.reader.kind"),
    (dict(understanding_encoder=VISION | dict(patch_size=17)), "patch_size=17"),
  ],
)
def test_what_needs_one_grid_is_refused(change, named):
  with refused(named):
    ModelConfig.from_dict(VALUES | dict(understanding_encoder=VISION | dict(patch_size=3)) | change)
