"""Precomputed latents: the VAE's encoder over a prepared data set.

A run with data.latents=True reads the moments of the posterior from disk, which saves the encoder's forward pass. The
step still samples the posterior, and SigLIP still reads the pixels.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jflow import sharding
from jflow.data.store import latents
from jflow.errors import UserError
from jflow.interop.checkpoints import read_checkpoint
from jflow.models.autoencoders.base import AutoencoderConfig
from jflow.models.config import ModelConfig
from jflow.models.unified import normalise


def fingerprint(vae: Mapping[str, Any], config: AutoencoderConfig) -> str:
  """Returns a hash of an encoder: its parameters, as float32, and the kind of VAE."""
  digest = hashlib.sha256(repr(config.encoder_identity()).encode())
  for path, leaf in sorted(flatten_dict(vae, sep="/").items()):
    if path.split("/")[0] in ("encoder", "quant"):
      leaf = np.ascontiguousarray(leaf, np.float32)
      digest.update(f"{path} {leaf.shape}".encode())
      digest.update(leaf.data)
  return digest.hexdigest()


def check(found: Mapping[str, str], params: Mapping[str, Any], config: AutoencoderConfig) -> None:
  """Checks that the latents of a run were made by its own VAE.

  Args:
    found: folder -> fingerprint, as `Pipeline.latents` returns them.
    params: the frozen parameters of the run.
    config: of the VAE.

  Raises:
    UserError: another encoder made them, or this run trains the VAE.
  """
  if not found:
    return
  if "vae" not in params:
    raise UserError("data.latents=True needs a frozen VAE: name it in optimizer.frozen")
  ours = fingerprint(params["vae"], config)
  for directory, theirs in found.items():
    if theirs != ours:
      raise UserError(
        f"{directory} was made by another VAE (encoder {theirs[:8]}, this run has {ours[:8]}): remove it and "
        f"make it again with prepare --latents, or set data.latents=False"
      )


def encoder(vae: Any, config: ModelConfig) -> Callable[[np.ndarray], np.ndarray]:
  """Returns uint8[N, H, W, 3] -> moments bfloat16[N, h, w, 2 C]; N is a multiple of this machine's devices."""
  model = config.autoencoder.make(jnp.float32)
  mesh = sharding.make_mesh(jax.local_device_count(), 1, 1, jax.local_devices())
  params = jax.device_put(vae, sharding.replicated(mesh))

  @jax.jit
  def encode(params: Any, pixels_NHWC: jax.Array) -> jax.Array:
    moments = model.apply({"params": params}, normalise(pixels_NHWC), method="encode")
    return jnp.concatenate(moments, axis=-1).astype(jnp.bfloat16)

  return lambda pixels: np.asarray(encode(params, jax.device_put(pixels, sharding.batch_sharding(mesh))))


def make(
  checkpoint: str, directory: str, vae: str | None, weights: str, batch_size: int, seed: int, threads: int
) -> dict[str, Any]:
  """Writes the latents of a prepared data set; see `latents.write`.

  Raises:
    UserError: the checkpoint has no VAE; see also `latents.write`.
  """
  found = read_checkpoint(checkpoint, vae=vae, weights=weights)
  if "vae" not in found.params:
    raise UserError(f"{checkpoint} has no VAE: name the folder of the SDXL-VAE with --vae=DIR")
  config, params = found.config, found.params["vae"]
  side, devices = config.latent_size, jax.local_device_count()
  return latents.write(
    directory,
    config.image_size,
    (side, side, 2 * config.autoencoder.latent_channels),
    fingerprint(params, config.autoencoder),
    encoder(params, config),
    -(-batch_size // devices) * devices,
    seed,
    threads,
  )
