"""The judge of the world: detects the objects of a picture and scores it by GenEval's rules.

It has no learned weights: it fits a surface to the background, and finds connected regions, the nearest color of the
palette, and the best of a set of drawn templates. It works at 48 to 96 pixels; larger pictures are reduced to 96.
"""

import collections
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from scipy.cluster import vq

from jflow.world import scenes
from jflow.world.scenes import COLORS, SHAPES

UNKNOWN = "unknown"
LEAST_SIDE, MOST_SIDE = 48, 96  # pixels
LEAST_SCORE = 0.93  # correlation with the best template below which a shape is unknown
LEAST_AREA = 26 / 64**2  # of a region, as a share of the picture
# A region is an object if its upper quartile's distance in Lab from the background is above STRONG; below FAINT it is
# not, and in between only if its lower quartile is at most OFF_COLOR from the palette.
FAINT, STRONG, OFF_COLOR = 20.0, 30.0, 18.0
THRESHOLD = 13.0  # least distance of an object's pixel from the background, in Lab
RESIDUALS = 2.6  # the same in residuals of the background, where that is more
CORE = 15.0  # largest distance in Lab of a pixel to a color of the palette that it is assigned to with certainty
NOISE = 3.0  # standard deviation of the noise, of 255, above which the picture is smoothed
HALO = 3  # pixels around a region that may belong to its soft edge
PATCH, REACH = 24, 2.4  # pixels of a patch; half its side in standard deviations of the region
# GenEval's constants: share of both widths or heights that an offset must exceed, least cosine of a direction.
POSITION_THRESHOLD, LEAST_COSINE = 0.1, 0.5


class Detection(NamedTuple):
  """A detected object. Lengths are fractions of the picture's side, x to the right and y down."""

  shape: str  # of SHAPES, or UNKNOWN
  color: str  # of COLORS
  x: float
  y: float
  r: float  # half the side of its box
  score: float  # correlation with the best template, at most 1


def detect(image: np.ndarray) -> list[Detection]:
  """Detects the objects of a picture, in descending order of score.

  Args:
    image: uint8[S, S, 3], RGB, S at least 48.

  Raises:
    ValueError: the picture has another shape or type, or is too small.
  """
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
    raise ValueError(f"a picture must be uint8[S, S, 3], got {image.dtype}{list(image.shape)}")
  if image.shape[0] < LEAST_SIDE:
    raise ValueError(f"a picture must have at least {LEAST_SIDE} pixels a side, got {image.shape[0]}")
  if image.shape[0] > MOST_SIDE:
    image = np.asarray(Image.fromarray(image).resize((MOST_SIDE, MOST_SIDE), Image.Resampling.BOX))
  pixels = image.astype(np.float64)
  noise = _noise(pixels)
  if noise > NOISE:
    smoothing = min(1.1, 0.45 + noise / 40)
    pixels = ndimage.gaussian_filter(pixels, (smoothing, smoothing, 0), mode="nearest")
  background, distance, threshold = _background(pixels)
  regions = _regions(lab(pixels), distance, threshold)
  apart, nearest = ndimage.distance_transform_edt(regions == 0, return_indices=True)
  territory = np.where(apart <= HALO, regions[tuple(nearest)], 0)
  found = []
  for number in range(1, regions.max() + 1):
    found += _recognize(pixels, background, distance, regions == number, territory == number)
  return sorted(found, key=lambda detection: -detection.score)


def score(image: np.ndarray, metadata: Mapping[str, Any]) -> dict[str, bool]:
  """Scores a picture against the metadata of its prompt.

  Args:
    image: see `detect`.
    metadata: in GenEval's schema, as from `jflow.world.source.evaluation_prompts`.

  Returns:
    "lenient": by GenEval's rules, which mostly allow more objects than requested; "strict": exactly the requested
    objects and nothing else. Report strict: colored blobs sometimes pass the lenient rules.
  """
  detections = detect(image)
  return {"lenient": lenient(detections, metadata), "strict": strict(detections, metadata)}


