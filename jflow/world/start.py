"""The start of stage 0: fitting of parts that are pretrained in the paper."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jflow import sharding
from jflow.batch import NONE
from jflow.config import RunConfig
from jflow.data.pipeline import Pipeline
from jflow.errors import UserError
from jflow.training import hosts
from jflow.world.codec import PatchPCAConfig, fit_patch_pca
from jflow.world.patch_codes import PatchCodesConfig, fit_patch_codes
from jflow.world.siglip_fit import fit_siglip
from jflow.world.source import WorldSource


def fit(config: RunConfig, open_pipeline: Callable[[], Pipeline]) -> dict[str, dict[str, Any]]:
  """Fits the closed-form codec to pictures of the run's data, and SigLIP to labels of the world's patches.

  Args:
    config: of the run. The codec is fitted if the model has one.
    open_pipeline: opens the data of all processes, so that each fits the codec to the same pictures.

  Returns:
    {part: parameters} of the fitted parts.
  """
  fitted: dict[str, dict[str, Any]] = {}
  world, model = config.world, config.model
  if isinstance(model.autoencoder, PatchPCAConfig):
    fitted["vae"] = fit_patch_pca(first_images(open_pipeline(), world.fit_images), model.autoencoder)
  if isinstance(model.autoencoder, PatchCodesConfig):
    fitted["vq"] = fit_patch_codes(first_images(open_pipeline(), world.fit_images), model.autoencoder)
  if world.fit_labels:
    source = WorldSource("generation", **vars(config.data.shapes))
    scenes = [source[i].images[0] for i in range(min(len(source), world.fit_labels))]
    # On one device of each process, so that the result does not depend on the mesh; process 0's is used.
    with jax.set_mesh(sharding.make_mesh(1, 1, 1, devices=jax.local_devices()[:1])):
      siglip = fit_siglip(model.understanding_encoder, scenes, world.fit_labels, config.train.seed)
    fitted["understanding_encoder"] = hosts.tree_of_first(siglip)
  return fitted


def first_images(pipeline: Pipeline, count: int) -> np.ndarray:
  """The first `count` images of a run's data, of either task: uint8[count, H, W, 3].

  Raises:
    UserError: the data has fewer.
  """
  images: list[np.ndarray] = []
  step = last = 0
  while len(images) < count:
    batch = pipeline.batch(step)
    found = batch.images[batch.image_kind != NONE]
    last = step if len(found) else last
    if step - last > 100:
      raise UserError(
        f"the data must hold world.fit_images={count} pictures, got {len(images)}: the codec of model.autoencoder is "
        "fitted to them"
      )
    images.extend(found)
    step += 1
  return np.stack(images[:count])
