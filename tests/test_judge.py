"""The judge sees what was drawn, also through the damage that a codec does, and follows GenEval's rules."""

import copy
import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jflow.data import scenes, shapes
from jflow.data.scenes import COLORS, SHAPES, Object, Scene
from jflow.evaluation import judge
from jflow.evaluation.judge import Detection

SIDE = 64


def drawn(split: str, each: int) -> list[tuple[Scene, dict]]:
  """Returns scenes of all tags, each with the metadata of its prompt."""
  pairs = []
  for tag, number in itertools.product(shapes.TAGS, range(each)):
    scene, combination = scenes.sample(tag, split, random.Random(f"{tag}/{split}/judge/{number}"))
    pairs.append((scene, metadata_of(combination)))
  return pairs


def metadata_of(combination: scenes.Combination) -> dict:
  include = [
    {"class": shape, "count": combination.count} | ({"color": color} if color else {})
    for shape, color in combination.pairs
  ]
  metadata = {"tag": combination.tag, "include": include}
  if combination.relation:
    include.reverse()
    include[1]["position"] = [combination.relation, 0]
  if combination.tag == "counting":
    metadata["exclude"] = [{"class": include[0]["class"], "count": combination.count + 1}]
  return metadata


def falsified(metadata: dict, rng: random.Random) -> dict:
  """Returns metadata that differ in one attribute from the true ones."""
  metadata = copy.deepcopy(metadata)
  include = metadata["include"]
  if metadata["tag"] in ("single_object", "two_object"):
    there = {thing["class"] for thing in include}
    include[0]["class"] = rng.choice([shape for shape in SHAPES if shape not in there])
  elif metadata["tag"] == "counting":
    include[0]["count"] += rng.choice((-1, 1))
    metadata["exclude"][0]["count"] = include[0]["count"] + 1
  elif metadata["tag"] == "colors":
    include[0]["color"] = rng.choice([color for color in COLORS if color != include[0]["color"]])
  elif metadata["tag"] == "position":
    include[1]["position"] = [scenes.INVERSE[include[1]["position"][0]], 0]
  else:
    include[0]["color"], include[1]["color"] = include[1]["color"], include[0]["color"]
  return metadata


def classes(things) -> list[tuple[str, str]]:
  return sorted((thing.shape, thing.color) for thing in things)


# --- Damage


