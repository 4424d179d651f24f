"""The SigLIP of the world: the labels of its patches, and that it learns it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from jflow import sharding
from jflow.models.config import SiglipConfig
from jflow.models.siglip import Siglip
from jflow.training import setup
from jflow.world import scenes
from jflow.world import start as world_start
from jflow.world.scenes import Object, Scene
from jflow.world.siglip_fit import fit_siglip, label_loss, recolored
from jflow.world.source import WorldSource

CONFIG = SiglipConfig(
  image_size=24, patch_size=6, embed_dim=32, mlp_dim=64, num_layers=1, num_heads=2, layer_norm_epsilon=1e-6, gelu="erf"
)


def test_a_patch_is_labelled_with_the_object_whose_box_holds_its_center():
  scene = Scene(
    (Object("star", "blue", "small", 0.25, 0.25, 0.15), Object("ring", "red", "small", 0.8, 0.7, 0.14)), 168, ()
  )
  star, ring = (scenes.SHAPES.index("star"), 4), (scenes.SHAPES.index("ring"), 0)
  want = np.full((8, 8, 2), -1)
  want[1:3, 1:3] = star  # centers at 0.1875 and 0.3125
  want[4:7, 5:8] = ring  # rows 0.5625 to 0.8125 are in [0.56, 0.84], columns 0.6875 to 0.9375 in [0.66, 0.94]
  np.testing.assert_array_equal(scenes.patch_labels(scene, 8).reshape(8, 8, 2), want)


def test_every_picture_of_the_world_shows_each_object_on_some_patch():
  source = WorldSource("generation", 200, 3)
  for i in range(200):
    scene = source[i].images[0]
    found = {tuple(label) for label in scenes.patch_labels(scene, 8) if label[0] >= 0}
    colors = tuple(scenes.COLORS)
    assert found == {(scenes.SHAPES.index(o.shape), colors.index(o.color)) for o in scene.objects}


def test_the_loss_counts_what_is_told_and_presence_and_place_everywhere():
  labels = np.full((2, 4, 2), -1)
  labels[0, 1] = 2, -1  # of one object the shape is told
  labels[1, 2] = -1, 7  # of another the color
  even = jnp.zeros((2, 4, 8 + 10 + 1 + 2 + 2))
  loss, right = label_loss(even, labels)
  assert float(loss) == pytest.approx(math.log(8) + math.log(10) + math.log(2) + 0.25 * 2 * math.log(2), rel=1e-6)
  assert float(right) == 0.0  # the first of equal logits is not shape 2
  sure = even.at[..., 18].set(jnp.where(labels.max(-1) >= 0, 50.0, -50.0))
  sure = sure.at[0, 1, 2].set(50.0).at[1, 2, 8 + 7].set(50.0)
  for patch, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
    sure = sure.at[:, patch, 19 + row].set(50.0).at[:, patch, 21 + column].set(50.0)
  loss, right = label_loss(sure, labels)
  assert float(loss) == pytest.approx(0.0, abs=1e-6) and float(right) == 1.0
  off = sure.at[0, 1, 8:18].set(9.0).at[1, 2, :8].set(9.0).at[:, 3, :18].set(9.0)  # not told: does not matter
  assert float(label_loss(off, labels)[0]) == pytest.approx(0.0, abs=1e-6)


def test_a_recolored_object_has_no_named_color_and_each_label_belongs_to_its_half():
  source, rng = WorldSource("generation", 300, 1), np.random.default_rng(0)
  known = np.array(list(scenes.COLORS.values()))
  seen = {True: 0, False: 0}
  for i in range(len(source)):
    scene, all_shapes = source[i].images[0], i % 2 == 0
    other, labels = recolored(scene, 8, rng, all_shapes)
    assert other._replace(fills=scene.fills) == scene  # nothing but the colors changes
    truth = scenes.patch_labels(scene, 8)
    for thing, before, after in zip(scene.objects, scene.fills, other.fills):
      own = before == after
      seen[own] += 1
      shape, color = scenes.SHAPES.index(thing.shape), tuple(scenes.COLORS).index(thing.color)
      here = scenes.patch_labels(scene._replace(objects=(thing,)), 8)[:, 0] >= 0
      assert set(labels[here, 0]) == {shape if all_shapes or not own else -1}
      assert set(labels[here, 1]) == {color if own else -1}
      if not own:
        assert np.linalg.norm(known - after, axis=1).min() > 50  # no shade of a named one
        assert np.linalg.norm(np.array(after) - scenes.BACKGROUND) > 85
    assert (labels[truth[:, 0] < 0] == -1).all()
  assert 0.35 < seen[True] / sum(seen.values()) < 0.45


def test_shapes_of_named_colors_are_told_in_the_first_half_alone(monkeypatch):
  told = []

  def noted(scene, side, rng, all_shapes):
    told.append(all_shapes)
    return recolored(scene, side, rng, all_shapes)

  monkeypatch.setattr("jflow.world.siglip_fit.recolored", noted)
  source = WorldSource("generation", 16, 0)
  fit_siglip(CONFIG, [source[i].images[0] for i in range(16)], 64, 0)
  assert told == [True] * 32 + [False] * 32


def test_fitting_teaches_it_to_tell_colors():
  source = WorldSource("generation", 320, 0)
  world = [source[i].images[0] for i in range(len(source))]
  siglip = fit_siglip(CONFIG, world, 1600, 0)
  fresh = Siglip(CONFIG, jnp.float32, False).init(jax.random.key(0), jnp.zeros((1, 24, 24, 3)))["params"]
  assert jax.tree.map(np.shape, siglip) == jax.tree.map(np.shape, sharding.unbox(fresh))
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(siglip))
  val = WorldSource("generation", 80, 0, split="val")
  val = [val[i].images[0] for i in range(len(val))]
  labels = np.stack([scenes.patch_labels(scene, 4) for scene in val])
  pixels = np.stack([scene.render(24) for scene in val]) / np.float32(127.5) - 1

  features = jax.jit(Siglip(CONFIG, jnp.float32, False).apply)

  def score(siglip):
    """The share of unseen objects' patches whose color a linear fit on half of them finds."""
    x = np.asarray(features({"params": siglip}, pixels))[labels[..., 0] >= 0]
    y = np.eye(10)[labels[labels[..., 0] >= 0][:, 1]]
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    half = len(x) // 2
    weights = np.linalg.lstsq(x[:half], y[:half], rcond=None)[0]
    return np.mean((x[half:] @ weights).argmax(1) == y[half:].argmax(1))

  again = fit_siglip(CONFIG, world, 16, 0)
  assert score(siglip) > score(again) + 0.1


