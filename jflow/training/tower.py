"""The stand-in for a pretrained SigLIP on the built-in world: a tower fitted to labels of its patches.

SigLIP has seen billions of pairs of pictures and texts before JanusFlow reads with it (paper section 3.2). A small
tower on two cores sees some ten thousand pictures, in which the sigmoid loss teaches it colors and no shapes. So each
patch learns what stands on it: it is told in every picture, for every object, where it is.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jflow.data import scenes
from jflow.data.scenes import Scene
from jflow.models.config import SiglipConfig
from jflow.models.janusflow import normalise
from jflow.models.siglip import Siglip
from jflow.sharding import unbox
from jflow.training import hosts

_BATCH = 16  # smaller ones learn more from as many pictures; the rate is for this size
_RATE = 1.5e-3  # falls linearly to a tenth after the warm-up
_WARMUP = 50  # steps; fewer than 800 pictures only warm up
_SHAPES = len(scenes.SHAPES)
_LABELS = _SHAPES + len(scenes.COLORS) + 1  # logits of a patch: shape, color, whether anything is there


def fit_siglip(config: SiglipConfig, world: Sequence[Scene], pictures: int, seed: int) -> Any:
  """Fits a tower to scenes of the built-in world.

  The loss is the cross-entropy of shape and color over patches whose center lies in an object's box, and the binary
  one of whether a patch is such.

  Args:
    config: of the tower.
    world: scenes, drawn at the tower's `image_size`; taken in order, again from the first where there are too few.
    pictures: how many to learn from; rounded up to whole batches of 16.
    seed: of the fresh parameters.

  Returns:
    The parameters of `Siglip`, f32 numpy arrays. Its pooling head is as fresh.
  """
  tower = Siglip(config, jnp.float32, False)
  size, side = config.image_size, config.image_size // config.patch_size
  steps = -(-pictures // _BATCH)
  key, other = jax.random.split(jax.random.key(seed))
  params = {
    "tower": unbox(tower.init(key, jnp.zeros((1, size, size, 3)))["params"]),
    "labels": jax.random.normal(other, (config.width, _LABELS)) / np.sqrt(config.width),
  }
  rate = optax.schedules.join_schedules(
    [optax.linear_schedule(0.0, _RATE, _WARMUP), optax.linear_schedule(_RATE, _RATE / 10, max(1, steps - _WARMUP))], [_WARMUP]
  )
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

  @jax.jit
  def step(params, state, images, labels):
    features = lambda params: tower.apply({"params": params["tower"]}, normalise(images))
    loss = lambda params: label_loss(features(params) @ params["labels"], labels)
    gradients, right = jax.grad(loss, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, right

  state = optimizer.init(params)
  shown = sys.stderr.isatty() and hosts.is_first()
  hosts.say(f"fitting SigLIP to {steps * _BATCH:,} labelled pictures before the first step")
  bar = tqdm(total=steps * _BATCH, unit="picture", desc="fitting SigLIP to labels", disable=not shown)
  right = []
  for i in range(steps):
    batch = [world[k % len(world)] for k in range(i * _BATCH, (i + 1) * _BATCH)]
    images = np.stack([scene.render(size) for scene in batch])
    labels = np.stack([scenes.patch_labels(scene, side) for scene in batch])
    params, state, share = step(params, state, images, labels)
    right.append(share)
    bar.update(_BATCH)
  bar.close()
  last = float(np.mean(jax.device_get(right[-max(1, steps // 10) :])))
  hosts.say(f"SigLIP names the shape on {last:.0%} of the patches that show one")
  return jax.device_get(params["tower"])


def label_loss(logits_BPL: jax.Array, labels_BP2: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the loss of `fit_siglip` and the share of the objects' patches whose shape is right.

  Args:
    logits_BPL: of shapes, of colors, of whether anything is there.
    labels_BP2: int[B, P, 2], shape and color, -1 where nothing is.
  """
  there_BP = labels_BP2[..., 0] >= 0
  count = jnp.maximum(there_BP.sum(), 1)
  named = jnp.maximum(labels_BP2, 0)
  entropy = optax.softmax_cross_entropy_with_integer_labels
  shapes, colors, there = jnp.split(logits_BPL, (_SHAPES, _LABELS - 1), axis=-1)
  loss = entropy(shapes, named[..., 0]) + entropy(colors, named[..., 1])
  loss = (loss * there_BP).sum() / count + optax.sigmoid_binary_cross_entropy(there[..., 0], there_BP).mean()
  right = (shapes.argmax(-1) == labels_BP2[..., 0]) & there_BP
  return loss, right.sum() / count
