"""The scenes of the world: objects and their places, rendering, and the held-out combinations.

Places and radii are fractions of the side of the picture, x to the right and y down, so that a scene can be rendered
at any size. All randomness comes from `rng.random()`, whose stream is stable over versions of Python and NumPy;
`random.Random` and `numpy.random.Generator` both work.
"""

import collections
import functools
import itertools
import math
import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLORS = {  # GenEval's names; sRGB
  "red": (214, 38, 40),
  "orange": (245, 140, 20),
  "yellow": (245, 222, 48),
  "green": (38, 150, 64),
  "blue": (40, 88, 212),
  "purple": (128, 56, 176),
  "pink": (246, 140, 196),
  "brown": (122, 72, 34),
  "black": (22, 22, 22),
  "white": (252, 252, 252),
}
# Radius, half the side of the box around the object.
SIZES = {"small": (0.135, 0.160), "large": (0.200, 0.235)}
# Relation -> (axis, sign of the first's center minus the second's), and the inverse relation.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = ("train", "val", "held_out")
# GenEval's six, and scenes of three or four different objects, which are for training only.
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SEVERAL = "several"
DEFAULT_TAGS = {  # shares of training
  "single_object": 0.2,
  "colors": 0.25,
  "two_object": 0.1,
  "counting": 0.15,
  "position": 0.1,
  "color_attr": 0.15,
  SEVERAL: 0.05,
}

