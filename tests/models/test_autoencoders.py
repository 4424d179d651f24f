"""The kinds of autoencoders: found by name, each with fields of its own, and a new one is one file."""

import copy
import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

from jflow.models.autoencoders import base
from jflow.models.autoencoders.base import AutoencoderConfig, config_class
from jflow.models.build import parameter_shapes
from jflow.models.config import ModelConfig
from jflow.models.layers import Linear
from jflow.models.unified import cast_matrices

# As config.json held it before each kind had fields of its own.
OLD = {
  "autoencoder_kl": dict(block_channels=[8, 16], layers_per_block=1, norm_groups=4, patch_size=0, window=0),
  "patch_pca": dict(block_channels=[], layers_per_block=0, norm_groups=0, patch_size=2, window=4),
}


@dataclasses.dataclass(frozen=True)
class MeansConfig(AutoencoderConfig):
  """A toy kind: the means of blocks of pixels, and one matrix back."""

  used_in_float32 = "ba.k/kernel"

  block: int

  @property
  def factor(self) -> int:
    return self.block

  def make(self, dtype: Any) -> "Means":
    return Means(self, dtype)


class Means(nn.Module):
  config: MeansConfig
  dtype: Any

  def setup(self) -> None:
    self.back = Linear(3, (None, None), self.dtype, use_bias=True)

  def __call__(self, pixels_BHWC):
    return self.decode(self.encode(pixels_BHWC)[0])

  def encode(self, pixels_BHWC):
    b, h, w, c = pixels_BHWC.shape
    k = self.config.block
    mean = pixels_BHWC.reshape(b, h // k, k, w // k, k, c).mean((2, 4))[..., : self.config.latent_channels]
    return mean, jnp.full_like(mean, -30.0)

  def decode(self, latents_BHWC):
    k = self.config.block
    return jnp.repeat(jnp.repeat(self.back(latents_BHWC), k, axis=1), k, axis=2)


@pytest.mark.parametrize("kind", OLD)
def test_sections_that_hold_the_fields_of_both_kinds_load(kind):
  values = copy.deepcopy(tiny.DICT)
  values["autoencoder"] = dict(kind=kind, latent_channels=4, scaling=0.5) | OLD[kind]
  config = ModelConfig.from_dict(values)
  assert config.autoencoder.factor == 2
  own = {"autoencoder_kl": {"block_channels", "layers_per_block", "norm_groups"}, "patch_pca": {"patch_size", "window"}}
  assert set(config.to_dict()["autoencoder"]) == {"kind", "latent_channels", "scaling"} | own[kind]
  assert ModelConfig.from_dict(config.to_dict()) == config


def test_a_model_whose_autoencoder_is_absent_reads_and_writes_nothing():
  values = copy.deepcopy(tiny.DICT)
  values["autoencoder"] = dict(kind="absent", latent_channels=4, scaling=1.0, pixels_per_latent=2)
  config = ModelConfig.from_dict(values)
  assert config.patches == tiny.CONFIG.patches and ModelConfig.from_dict(config.to_dict()) == config
  assert not [path for path in parameter_shapes(config) if path.startswith("vae/")]
  for method in ("encode", "decode"):
    with refused("model.autoencoder.kind='absent'"):
      config.autoencoder.make(jnp.float32).apply({}, jnp.zeros((1, 4, 4, 3)), method=method)


@pytest.mark.parametrize(
  "section, named",
  [
    ({}, "model.autoencoder.kind"),
    ({"kind": "jpeg"}, "model.autoencoder.kind='jpeg'"),
    ({"kind": 3}, "model.autoencoder.kind=3"),
    ({"kind": ["patch_pca"]}, "model.autoencoder.kind="),
  ],
)
def test_an_unknown_kind_is_named(section, named):
  with refused(named):
    config_class(section)


def test_a_new_kind_is_one_file_and_its_name(monkeypatch):
  """Built, loaded and compared by names like the others."""
  base.KINDS.register("means", MeansConfig)
  values = copy.deepcopy(tiny.DICT)
  values["autoencoder"] = dict(kind="means", latent_channels=3, scaling=2.0, block=2)
  config = ModelConfig.from_dict(values)
  assert isinstance(config.autoencoder, MeansConfig) and ModelConfig.from_dict(config.to_dict()) == config
  assert parameter_shapes(config)["vae/back/kernel"] == (3, 3)
  shapes = tiny.shapes(config)
  assert shapes["vae"]["back"]["kernel"].shape == (3, 3)
  pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
  eye = {"back": {"kernel": np.eye(3, dtype=np.float32), "bias": np.zeros(3, np.float32)}}
  shown = config.autoencoder.make(jnp.float32).apply({"params": eye}, pixels)
  np.testing.assert_allclose(shown[:, ::2, 1::2], pixels.reshape(2, 8, 2, 8, 2, 3).mean((2, 4)), atol=1e-6)
  leaf = {"kernel": np.ones((3, 3), np.float32)}
  cast = cast_matrices({"vae": {"back": leaf, "front": leaf}, "head": {"back": leaf}}, jnp.bfloat16, config)
  kept = {path[:-1] for path, x in flatten_dict(cast).items() if x.dtype == np.float32}
  assert kept == {("vae", "back")}
  values["autoencoder"]["blocks"] = 2
  with refused("autoencoder.blocks"):
    ModelConfig.from_dict(values)