def lenient(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> bool:
  """Returns whether GenEval's rules accept the detections, which must be in descending order of score."""
  by_class = collections.defaultdict(list)
  for detection in detections:
    by_class[detection.shape].append(detection)
  groups: list[list[Detection]] = []
  for wanted in metadata["include"]:
    group = by_class[wanted["class"]][: wanted["count"]]
    if len(group) < wanted["count"]:
      return False
    if "color" in wanted and any(detection.color != wanted["color"] for detection in group):
      return False
    if not _placed(group, wanted, groups):
      return False
    groups.append(group)
  return all(len(by_class[limit["class"]]) < limit["count"] for limit in metadata.get("exclude", ()))


def strict(detections: Sequence[Detection], metadata: Mapping[str, Any]) -> bool:
  """Returns whether the detections are exactly the requested objects: same counts, nothing else, nothing unknown."""
  total = sum(wanted["count"] for wanted in metadata["include"])
  return len(detections) == total and lenient(detections, metadata)


def relations(a: Detection, b: Detection) -> set[str]:
  """Returns the relations of `a` to `b` by GenEval's rule: none, one or two of left of, right of, above, below."""
  offset = np.array([a.x - b.x, a.y - b.y])
  beyond = np.sign(offset) * np.maximum(np.abs(offset) - POSITION_THRESHOLD * 2 * (a.r + b.r), 0)
  if np.all(np.abs(beyond) < 1e-6):
    return set()
  direction = beyond / np.linalg.norm(offset)
  return {name for name, (axis, sign) in scenes.RELATIONS.items() if sign * direction[axis] > LEAST_COSINE}


def lab(rgb: np.ndarray) -> np.ndarray:
  """Converts sRGB in [0, 255] to CIE Lab under D65, float[..., 3]."""
  value = np.clip(rgb, 0, 255) / 255
  linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
  xyz = linear @ _SRGB_TO_XYZ
  root = np.where(xyz > 216 / 24389, np.cbrt(xyz), xyz * (24389 / 27 / 116) + 16 / 116)
  return np.stack(
    [116 * root[..., 1] - 16, 500 * (root[..., 0] - root[..., 1]), 200 * (root[..., 1] - root[..., 2])], -1
  )


def _placed(group: Sequence[Detection], wanted: Mapping[str, Any], groups: Sequence[Sequence[Detection]]) -> bool:
  if "position" not in wanted:
    return True
  name, target = wanted["position"]
  return all(name in relations(a, b) for a in group for b in groups[target])


def _noise(pixels: np.ndarray) -> float:
  """Returns the standard deviation of the noise, estimated from second differences to be robust against edges."""
  second = np.concatenate([np.diff(pixels, 2, 0).ravel(), np.diff(pixels, 2, 1).ravel()])
  return float(np.median(np.abs(second)) / 0.6745 / 6**0.5)


def _background(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
  """Fits a quadratic surface to the border, then to all pixels close to it.

  Returns:
    The surface float[S, S, 3], the distance of each pixel from it in Lab float[S, S], and the distance above
    which a pixel belongs to an object.
  """
  side = len(pixels)
  basis = _surfaces(side)
  flat, colors = pixels.reshape(-1, 3), lab(pixels)
  agree = np.ones((side, side), bool)
  agree[2:-2, 2:-2] = False
  for _ in range(4):
    chosen = basis[agree.ravel()]
    weights = np.linalg.lstsq(chosen.T @ chosen, chosen.T @ flat[agree.ravel()], rcond=None)[0]
    background = (basis @ weights).reshape(pixels.shape)
    distance = np.linalg.norm(colors - lab(background), axis=-1)
    # The root mean square of a normal error in three dimensions is 1.126 times its median.
    threshold = max(THRESHOLD, RESIDUALS * 1.126 * float(np.median(distance[agree])))
    agree = distance < threshold
    if agree.mean() < 0.2:
      break
  return background, distance, threshold


def _regions(colors: np.ndarray, distance: np.ndarray, threshold: float) -> np.ndarray:
  """Returns int[S, S]: 0 for the background, 1, 2, ... for regions of one color each."""
  least_area = LEAST_AREA * distance.size
  to_palette = np.linalg.norm(colors[..., None, :] - _palette(), axis=-1)
  kind, off_palette = to_palette.argmin(-1), to_palette.min(-1)
  sure = off_palette < CORE
  mask, count = ndimage.label(ndimage.binary_opening(distance > threshold))
  regions = np.zeros(distance.shape, np.int64)
  number = 0
  for component in range(1, count + 1):
    inside = mask == component
    cores = [inside & sure & (kind == color) for color in np.unique(kind[inside & sure])]
    cores = [core for core in cores if ndimage.binary_opening(core).sum() >= least_area / 2]
    if len(cores) > 1:
      owner = np.argmin([ndimage.distance_transform_edt(~core) for core in cores], 0)
    else:
      owner = np.zeros(distance.shape, np.int64)
    for part in range(max(1, len(cores))):
      pieces, piece_count = ndimage.label(inside & (owner == part))
      for piece in range(1, piece_count + 1):
        region = pieces == piece
        if region.sum() < least_area:
          continue
        # Background blotches are faint and have no color of the palette.
        strength, off = np.percentile(distance[region], 75), np.percentile(off_palette[region], 25)
        if strength >= STRONG or strength >= FAINT and off < OFF_COLOR:
          number += 1
          regions[region] = number
  return regions


def _recognize(
  pixels: np.ndarray, background: np.ndarray, distance: np.ndarray, region: np.ndarray, territory: np.ndarray
) -> list[Detection]:
  """Returns the object of a region, or the objects if it consists of several that touch."""
  # The pixels furthest from the background are least affected by blur and coarse chroma.
  far = region & (distance >= np.percentile(distance[region], 67))
  fill = np.median(pixels[far], 0)
  color = tuple(COLORS)[int(np.linalg.norm(_palette() - lab(fill), axis=-1).argmin())]
  axis = fill - background
  share = ((pixels - background) * axis).sum(-1) / np.maximum((axis**2).sum(-1), 1.0)
  alpha = np.clip(share, 0, 1) * territory
  whole = _match(alpha, color)
  if whole.score >= LEAST_SCORE:
    return [whole]
  best, best_score = [whole], LEAST_SCORE
  for cut in _cuts(region, alpha):
    parts = [_match(piece, color) for piece in cut]
    least = min(part.score for part in parts)
    if least >= best_score:
      best, best_score = parts, least
  return best


def _cuts(region: np.ndarray, alpha: np.ndarray) -> list[list[np.ndarray]]:
  """Returns ways to cut a region into 2, 3 and 4 compact parts, each large enough: their alphas."""
  points = np.argwhere(region & (alpha > 0.5)).astype(np.float64)
  depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(region & (alpha > 0.5)), 1.0)
  peaks = np.argwhere((depth == ndimage.maximum_filter(depth, 5)) & (depth > 1))
  peaks = peaks[np.argsort(-depth[tuple(peaks.T)], kind="stable")]
  cuts = []
  for count in range(2, 5):
    if len(peaks) < count or len(points) < count * LEAST_AREA * region.size:
      break
    centers = vq.kmeans2(points, peaks[:count].astype(np.float64), iter=20, minit="matrix")[0]
    grid = np.indices(region.shape).transpose(1, 2, 0)
    owner = np.linalg.norm(grid[:, :, None] - centers, axis=-1).argmin(-1)
    cuts.append([alpha * (owner == part) for part in range(count)])
  return cuts


def _match(alpha: np.ndarray, color: str) -> Detection:
  """Returns the detection of the template most similar to a soft mask, float[S, S] in [0, 1]."""
  patch, y, x, spread = _canonical(alpha)
  patches, names, radii = _templates()
  similarity = patches @ patch
  best = int(similarity.argmax())
  value, side = float(similarity[best]), len(alpha)
  shape = names[best] if value >= LEAST_SCORE else UNKNOWN
  return Detection(shape, color, (x + 0.5) / side, (y + 0.5) / side, radii[best] * spread / side, value)


def _canonical(alpha: np.ndarray) -> tuple[np.ndarray, float, float, float]:
  """Normalises a soft mask to a common place and size.

  Returns:
    The patch float[PATCH * PATCH] of mean 0 and norm 1 (0 if the mask is flat), its center y and x in pixels,
    and its spread: the root mean square distance from the center.
  """
  rows, columns = np.arange(alpha.shape[0]), np.arange(alpha.shape[1])
  total = max(float(alpha.sum()), 1e-6)
  over_rows, over_columns = alpha.sum(1) / total, alpha.sum(0) / total
  y, x = float(over_rows @ rows), float(over_columns @ columns)
  spread = float(over_rows @ (rows - y) ** 2 + over_columns @ (columns - x) ** 2) ** 0.5
  step = REACH * spread * (2 * np.arange(PATCH) + 1 - PATCH) / PATCH
  patch = ndimage.map_coordinates(alpha, np.meshgrid(y + step, x + step, indexing="ij"), order=1).ravel()
  patch -= patch.mean()
  return patch / max(float(np.linalg.norm(patch)), 1e-6), y, x, spread


@functools.cache
def _templates() -> tuple[np.ndarray, tuple[str, ...], tuple[float, ...]]:
  """Returns the templates float[T, PATCH * PATCH], and the shape and the radius in spreads of each.

  Each shape has four sizes, three blurs and three rotations of at most 12 degrees.
  """
  side = 64
  patches, names, radii = [], [], []
  for shape in SHAPES:
    for r in (6.0, 8.6, 11.5, 15.0):
      thing = scenes.Object(shape, "black", "small", 0.5, 0.5, r / side)
      drawn = scenes.Scene((thing,), 255, ((0, 0, 0),)).render(side)[..., 0]
      for degrees in (-12, 0, 12):
        turned = ndimage.rotate(1 - drawn / 255, degrees, reshape=False, order=1)
        for blur in (0.3, 0.9, 1.7):
          patch, _, _, spread = _canonical(ndimage.gaussian_filter(turned, blur))
          patches.append(patch)
          names.append(shape)
          radii.append(r / spread)
  return np.stack(patches), tuple(names), tuple(radii)


@functools.cache
def _palette() -> np.ndarray:
  return lab(np.array(list(COLORS.values()), np.float64))


@functools.cache
def _surfaces(side: int) -> np.ndarray:
  """Returns float[side * side, 6]: the monomials of degree at most 2 over the picture."""
  y, x = (axis.ravel() for axis in np.indices((side, side)) / side - 0.5)
  return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 1)


# Rows sRGB, columns XYZ, divided by the white point of D65.
_SRGB_TO_XYZ = np.array(
  [
    [0.4124564, 0.2126729, 0.0193339],
    [0.3575761, 0.7151522, 0.1191920],
    [0.1804375, 0.0721750, 0.9503041],
  ]
) / np.array([0.95047, 1.0, 1.08883])