# Held out of training pictures and texts. Every shape and every color appears in other combinations.
HELD_OUT_PAIRS = frozenset((SHAPES[i % 8], tuple(COLORS)[(3 * i + i // 8) % 10]) for i in range(12))
HELD_OUT_COUNTS = frozenset({("star", 4), ("ring", 3), ("square", 2), ("heart", 4)})
HELD_OUT_RELATIONS = frozenset(
  {  # each with its inverse: a heart right of a star is held out, too
    ("star", "left of", "heart"),
    ("circle", "above", "cross"),
    ("ring", "right of", "square"),
    ("triangle", "below", "diamond"),
  }
)
PAIRS = tuple(itertools.product(SHAPES, COLORS))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)

BACKGROUND = 168  # gray
JITTER = 8  # of each channel of each fill, and of the background's gray
GAP = 0.045  # least distance between the boxes of two objects
MARGIN = 0.02  # least distance from a box to the edge of the picture
LARGE, ANYWHERE = 0.5, 0.5  # defaults of `sample`
SLANT = 0.45  # largest ratio of the offset across a relation to the offset along it
SUPERSAMPLING = 4
RING_HOLE = 0.56  # radius of the hole to that of the ring

T = TypeVar("T")
Rng = random.Random | np.random.Generator


class Object(NamedTuple):
  """An object of a scene."""

  shape: str  # of SHAPES
  color: str  # of COLORS
  size: str  # of SIZES
  x: float  # center of its box
  y: float
  r: float  # half the side of its box


class Scene(NamedTuple):
  """A picture before rendering. Picklable; objects touch neither each other nor the edge."""

  objects: tuple[Object, ...]
  background: int  # gray, in [0, 255]
  fills: tuple[tuple[int, int, int], ...]  # RGB of each object, in [0, 255]: its color, jittered

  def render(self, size: int) -> np.ndarray:
    """Renders the scene.

    Args:
      size: side of the picture in pixels.

    Returns:
      uint8[size, size, 3], RGB, deterministic.
    """
    side = SUPERSAMPLING * size
    background = (self.background,) * 3
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    for thing, fill in zip(self.objects, self.fills):
      center = (thing.x * side - 0.5, thing.y * side - 0.5)
      outline = OUTLINES[thing.shape] * (thing.r * side)
      draw.polygon((outline + center).ravel().tolist(), fill=fill)
      if thing.shape == "ring":
        draw.polygon((RING_HOLE * outline + center).ravel().tolist(), fill=background)
    return np.array(image.reduce(SUPERSAMPLING))


class Combination(NamedTuple):
  """The part of a picture that a prompt describes. See `combinations`."""

  tag: str
  pairs: tuple[tuple[str, str | None], ...]  # (shape, color); None: the prompt does not name the color
  count: int = 1  # of the only pair; 1 where there are several pairs
  relation: str | None = None  # of the first pair to the second


def held_out(scene: Scene) -> bool:
  """Returns whether a scene shows a held-out combination.

  For a held-out relation only the sign along its axis counts: a star anywhere left of a heart, however far above it.
  """
  objects = scene.objects
  counts = collections.Counter(thing.shape for thing in objects)
  return (
    any((thing.shape, thing.color) in HELD_OUT_PAIRS for thing in objects)
    or any(counts[shape] == count for shape, count in HELD_OUT_COUNTS)
    or any(
      _lies(a, relation, b)
      for first, relation, second in HELD_OUT_RELATIONS
      for a in objects
      if a.shape == first
      for b in objects
      if b.shape == second
    )
  )


def patch_labels(scene: Scene, side: int) -> np.ndarray:
  """Returns the labels of patches: int8[side * side, 2], indices into SHAPES and COLORS, both -1 without an object.

  The label is of the object whose box contains the patch's center; boxes do not overlap. Raster order.
  """
  labels = np.full((side, side, 2), -1, np.int8)
  center = (np.arange(side) + 0.5) / side
  for thing in scene.objects:
    columns, rows = (np.abs(center - middle) < thing.r for middle in (thing.x, thing.y))
    labels[np.ix_(rows, columns)] = SHAPES.index(thing.shape), tuple(COLORS).index(thing.color)
  return labels.reshape(-1, 2)


def relation_held_out(first: str, relation: str, second: str) -> bool:
  """Returns whether a relation between two shapes, or its inverse, is held out."""
  return (first, relation, second) in HELD_OUT_RELATIONS or (
    second,
    INVERSE[relation],
    first,
  ) in HELD_OUT_RELATIONS


def relation(a: Object, b: Object) -> str | None:
  """Returns the clear relation of `a` to `b`, apart along one axis and nearly level along the other; or None."""
  offset = (a.x - b.x, a.y - b.y)
  axis = int(abs(offset[1]) > abs(offset[0]))
  if abs(offset[axis]) <= a.r + b.r or abs(offset[1 - axis]) > SLANT * abs(offset[axis]):
    return None
  return next(name for name, side in RELATIONS.items() if side == (axis, 1 if offset[axis] > 0 else -1))


@functools.cache
def combinations(tag: str, unseen: bool) -> tuple[Combination, ...]:
  """Returns all combinations that prompts of a tag can describe.

  Args:
    tag: of TAGS.
    unseen: True for held-out combinations only, False for the others only. "single_object" and "two_object" name no
      color and have none that are held out.
  """
  if tag == "single_object":
    return () if unseen else tuple(Combination(tag, ((shape, None),)) for shape in SHAPES)
  if tag == "two_object":
    return (
      () if unseen else tuple(Combination(tag, ((a, None), (b, None))) for a, b in itertools.permutations(SHAPES, 2))
    )
  if tag == "counting":
    return tuple(
      Combination(tag, ((shape, None),), count)
      for shape in SHAPES
      for count in (2, 3, 4)
      if ((shape, count) in HELD_OUT_COUNTS) == unseen
    )
  if tag == "colors":
    return tuple(Combination(tag, (pair,)) for pair in PAIRS if (pair in HELD_OUT_PAIRS) == unseen)
  if tag == "position":
    return tuple(
      Combination(tag, ((a, None), (b, None)), 1, name)
      for a, b in itertools.permutations(SHAPES, 2)
      for name in RELATIONS
      if relation_held_out(a, name, b) == unseen
    )
  return tuple(
    Combination(tag, (a, b))
    for a, b in itertools.permutations(PAIRS, 2)
    if a[0] != b[0] and a[1] != b[1] and bool(HELD_OUT_PAIRS & {a, b}) == unseen
  )


def sample(tag: str, split: str, rng: Rng, large: float = LARGE, spread: float = ANYWHERE) -> tuple[Scene, Combination]:
  """Returns a scene and the combination that a prompt of this tag describes.

  Args:
    tag: of TAGS, or SEVERAL.
    split: of SPLITS. In "held_out" every scene shows a held-out combination, in the others none does.
    rng: see the top of the module.
    large: share of the scenes of one or two different objects that hold a large one.
    spread: most that a lone object lies from the middle along each axis; ANYWHERE leaves it the whole picture.
  """
  unseen = split == "held_out"
  while True:
    combination = _draw(tag, unseen, rng)
    scene = _compose(combination, unseen, rng, large, spread)
    if held_out(scene) == unseen:
      return scene, combination


def pick(rng: Rng, items: Sequence[T]) -> T:
  """Returns one of the items."""
  return items[int(rng.random() * len(items))]


def shuffled(rng: Rng, items: Sequence[T]) -> list[T]:
  """Returns the items in random order."""
  return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))]


def _draw(tag: str, unseen: bool, rng: Rng) -> Combination:
  if tag != SEVERAL:
    return pick(rng, combinations(tag, unseen) or combinations(tag, False))
  pairs = pick(rng, combinations("color_attr", unseen)).pairs
  for _ in range(1 + int(rng.random() < 0.5)):
    pairs += (pick(rng, [pair for pair in SEEN_PAIRS if pair not in pairs]),)
  return Combination(tag, tuple(shuffled(rng, pairs)))


