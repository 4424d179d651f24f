"""Distances between sets of images: the Frechet distance, a kernel distance, and the preprocessing for Inception."""

import numpy as np
from PIL import Image


def frechet(a: np.ndarray, b: np.ndarray) -> float:
  """The Frechet distance of two normal distributions, |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2).

  The trace of the root comes from the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric: always real, and exact
  where a covariance is singular. The estimate is biased upwards for few samples: compare at equal numbers only.

  Args:
    a, b: float[n, D] and float[m, D], features; n and m at least 2.
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
  """Features standardised by the reference's mean and deviation, so that each dimension has equal weight."""
  return (features - reference.mean(0)) / np.maximum(reference.std(0), least)


def inception_input(image: Image.Image, side: int = 256, lanczos: bool = True) -> np.ndarray:
  """An image preprocessed for Inception as in GigaGAN's evaluation, which the paper's FID uses.

  RGB, center crop to a square, Lanczos to `side` with 8 bits per channel (an author of the paper says bicubic where the
  script has Lanczos: report both), then as in clean-fid: each channel bicubic to 299 in float32, clipped to [0, 255],
  not rounded. The crop's offset rounds halves to even, as torchvision's does.

  Args:
    image: any size and mode.
    side: of the intermediate image, in pixels.
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
    Image.fromarray(np.asarray(square)[..., c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    for c in range(3)
  ]
  return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=-1)
