"""The scenes of the world: areas, boxes, colors and places of what is drawn."""

import itertools
import math
import pickle

import numpy as np
import pytest
from world_reader import some_scenes

from jflow.world import scenes
from jflow.world.scenes import COLORS, SHAPES, Object, Scene

STAR = 10 / 2 * 1.08 * 0.40 * math.sin(math.pi / 5)
AREAS = {  # of radius 1
  "circle": math.pi,
  "square": 4 * 0.88**2,
  "triangle": 1.75,
  "diamond": 2.0,
  "star": STAR,
  "cross": 4 * 2 * 0.31 - 4 * 0.31**2,
  "ring": math.pi * (1 - 0.56**2),
  # Green's theorem over (sin^3 t, (13 cos t - 5 cos 2t - 2 cos 3t - cos 4t) / 16).
  "heart": 180 * math.pi / 256,
}


def one(shape: str, color: str = "red", x: float = 0.5, y: float = 0.5, r: float = 0.3) -> Scene:
  return Scene((Object(shape, color, "large", x, y, r),), 168, (COLORS[color],))


@pytest.mark.parametrize("shape", SHAPES)
def test_area_is_that_of_the_geometric_shape(shape):
  image = one(shape, "black").render(256).astype(float)
  covered = (168 - image[..., 0]) / (168 - 22)
  assert covered.sum() / (0.3 * 256) ** 2 == pytest.approx(AREAS[shape], rel=0.015)


@pytest.mark.parametrize("shape", SHAPES)
def test_box_is_centered_and_has_the_radius(shape):
  image = one(shape, "black", x=0.4, y=0.6, r=0.25).render(400)
  rows, columns = np.nonzero(image[..., 0] < 100)
  left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
  assert abs((left + right) / 2 - 160) <= 1.5
  assert abs((top + bottom) / 2 - 240) <= 11  # stars and triangles stand on less than half of their box
  assert 0.84 * 200 <= max(right - left, bottom - top) <= 1.08 * 200 + 2


def test_picture_is_uint8_rgb_of_any_size_and_always_the_same():
  for scene in some_scenes("train", 5):
    image = scene.render(64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and image.flags.writeable
    np.testing.assert_array_equal(image, pickle.loads(pickle.dumps(scene)).render(64))
    small = scene.render(192).reshape(64, 3, 64, 3, 3).mean((1, 3))
    assert np.abs(small - image).mean() < 1.0  # the same picture, sharper


def test_colors_are_the_palette_within_the_jitter_on_gray():
  for scene in some_scenes("train", 30):
    image = scene.render(96).astype(int)
    np.testing.assert_array_equal(image[0, 0], [scene.background] * 3)
    assert abs(scene.background - 168) <= 8
    for thing, fill in zip(scene.objects, scene.fills):
      assert np.abs(np.subtract(fill, COLORS[thing.color])).max() <= 8
      if thing.shape != "ring":
        np.testing.assert_array_equal(image[int(thing.y * 96), int(thing.x * 96)], fill)


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_objects_keep_apart_and_inside(split):
  for scene in some_scenes(split):
    assert 1 <= len(scene.objects) <= 4
    for thing in scene.objects:
      low, high = {"small": (0.135, 0.16), "large": (0.2, 0.235)}[thing.size]
      assert low <= thing.r <= high
      assert min(thing.x, thing.y, 1 - thing.x, 1 - thing.y) >= thing.r + 0.02 - 1e-9
    for a, b in itertools.combinations(scene.objects, 2):
      assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.r + b.r + 0.045 - 1e-9