def _compose(combination: Combination, unseen: bool, rng: Rng, large: float, spread: float) -> Scene:
  """A scene of the combination, drawing what it leaves open: colors, sizes, places."""
  pairs = [(shape, color or pick(rng, _colors(shape, False))) for shape, color in combination.pairs]
  if unseen and combination.tag in ("single_object", "two_object"):
    number = int(rng.random() * len(pairs))
    pairs[number] = (pairs[number][0], pick(rng, _colors(pairs[number][0], True)))
  pairs *= combination.count
  sizes = ["small"] * len(pairs)
  # Two large objects do not fit side by side, and with large ones area would reveal the count.
  if combination.count == 1 and len(pairs) <= 2 and rng.random() < large:
    sizes[int(rng.random() * len(pairs))] = "large"
  radii = [low + (high - low) * rng.random() for low, high in (SIZES[size] for size in sizes)]
  if combination.relation:
    places = _related(radii, combination.relation, rng)
  else:
    places = _scattered(radii, rng, spread)
  objects = tuple(Object(*pair, size, x, y, r) for pair, size, (x, y), r in zip(pairs, sizes, places, radii))
  background = BACKGROUND + _jitter(rng)
  fills = tuple(tuple(min(255, max(0, c + _jitter(rng))) for c in COLORS[thing.color]) for thing in objects)
  return Scene(objects, background, fills)


@functools.cache
def _colors(shape: str, unseen: bool) -> tuple[str, ...]:
  return tuple(color for color in COLORS if ((shape, color) in HELD_OUT_PAIRS) == unseen)


def _jitter(rng: Rng) -> int:
  return int(rng.random() * (2 * JITTER + 1)) - JITTER


def _scattered(radii: Sequence[float], rng: Rng, spread: float) -> list[tuple[float, float]]:
  """Returns places at least GAP apart; that of a lone object within `spread` of the middle."""
  while True:
    places: list[tuple[float, float]] = []
    for r in radii:
      low = max(r + MARGIN, 0.5 - spread) if len(radii) == 1 else r + MARGIN
      span = 1 - 2 * low
      x, y = low + span * rng.random(), low + span * rng.random()
      if any(max(abs(x - u), abs(y - v)) < r + s + GAP for (u, v), s in zip(places, radii)):
        break
      places.append((x, y))
    else:
      return places


def _related(radii: Sequence[float], name: str, rng: Rng) -> list[tuple[float, float]]:
  """Returns the places of two objects, the first in the given relation to the second."""
  low = [r + MARGIN for r in radii]
  least, most = sum(radii) + GAP, 1 - sum(low)
  axis, sign = RELATIONS[name]
  before, after = (0, 1) if sign < 0 else (1, 0)
  while True:
    offset = least + (most - least) * rng.random()
    along, across = [0.0, 0.0], [0.0, 0.0]
    along[before] = low[before] + (most - offset) * rng.random()
    along[after] = along[before] + offset
    across[0] = low[0] + (1 - 2 * low[0]) * rng.random()
    across[1] = across[0] + SLANT * offset * (2 * rng.random() - 1)
    if low[1] <= across[1] <= 1 - low[1]:
      return [(a, b) if axis == 0 else (b, a) for a, b in zip(along, across)]


def _lies(a: Object, name: str, b: Object) -> bool:
  axis, sign = RELATIONS[name]
  return sign * ((a.x, a.y)[axis] - (b.x, b.y)[axis]) > 0


def _outlines() -> dict[str, np.ndarray]:
  """Returns float[n, 2]: the corners (x, y) of each shape in the box from -1 to 1; the star reaches 1.08."""
  turn = 2 * math.pi * np.arange(64) / 64
  circle = np.stack([np.cos(turn), np.sin(turn)], 1)
  height = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
  heart = np.stack([np.sin(turn) ** 3, -(height + 2.55) / 16], 1)
  points = math.pi * (np.arange(10) / 5 - 0.5)
  reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.40)
  arm = 0.31
  quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
  turns = (np.array([[c, s], [-s, c]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)))
  return {
    "circle": circle,
    "square": 0.88 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": np.array([(0, -0.95), (1, 0.80), (-1, 0.80)]),
    "diamond": np.array([(0, -1), (1, 0), (0, 1), (-1, 0)]),
    "star": reach[:, None] * np.stack([np.cos(points), np.sin(points)], 1),
    "cross": np.concatenate([quarter @ matrix for matrix in turns]),
    "ring": circle,
    "heart": heart,
  }


OUTLINES = _outlines()
