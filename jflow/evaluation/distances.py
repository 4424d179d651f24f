"""Distances between sets of pictures: the Frechet distance, a kernel distance, and what they are measured on.

The features of the built-in world need no weights. Their distances are not comparable with an FID, which is the Frechet
distance on features of one Inception network only.
"""

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image
from scipy import fft

from jflow.data.scenes import COLORS, SHAPES
from jflow.evaluation import judge

TEXTURE_SIDE = 64  # pixels; pictures of another size are brought to it
_FREQUENCIES, _ANGLES = (0.08, 0.16, 0.28), 4  # cycles per pixel; angles in half a turn
LEAST_STATE = 0.25  # of a feature's deviation, so that what hardly varies in the state does not count for much
_OPPONENT = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]]) / np.array([[3.0], [1.0], [1.0]])


def frechet(a: np.ndarray, b: np.ndarray) -> float:
  """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2), the Frechet distance of two normal distributions.

  The trace of the root comes from the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric: always real, and exact
  where a covariance is singular. It is biased upwards for few pictures: compare at equal numbers only.

  Args:
    a, b: float[n, D] and float[m, D], features; two at least of each.
  """
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  cov_a, cov_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
  values, vectors = np.linalg.eigh(cov_a)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0)).sum()
  return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
  """The squared maximum mean discrepancy with the kernel (x y / D + 1)^3, unbiased: 0 on average for equal sets."""
  kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
  within = lambda x: (kernel(x, x).sum() - np.trace(kernel(x, x))) / (len(x) * (len(x) - 1))
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def normalised(features: np.ndarray, reference: np.ndarray, least: float = 1e-6) -> np.ndarray:
  """Features about the reference's mean in its deviations, so that each counts alike."""
  return (features - reference.mean(0)) / np.maximum(reference.std(0), least)


def texture(image: np.ndarray) -> np.ndarray:
  """What Gabor filters see: texture, noise, edges and layout, but not which shape is missing.

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
  """What the judge finds: content, but not noise or blur.

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


def inception_input(image: Image.Image, side: int = 256, lanczos: bool = True) -> np.ndarray:
  """A picture as GigaGAN's evaluation hands it to Inception, on which the paper's FID rests.

  RGB, the middle square, Lanczos to `side` with 8 bits per channel (an author of the paper says bicubic where the
  script has Lanczos: report both), then as clean-fid does: each channel bicubic to 299 in float32, cut to [0, 255], not
  rounded. An odd pixel too many falls to either side, as torchvision's crop rounds halves to even.

  Args:
    image: any size and mode.
    side: of the comparison, in pixels.
    lanczos: False takes bicubic.

  Returns:
    f32[299, 299, 3], in [0, 255]; the network takes (x - 128) / 128.
  """
  image = image.convert("RGB")
  short = min(image.size)
  left, top = (round((length - short) / 2) for length in image.size)
  square = image.crop((left, top, left + short, top + short))
  if short != side:
    square = square.resize((side, side), Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC)
  channels = [
    Image.fromarray(np.asarray(square)[..., c].astype(np.float32)).resize(
      (299, 299), Image.Resampling.BICUBIC
    )
    for c in range(3)
  ]
  return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=-1)


@functools.cache
def _gabor() -> np.ndarray:
  """float[12, S, S]: Gaussian bumps in the frequency plane, one side only, so that the response has an envelope."""
  fy, fx = np.meshgrid(fft.fftfreq(TEXTURE_SIDE), fft.fftfreq(TEXTURE_SIDE), indexing="ij")
  filters = []
  for frequency in _FREQUENCIES:
    for angle in np.pi * np.arange(_ANGLES) / _ANGLES:
      offset = (fx - frequency * np.cos(angle)) ** 2 + (fy - frequency * np.sin(angle)) ** 2
      filters.append(np.exp(-offset / (2 * (frequency / 2.5) ** 2)))
  return np.stack(filters)