def test_a_fresh_run_starts_from_the_fitted_siglip_and_nothing_else_changes(capsys, monkeypatch):
  noise = np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), np.uint8)
  monkeypatch.setattr(world_start, "first_images", lambda *_: noise)
  model, mesh = tiny.model(), sharding.make_mesh(1, 1, 1)

  def start(fit_labels):
    config = tiny.configuration(world=dict(fit_labels=fit_labels), data=dict(shapes=dict(size=60, seed=0)))
    return flatten_dict(setup.start_params(config, model, mesh, lambda: None), sep="/")

  fitted, fresh = start(20), start(0)
  said = capsys.readouterr().err
  assert said.count("fitting SigLIP to 32 labelled pictures") == said.count("SigLIP names the shape") == 1
  world = WorldSource("generation", 60, 0)
  world = [world[i].images[0] for i in range(20)]
  fitted_alone = fit_siglip(tiny.CONFIG.understanding_encoder, world, 20, tiny.configuration().train.seed)
  want = flatten_dict(fitted_alone, sep="/")
  for path, x in fitted.items():
    part, _, rest = path.partition("/")
    np.testing.assert_array_equal(x, want[rest] if part == "understanding_encoder" else fresh[path], err_msg=path)
  changed = [path for path in fresh if not np.array_equal(fresh[path], fitted[path])]
  assert "understanding_encoder/patch_embed/kernel" in changed
