"""Features of pictures without learned weights, for distances within the world.

Their distances are not comparable with an FID, which is defined by the features of one Inception network.
"""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import fft

from jflow.world import judge
from jflow.world.scenes import COLORS, SHAPES

TEXTURE_SIDE = 64  # pixels; pictures of another size are resized to it
_FREQUENCIES, _ANGLES = (0.08, 0.16, 0.28), 4  # cycles per pixel; angles in half a turn
LEAST_STATE = 0.25  # least deviation of a state feature, so that nearly constant ones get little weight
_OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]]) / np.array([[3.0], [1.0], [1.0]])


def stacked(
  kinds: Sequence[str], images: Sequence[np.ndarray], found: Sequence[Sequence[judge.Detection]] | None = None
) -> dict[str, np.ndarray]:
  """Features of pictures by kind: "tex" f64[pictures, 228], "state" f64[pictures, 24].

  Args:
    kinds: of features.
    images: uint8[S, S, 3] each.
    found: what the judge detects in each; None: it is asked.
  """
  out = {}
  if "tex" in kinds:
    out["tex"] = np.stack([texture(image) for image in images])
  if "state" in kinds:
    out["state"] = np.stack([state(one) for one in (map(judge.detect, images) if found is None else found)])
  return out


def texture(image: np.ndarray) -> np.ndarray:
  """Responses of Gabor filters, sensitive to texture, noise, edges and layout, but not to which shape is missing.

  Args:
    image: uint8[S, S, 3], RGB.

  Returns:
    float[228]: 3 opponent channels x (12 filters x (4 quarters + deviation) + 4 x 4 means).
  """
  if len(image) != TEXTURE_SIDE:
    image = np.asarray(Image.fromarray(image).resize((TEXTURE_SIDE,) * 2, Image.Resampling.BOX))
  channels = np.einsum("HWc,oc->oHW", image / 255.0, _OPPONENT)
  half = TEXTURE_SIDE // 2
  spectrum = fft.fft2(channels)
  response = np.abs(fft.ifft2(spectrum[:, None] * _gabor()))  # [3, 12, S, S]
  quarters = response.reshape(3, -1, 2, half, 2, half).mean((3, 5)).reshape(-1)
  layout = channels.reshape(3, 4, TEXTURE_SIDE // 4, 4, TEXTURE_SIDE // 4).mean((2, 4))
  return np.concatenate([quarters, response.std((2, 3)).reshape(-1), layout.reshape(-1)])


def state(detections: Sequence[judge.Detection]) -> np.ndarray:
  """Detections of the judge as features, sensitive to content, but not to noise or blur.

  Returns:
    float[24]: sum of scores per shape, number per color, number of objects and of unknown ones, mean and deviation of
    the logarithm of the radius, mean place.
  """
  shapes = [sum(d.score for d in detections if d.shape == shape) for shape in SHAPES]
  colors = [sum(d.color == color for d in detections) for color in COLORS]
  unknown = sum(d.shape == judge.UNKNOWN for d in detections)
  radii = np.log([max(d.r, 1e-3) for d in detections] or [0.15])
  place = np.mean([(d.x, d.y) for d in detections] or [(0.5, 0.5)], axis=0)
  return np.array([*shapes, *colors, len(detections), unknown, radii.mean(), radii.std(), *place], np.float64)


@functools.cache
def _gabor() -> np.ndarray:
  """Gabor filters float[12, S, S] in the frequency plane, one-sided, so that the response has an envelope."""
  fy, fx = np.meshgrid(fft.fftfreq(TEXTURE_SIDE), fft.fftfreq(TEXTURE_SIDE), indexing="ij")
  filters = []
  for frequency in _FREQUENCIES:
    for angle in np.pi * np.arange(_ANGLES) / _ANGLES:
      offset = (fx - frequency * np.cos(angle)) ** 2 + (fy - frequency * np.sin(angle)) ** 2
      filters.append(np.exp(-offset / (2 * (frequency / 2.5) ** 2)))
  return np.stack(filters)