def noisy(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
  return np.clip(image + rng.normal(0, deviation, image.shape), 0, 255).round().astype(np.uint8)


def blurred(image: np.ndarray, deviation: float) -> np.ndarray:
  return ndimage.gaussian_filter(image.astype(float), (deviation, deviation, 0)).round().astype(np.uint8)


def blotched(image: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
  blotches = ndimage.gaussian_filter(rng.normal(size=image.shape), (8, 8, 0))
  return np.clip(image + deviation * blotches / blotches.std(), 0, 255).round().astype(np.uint8)


def halved(image: np.ndarray) -> np.ndarray:
  small = Image.fromarray(image).resize((SIDE // 2, SIDE // 2), Image.Resampling.BOX)
  return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


class PatchCodec:
  """A stand-in for an autoencoder: the principal components of windows of 16 pixels at a stride of 8."""

  def __init__(self, images: list[np.ndarray], components: int):
    windows = np.concatenate([self._windows(image) for image in images])
    self.mean = windows.mean(0)
    self.basis = np.linalg.eigh(np.cov((windows - self.mean).T))[1][:, -components:]
    self.scale = ((windows - self.mean) @ self.basis).std(0)

  def __call__(self, image: np.ndarray, latent_noise: float, rng: np.random.Generator) -> np.ndarray:
    latents = (self._windows(image) - self.mean) @ self.basis
    latents += latent_noise * self.scale * rng.normal(size=latents.shape)
    windows = iter(latents @ self.basis.T + self.mean)
    total, count = np.zeros(image.shape), np.zeros((SIDE, SIDE, 1))
    for y, x in self._corners():
      total[y : y + 16, x : x + 16] += next(windows).reshape(16, 16, 3)
      count[y : y + 16, x : x + 16] += 1
    return np.clip(total / count, 0, 255).round().astype(np.uint8)

  def _windows(self, image: np.ndarray) -> np.ndarray:
    return np.stack([image[y : y + 16, x : x + 16].ravel().astype(float) for y, x in self._corners()])

  def _corners(self):
    return itertools.product(range(0, SIDE - 15, 8), repeat=2)


# --- What was drawn is what is found


def test_clean_pictures_are_judged_without_a_mistake():
  rng = random.Random(0)
  for scene, metadata in drawn("val", 40) + drawn("held_out", 20):
    found = judge.detect(scene.render(SIDE))
    assert classes(found) == classes(scene.objects), (scene, found)
    assert judge.lenient(found, metadata) and judge.strict(found, metadata), (metadata, found)
    wrong = falsified(metadata, rng)
    assert not judge.lenient(found, wrong) and not judge.strict(found, wrong), (wrong, found)


@pytest.mark.parametrize("size", scenes.SIZES)
def test_every_pair_of_shape_and_color_is_recognized(size):
  r = {"small": 0.14, "large": 0.22}[size]
  for shape, color in scenes.PAIRS:
    scene = Scene((Object(shape, color, size, 0.42, 0.57, r),), 168, (COLORS[color],))
    assert classes(judge.detect(scene.render(SIDE))) == [(shape, color)]


@pytest.mark.parametrize("side", [48, 64, 96, 256])
def test_place_and_radius_are_measured_at_any_size(side):
  for scene, _ in drawn("val", 3):
    found = judge.detect(scene.render(side))
    assert classes(found) == classes(scene.objects)
    for thing in scene.objects:
      alike = [d for d in found if d.shape == thing.shape]
      gap, nearest = min((abs(d.x - thing.x) + abs(d.y - thing.y), d) for d in alike)
      assert gap < 0.12 * 2 * thing.r  # the centroid of a triangle is not the center of its box
      assert nearest.r == pytest.approx(thing.r, rel=0.1)


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, "JPEG", quality=quality)
  return np.asarray(Image.open(buffer))


DAMAGE = {  # the least share of pictures in which every object, and nothing else, is found
  "noise 16": (lambda image, rng: noisy(image, 16, rng), 0.99),
  "blur 1.5": (lambda image, rng: blurred(image, 1.5), 0.98),
  "jpeg 50": (lambda image, rng: as_jpeg(image, 50), 0.96),  # 0.984 of 900
  "half size": (lambda image, rng: noisy(halved(image), 8, rng), 0.99),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_seen_through(name):
  damage, least = DAMAGE[name]
  right = []
  for i, (scene, _) in enumerate(drawn("val", 25)):
    image = damage(scene.render(SIDE), np.random.default_rng(i))
    right.append(classes(judge.detect(image)) == classes(scene.objects))
  assert np.mean(right) >= least


def test_pictures_of_a_codec_are_judged():
  codec = PatchCodec([scene.render(SIDE) for scene, _ in drawn("train", 50)], 64)
  accepted, wrongly, whole = [], [], []
  chance = random.Random(1)
  for i, (scene, metadata) in enumerate(drawn("val", 30)):
    rng = np.random.default_rng(i)
    image = codec(scene.render(SIDE), 0.05, rng)
    found = judge.detect(noisy(blotched(blurred(image, 0.5), 6, rng), 4, rng))
    accepted.append(judge.lenient(found, metadata))
    wrongly.append(judge.lenient(found, falsified(metadata, chance)))
    whole.append(judge.strict(found, metadata))
  assert np.mean(accepted) >= 0.99 and np.mean(wrongly) <= 0.005 and np.mean(whole) >= 0.97


def test_touching_objects_are_told_apart():
  rng = random.Random(2)
  right = []
  for same_color in [True, False] * 40:
    a, b = rng.choice(SHAPES), rng.choice(SHAPES)
    color, other = rng.sample(list(COLORS), 2)
    other = color if same_color else other
    things = (Object(a, color, "small", 0.35, 0.5, 0.15), Object(b, other, "small", 0.66, 0.52, 0.16))
    scene = Scene(things, 168, (COLORS[color], COLORS[other]))
    right.append(classes(judge.detect(scene.render(SIDE))) == sorted([(a, color), (b, other)]))
  assert np.mean(right) >= 0.95


# --- What is no picture of the world


def blobs(rng: np.random.Generator) -> np.ndarray:
  image = np.full((SIDE, SIDE, 3), 168.0)
  for _ in range(rng.integers(1, 4)):
    field = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), rng.uniform(3, 8))
    image[field > np.quantile(field, rng.uniform(0.85, 0.97))] = rng.integers(0, 256, 3)
  return image


GARBAGE = {  # name -> (how it is made, the largest share that the lenient rules may accept)
  "gray": (lambda rng: np.full((SIDE, SIDE, 3), 168.0), 0.0),
  "flat": (lambda rng: np.ones((SIDE, SIDE, 3)) * rng.integers(0, 256, 3), 0.0),
  "gradient": (lambda rng: np.linspace(0, 255, SIDE)[None, :, None] * np.ones((SIDE, SIDE, 3)), 0.0),
  "noise": (lambda rng: rng.uniform(0, 255, (SIDE, SIDE, 3)), 0.01),
  "blobs": (blobs, 0.05),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_never_passes_the_strict_rules(name):
  make, most = GARBAGE[name]
  scores = [
    judge.score(make(np.random.default_rng(i)).astype(np.uint8), metadata)
    for i, (_, metadata) in enumerate(shapes.evaluation_prompts("val", 90, 0))
  ]
  assert not any(score["strict"] for score in scores)
  assert np.mean([score["lenient"] for score in scores]) <= most


def test_an_unrelated_scene_rarely_passes():
  pairs = drawn("val", 15)
  metadata = [m for _, m in pairs]
  random.Random(3).shuffle(metadata)
  passed = [judge.score(scene.render(SIDE), m)["strict"] for (scene, _), m in zip(pairs, metadata)]
  assert np.mean(passed) < 0.1


@pytest.mark.parametrize(
  "image",
  [
    np.zeros((64, 64), np.uint8),
    np.zeros((64, 48, 3), np.uint8),
    np.zeros((64, 64, 3), np.float32),
    np.zeros((32, 32, 3), np.uint8),
  ],
)
def test_other_arrays_are_refused(image):
  with pytest.raises(ValueError, match="the judge"):
    judge.detect(image)


# --- GenEval's rules, on detections made by hand


def seen(shape: str, color: str = "red", x: float = 0.5, y: float = 0.5, r: float = 0.1, score: float = 0.99):
  return Detection(shape, color, x, y, r, score)


def asked(*include: dict, exclude: tuple[dict, ...] = ()) -> dict:
  return {"include": list(include), "exclude": list(exclude)}


def test_lenient_allows_more_and_strict_does_not():
  star = {"class": "star", "count": 1}
  for found, is_lenient, is_strict in (
    ([], False, False),
    ([seen("star")], True, True),
    ([seen("star"), seen("heart")], True, False),
    ([seen("star"), seen("star")], True, False),
    ([seen("star"), seen(judge.UNKNOWN)], True, False),
    ([seen(judge.UNKNOWN)], False, False),
  ):
    assert judge.lenient(found, asked(star)) == is_lenient and judge.strict(found, asked(star)) == is_strict


def test_exclude_limits_a_count():
  metadata = asked({"class": "star", "count": 2}, exclude=({"class": "star", "count": 3},))
  assert [judge.lenient([seen("star")] * n, metadata) for n in range(5)] == [False, False, True, False, False]


def test_only_the_surest_objects_of_a_class_are_asked_for_their_color():
  metadata = asked({"class": "star", "count": 1, "color": "red"})
  assert judge.lenient([seen("star", "red"), seen("star", "blue")], metadata)
  assert not judge.lenient([seen("star", "blue"), seen("star", "red")], metadata)
  two = asked({"class": "star", "count": 2, "color": "red"})
  assert not judge.lenient([seen("star", "red"), seen("star", "blue")], two)


def test_position_refers_to_an_object_included_before():
  metadata = asked({"class": "heart", "count": 1}, {"class": "star", "count": 1, "position": ["left of", 0]})
  assert judge.lenient([seen("star", x=0.2), seen("heart", x=0.8)], metadata)
  assert not judge.lenient([seen("star", x=0.8), seen("heart", x=0.2)], metadata)
  assert not judge.lenient([seen("star", x=0.2)], metadata)


@pytest.mark.parametrize(
  "a, b, expected",
  [
    ((0.2, 0.5), (0.8, 0.5), {"left of"}),
    ((0.8, 0.5), (0.2, 0.5), {"right of"}),
    ((0.5, 0.1), (0.5, 0.9), {"above"}),
    ((0.5, 0.9), (0.5, 0.1), {"below"}),
    ((0.2, 0.2), (0.8, 0.8), {"left of", "above"}),
    ((0.50, 0.5), (0.53, 0.5), set()),  # within a tenth of the two widths
    # Offset (0.06, 0.20), of which 0.04 is taken off: cosine of the direction below a half along x.
    ((0.56, 0.7), (0.50, 0.5), {"below"}),
    # Offset (0.08, 0): half of it is left after 0.04, and a half is not more than the least cosine.
    ((0.58, 0.5), (0.50, 0.5), set()),
    ((0.59, 0.5), (0.50, 0.5), {"right of"}),
  ],
)
def test_relations_are_those_of_geneval(a, b, expected):
  assert judge.relations(seen("star", x=a[0], y=a[1]), seen("heart", x=b[0], y=b[1])) == expected


def test_lab_of_known_colors():
  colors = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255.0]])
  expected = [[100, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]]
  np.testing.assert_allclose(judge.lab(colors), expected, atol=0.02)
