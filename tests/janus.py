"""The small Janus of tests/golden/janus_tiny that the tests share, by its published names, and its golden outputs."""

import functools
from typing import Any

import janus_checkpoint
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jflow.generation.codes import weights as names
from jflow.models import weights
from jflow.models.build import parameter_shapes
from jflow.models.config import ModelConfig
from jflow.models.unified import UnifiedModel, for_inference

GOLDEN = janus_checkpoint.OFFICIAL / "golden.npz"

DICT = dict(
  language_model=dict(
    kind="llama",
    vocab_size=256,
    embed_dim=64,
    mlp_dim=160,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    rms_norm_epsilon=1e-6,
    rope_theta=10_000.0,
    max_length=512,
  ),
  understanding_encoder=dict(
    image_size=64,
    patch_size=16,
    embed_dim=48,
    mlp_dim=192,
    num_layers=2,
    num_heads=4,
    layer_norm_epsilon=1e-6,
    gelu="erf",
  ),
  generation=dict(kind="codes", hidden_dim=64, projector_layers=2),
  autoencoder=dict(
    kind="vq",
    channels=32,
    multipliers=(1, 1, 2, 2, 4),
    blocks_per_level=2,
    latent_channels=64,
    codebook_size=512,
    code_dim=8,
    norm_groups=32,
  ),
  objectives={},
  reader=dict(kind="siglip", start="token", layers=2),
)
CONFIG = ModelConfig.from_dict(DICT)


class Ids:
  """The special ids of the golden files: the last of the vocabulary."""

  bos, image_start, image, image_end, pad = range(251, 256)


def model(config: ModelConfig = CONFIG) -> UnifiedModel:
  """The model in f32."""
  return UnifiedModel(config, jnp.dtype("float32"), "none", 1, "xla")


@functools.cache
def golden() -> dict[str, np.ndarray]:
  """The golden outputs, by their keys."""
  with np.load(GOLDEN) as file:
    return dict(file)


@functools.cache
def params() -> dict[str, Any]:
  """The nested parameters of the golden outputs, f32."""
  tensors, entries = janus_checkpoint.tensors(), names.official(CONFIG)
  flat = {path: np.full(shape, np.nan, np.float32) for path, shape in parameter_shapes(CONFIG).items()}
  assert set(tensors) == {entry.name for entry in entries} | {"gen_vision_model.quantize.codebook_used"}
  for entry in entries:
    piece = weights.to_jflow(entry.kind, entry.slice(tensors[entry.name]))
    flat[entry.path][... if entry.layer is None else entry.layer] = piece
  assert not any(np.isnan(x).any() for x in flat.values())
  return unflatten_dict({path: jnp.asarray(x) for path, x in flat.items()}, sep="/")


@functools.cache
def inference() -> tuple[UnifiedModel, Any]:
  """The model with separate layers, and its parameters."""
  return for_inference(model(), params())


def distance(ours: Any, theirs: np.ndarray) -> float:
  """Relative L2 error."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
