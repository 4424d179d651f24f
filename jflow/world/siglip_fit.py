"""The stand-in for a pretrained SigLIP of the world: a small one, fitted to labels of its patches.

SigLIP has seen billions of pairs of pictures and texts before JanusFlow reads with it (paper section 3.2). A small
one on two cores sees some ten thousand pictures, in which the sigmoid loss teaches it colors and no shapes. So each
patch learns what stands on it, and in which row and column it lies: without that, it forgets where things are.

Billions of pictures show every shape in every color. The world of training never shows some pairs, and a SigLIP that
learns shapes from it learns that as well. So some objects get a color that has no name in the world. Colors are told of
the others alone, and in the second half of the pictures shapes of these alone.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jflow.models.config import SiglipConfig
from jflow.models.siglip import Siglip
from jflow.models.unified import normalise
from jflow.progress import Progress
from jflow.sharding import unbox
from jflow.training import hosts
from jflow.world import scenes
from jflow.world.scenes import Scene

_BATCH = 16  # smaller ones learn more from as many pictures; the rate is for this size
_RATE = 1.5e-3  # falls linearly to a tenth after the warm-up
_WARMUP = 50  # steps; fewer than 800 pictures only warm up
_SHAPES = len(scenes.SHAPES)
_COLORS = len(scenes.COLORS)
_PLACE_WEIGHT = 0.25  # of the losses of row and column
_RECOLORED = 0.6  # share of the objects
_NAMED = np.array([*scenes.COLORS.values(), (scenes.BACKGROUND,) * 3])
_APART = np.array([50] * _COLORS + [85])  # least distance of a recolored object's RGB from each of _NAMED


def fit_siglip(config: SiglipConfig, world: Sequence[Scene], pictures: int, seed: int) -> Any:
  """Fits a SigLIP to scenes of the world.

  The loss is the cross-entropy of shape and color over patches whose center lies in an object's box (`recolored` says
  of which objects which), the binary one of whether a patch is such, and those of every patch's row and column.

  Args:
    config: of the SigLIP.
    world: scenes, drawn at `config.image_size`; taken in order, again from the first where there are too few.
    pictures: how many to learn from; rounded up to whole batches of 16.
    seed: of the fresh parameters, and of which objects get another color.

  Returns:
    The parameters of `Siglip`, f32 numpy arrays. Its pooling head is as fresh.
  """
  siglip = Siglip(config, jnp.float32, False)
  size, side = config.image_size, config.image_size // config.patch_size
  steps = -(-pictures // _BATCH)
  key, other = jax.random.split(jax.random.key(seed))
  params = {
    "siglip": unbox(siglip.init(key, jnp.zeros((1, size, size, 3)))["params"]),
    "labels": jax.random.normal(other, (config.embed_dim, _SHAPES + _COLORS + 1 + 2 * side))
    / np.sqrt(config.embed_dim),
  }
  rate = optax.schedules.join_schedules(
    [optax.linear_schedule(0.0, _RATE, _WARMUP), optax.linear_schedule(_RATE, _RATE / 10, max(1, steps - _WARMUP))],
    [_WARMUP],
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

  @jax.jit
  def step(params, state, images, labels):
    features = lambda params: siglip.apply({"params": params["siglip"]}, normalise(images))
    loss = lambda params: label_loss(features(params) @ params["labels"], labels)
    gradients, right = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, right

  state = optimizer.init(params)
  hosts.say(f"fitting SigLIP to {steps * _BATCH:,} labelled pictures before the first step")
  bar = Progress(steps * _BATCH, 0, "fitting SigLIP to labels", "pictures", shown=hosts.is_first())
  right, rng = [], np.random.default_rng(seed)
  for i in range(steps):
    batch = range(i * _BATCH, (i + 1) * _BATCH)
    batch = [recolored(world[k % len(world)], side, rng, all_shapes=i < steps // 2) for k in batch]
    images = np.stack([scene.render(size) for scene, _ in batch])
    params, state, share = step(params, state, images, np.stack([labels for _, labels in batch]))
    right.append(share)
    bar.count(_BATCH)
  bar.close()
  last = float(np.mean(jax.device_get(right[-max(1, steps // 10) :])))
  hosts.say(f"SigLIP names the shape on {last:.0%} of the patches of objects in colors without a name")
  return jax.device_get(params["siglip"])


def recolored(scene: Scene, side: int, rng: np.random.Generator, all_shapes: bool) -> tuple[Scene, np.ndarray]:
  """Gives some objects a color that has no name in the world, and tells what each patch shows.

  Args:
    scene: of the world.
    side: patches of a row of patches.
    rng: decides which objects, and their colors.
    all_shapes: whether the shape of an object in its own color is told, too.

  Returns:
    The scene, and int8[side * side, 2]: shape and color on each patch, -1 where nothing is or it is not told.
  """
  own = [rng.random() >= _RECOLORED for _ in scene.objects]
  fills = tuple(fill if kept else _nameless(rng) for fill, kept in zip(scene.fills, own))
  labels_P2 = scenes.patch_labels(scene, side)
  kept = scene._replace(objects=tuple(itertools.compress(scene.objects, own)))
  own_P = scenes.patch_labels(kept, side)[:, 0] >= 0
  labels_P2[~own_P, 1] = -1
  if not all_shapes:
    labels_P2[own_P, 0] = -1
  return scene._replace(fills=fills), labels_P2


def _nameless(rng: np.random.Generator) -> tuple[int, int, int]:
  """An RGB color far from all that the world names, and from its background."""
  while True:
    color = rng.integers(0, 256, 3)
    if (np.linalg.norm(_NAMED - color, axis=1) > _APART).all():
      return tuple(color.tolist())


def label_loss(logits_BPL: jax.Array, labels_BP2: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the loss of `fit_siglip` and the share of the patches with a told shape on which it is right.

  Args:
    logits_BPL: of shapes, of colors, of whether anything is there, of rows, of columns.
    labels_BP2: of `recolored`: int[B, P, 2], shape and color, -1 where not told; patches in raster order.
  """
  side = math.isqrt(logits_BPL.shape[1])
  ends = np.cumsum((_SHAPES, _COLORS, 1, side))
  shapes, colors, there, rows, columns = jnp.split(logits_BPL, ends, axis=-1)
  entropy = optax.softmax_cross_entropy_with_integer_labels
  mean = lambda x, where: (x * where).sum() / jnp.maximum(where.sum(), 1)
  told_BP2, named_BP2 = labels_BP2 >= 0, jnp.maximum(labels_BP2, 0)
  loss = mean(entropy(shapes, named_BP2[..., 0]), told_BP2[..., 0])
  loss += mean(entropy(colors, named_BP2[..., 1]), told_BP2[..., 1])
  loss += optax.sigmoid_binary_cross_entropy(there[..., 0], told_BP2.any(-1)).mean()
  row, column = (jnp.broadcast_to(x, logits_BPL.shape[:2]) for x in np.divmod(np.arange(side * side), side))
  loss += _PLACE_WEIGHT * (entropy(rows, row).mean() + entropy(columns, column).mean())
  return loss, mean(shapes.argmax(-1) == labels_BP2[..., 0], told_BP2[..., 0])
