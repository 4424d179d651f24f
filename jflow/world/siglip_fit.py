"""A small SigLIP for the world, fitted to labels of patches, in place of a pretrained one.

SigLIP is pretrained on billions of pairs of pictures and texts (paper section 3.2). From the few pictures of a small
run the sigmoid loss learns colors but not shapes. So the loss here is supervised: each patch predicts its object's
shape and color, and its own row and column, without which the features lose positions.

The world's training scenes lack some pairs of shape and color, and shapes learned from them do not transfer to these.
So some objects are recolored with colors that have no name in the world. Labels of color are given for the other
objects only, and in the second half of the pictures labels of shape for the recolored ones only.

Legend: B pictures, P patches, L logits.
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

_BATCH = 16  # small, since the number of pictures is fixed; _RATE is for this size
_RATE = 1.5e-3  # decays linearly to a tenth after the warm-up
_WARMUP = 50  # steps, 800 pictures
_SHAPES = len(scenes.SHAPES)
_COLORS = len(scenes.COLORS)
_PLACE_WEIGHT = 0.25  # of the losses of row and column
_RECOLORED = 0.6  # share of the objects
_NAMED = np.array([*scenes.COLORS.values(), (scenes.BACKGROUND,) * 3])
_APART = np.array([50] * _COLORS + [85])  # least distance of a recolored object's RGB from each of _NAMED


def fit_siglip(config: SiglipConfig, world: Sequence[Scene], pictures: int, seed: int) -> Any:
  """Fits a SigLIP to scenes of the world.

  The loss is the sum of the cross-entropies of shape and color over labelled patches (see `recolored`), of whether a
  patch shows an object, and of every patch's row and column.

  Args:
    config: of the SigLIP.
    world: scenes, rendered at `config.image_size`; taken in order, repeatedly if there are too few.
    pictures: number to train on; rounded up to whole batches of 16.
    seed: of the fresh parameters and of the recoloring.

  Returns:
    The parameters of `Siglip`, f32 numpy arrays. Its pooling head is not trained.
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
  """Recolors some objects with colors that have no name in the world, and labels the patches.

  Args:
    scene: of the world.
    side: patches of a row of patches.
    rng: chooses the objects and their colors.
    all_shapes: whether objects in their own color get labels of shape, too.

  Returns:
    The scene, and the labels int8[side * side, 2]: shape and color of each patch, -1 without an object or label.
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
  """An RGB color far from all named colors of the world and from its background."""
  while True:
    color = rng.integers(0, 256, 3)
    if (np.linalg.norm(_NAMED - color, axis=1) > _APART).all():
      return tuple(color.tolist())


def label_loss(logits_BPL: jax.Array, labels_BP2: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the loss of `fit_siglip` and its accuracy of shape on the patches with a label of shape.

  Args:
    logits_BPL: of shapes, of colors, of whether there is an object, of rows, of columns.
    labels_BP2: from `recolored`: int[B, P, 2], shape and color, -1 without a label; patches in raster order.
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
