"""The frozen encoder of a writer over a prepared data set, ahead of training.

A run with data.stored=True reads the encoder's outputs from disk, which saves its forward pass. The step still makes
its draws from them, and SigLIP still reads the pixels.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from jflow import registry, sharding
from jflow.data.store import stored_writer
from jflow.data.store.cache import Cache
from jflow.errors import UserError
from jflow.generation.base import Stored, family
from jflow.interop.checkpoints import read_checkpoint
from jflow.models.config import ModelConfig
from jflow.models.unified import normalise


def fingerprint(kind: Stored, params: Mapping[str, Any], config: ModelConfig) -> str:
  """Returns a hash of an encoder: its parameters, as float32, and the kind of autoencoder.

  Args:
    kind: of the family.
    params: of the autoencoder, those of `kind.part`.
    config: the model.
  """
  digest = hashlib.sha256(repr(config.autoencoder.encoder_identity()).encode())
  for path, leaf in sorted(flatten_dict(params, sep="/").items()):
    if path.split("/")[0] in kind.weights:
      leaf = np.ascontiguousarray(leaf, np.float32)
      digest.update(f"{path} {leaf.shape}".encode())
      digest.update(leaf.data)
  return digest.hexdigest()


def check(found: Mapping[str, str], frozen: Mapping[str, Any], config: ModelConfig) -> None:
  """Checks that the encoded images of a run were made by its own encoder.

  Args:
    found: folder -> fingerprint, as `Pipeline.encoders` returns them.
    frozen: the frozen parameters of the run.
    config: the model.

  Raises:
    UserError: another encoder made them, or this run trains the encoder.
  """
  kind = family(config.generation).stored
  if not found or kind is None:
    return
  if kind.part not in frozen:
    raise UserError(f"data.stored=True needs a frozen {kind.part.upper()}: name it in optimizer.frozen")
  ours = fingerprint(kind, frozen[kind.part], config)
  for directory, theirs in found.items():
    if theirs != ours:
      raise UserError(
        f"{directory} was made by another {kind.part.upper()} (encoder {theirs[:8]}, this run has {ours[:8]}): remove "
        f"it and make it again with prepare --{kind.name}, or set data.stored=False"
      )


def encoder(kind: Stored, params: Any, config: ModelConfig) -> Callable[[np.ndarray], np.ndarray]:
  """Returns uint8[N, H, W, 3] -> arrays [N, ...] of `kind`; N is a multiple of this machine's devices."""
  run = registry.load(kind.encode)
  mesh = sharding.make_mesh(jax.local_device_count(), 1, 1, jax.local_devices())
  placed = jax.device_put(params, sharding.replicated(mesh))

  @jax.jit
  def encode(params: Any, pixels_NHWC: jax.Array) -> jax.Array:
    return run(config, params, normalise(pixels_NHWC)).astype(kind.dtype)

  return lambda pixels: np.asarray(encode(placed, jax.device_put(pixels, sharding.batch_sharding(mesh))))


def make(
  name: str,
  checkpoint: str,
  directory: str,
  vae: str | None,
  weights: str,
  batch_size: int,
  seed: int,
  threads: int,
  part: tuple[int, int] | None = None,
  merge: bool = False,
  cache: Cache | None = None,
) -> dict[str, Any]:
  """Writes the encoded images of a prepared data set; see `stored_writer.write`.

  Args:
    name: of what is made, "latents" or "codes".
    checkpoint: whose encoder.
    directory: the data set.
    vae: folder of an SDXL-VAE, for a checkpoint that holds none.
    weights: "ema" or "raw", of a jflow checkpoint.
    batch_size: images at a time, at least.
    seed: of the squares.
    threads: that read and decode.
    part, merge, cache: see `stored_writer.write`.

  Raises:
    UserError: the checkpoint has no such encoder; see also `stored_writer.write`.
  """
  found = read_checkpoint(checkpoint, vae=vae, weights=weights)
  config, writes = found.config, family(found.config.generation)
  kind = writes.stored
  if kind is None or kind.name != name:
    instead = f"use prepare --{kind.name} in place of" if kind else "it has nothing that could be made ahead by"
    raise UserError(f"{checkpoint} writes images by {writes.name}: {instead} --{name}")
  if kind.part not in found.params:
    how = ": name the folder of the SDXL-VAE with --vae=DIR" if kind.part == "vae" else ""
    raise UserError(f"{checkpoint} has no {kind.part.upper()}{how}")
  params, devices = found.params[kind.part], jax.local_device_count()
  return stored_writer.write(
    kind,
    directory,
    config.image_size,
    kind.shape(config),
    fingerprint(kind, params, config),
    encoder(kind, params, config),
    -(-batch_size // devices) * devices,
    seed,
    threads,
    part,
    merge,
    cache,
  )
