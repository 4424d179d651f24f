"""Distances against closed forms, SciPy and brute force; GigaGAN's resize against its filters written out."""

import random

import numpy as np
import pytest
import tiny
from PIL import Image
from scipy import linalg, ndimage

from jflow.evaluation import distances
from jflow.world import features, judge, scenes


def test_frechet_of_normal_samples_is_the_closed_form():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)), rng.normal(1, 2, size=(300, 6))
  cov_a, cov_b = np.cov(a.T), np.cov(b.T)
  root = linalg.sqrtm(cov_a @ cov_b).real
  expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
  assert distances.frechet(a, b) == pytest.approx(expected, rel=1e-9)
  assert distances.frechet(b, a) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_one_dimension_and_of_singular_covariances():
  a, b = np.array([[0.0], [2.0]]), np.array([[5.0], [9.0]])  # deviations 2 ** .5 and 8 ** .5
  assert distances.frechet(a, b) == pytest.approx(6**2 + (8**0.5 - 2**0.5) ** 2)
  few = np.random.default_rng(1).normal(size=(5, 40))  # rank 4 of 40
  assert distances.frechet(few, few) == pytest.approx(0, abs=1e-5)
  assert distances.frechet(few, few + 1) == pytest.approx(40, rel=1e-6)


def test_kernel_distance_is_the_sum_over_pairs_and_zero_on_average():
  rng = np.random.default_rng(2)
  a, b = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 1
  k = lambda x, y: (x @ y / 3 + 1) ** 3
  within = lambda x: np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])
  expected = within(a) + within(b) - 2 * np.mean([k(x, y) for x in a for y in b])
  assert distances.kernel_distance(a, b) == pytest.approx(expected)
  drawn = [distances.kernel_distance(*rng.normal(size=(2, 20, 3))) for _ in range(2000)]
  assert abs(np.mean(drawn)) < 4 * np.std(drawn) / 2000**0.5


def renders(count: int, seed: int) -> list[np.ndarray]:
  rng = random.Random(seed)
  return [scenes.sample(scenes.TAGS[i % 6], "val", rng)[0].render(64) for i in range(count)]


def test_texture_sees_noise_and_state_sees_content():
  truth, floor = renders(80, 0), renders(40, 1)
  rng = np.random.default_rng(0)
  noisy = [np.clip(x + rng.normal(0, 8, x.shape), 0, 255).round().astype(np.uint8) for x in floor]
  single = [x for x in renders(100, 2) if len(judge.detect(x)) == 1][:40]
  texture = lambda images: np.stack([features.texture(x) for x in images])
  state = lambda images: np.stack([features.state(judge.detect(x)) for x in images])
  tex = {
    n: distances.frechet(*(distances.normalised(texture(y), texture(truth)) for y in (x, truth)))
    for n, x in (("floor", floor), ("noisy", noisy))
  }
  content = {
    name: distances.kernel_distance(  # unbiased: few pictures suffice
      *(distances.normalised(state(x), state(truth), features.LEAST_STATE) for x in (images, truth))
    )
    for name, images in (("floor", floor), ("noisy", noisy), ("single", single))
  }
  assert texture(truth[:1]).shape == (1, 228) and state(truth[:1]).shape == (1, 24)
  assert tex["noisy"] > 2 * tex["floor"]
  assert abs(content["noisy"] - content["floor"]) < 0.02 and content["single"] > 3 * content["floor"]


def test_texture_of_a_shifted_grating_stays_and_of_a_turned_one_does_not():
  x = np.arange(64)
  wave = lambda phase: (128 + 80 * np.sin(2 * np.pi * 0.15625 * x + phase))[None, :].repeat(64, 0)
  image = lambda plane: np.repeat(plane[..., None], 3, -1).round().astype(np.uint8)
  still, shifted = features.texture(image(wave(0))), features.texture(image(wave(2)))
  turned = features.texture(image(wave(0).T))
  assert np.abs(still - shifted)[:144].max() < 0.05 * np.abs(still[:144]).max()
  assert np.abs(still - turned)[:144].max() > 0.5 * np.abs(still[:144]).max()


def test_state_of_nothing_is_finite():
  assert np.isfinite(features.state([])).all()


# --- GigaGAN's resize


def resampled(plane: np.ndarray, size: int, kernel, support: float, whole: bool) -> np.ndarray:
  """Both passes of an antialiased resize, written out in float64: weights of the scaled kernel, normalised.

  `whole`: rows first, then columns, and 8 bits after each.
  """

  def matrix(old: int) -> np.ndarray:
    scale = old / size
    stretch = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    offset = (np.arange(old) + 0.5 - centers[:, None]) / stretch
    weights = np.where(np.abs(offset) < support, kernel(offset), 0)
    # Taps whose centers lie within the window of whole pixels.
    low, high = np.floor(centers - support * stretch + 0.5), np.floor(centers + support * stretch + 0.5)
    index = np.arange(old)
    weights = np.where((index >= low[:, None]) & (index < high[:, None]), weights, 0)
    return weights / weights.sum(1, keepdims=True)

  keep = lambda x: np.clip(np.round(x), 0, 255) if whole else x
  return keep(matrix(plane.shape[0]) @ keep(plane @ matrix(plane.shape[1]).T))


def cubic(x: np.ndarray) -> np.ndarray:
  x = np.abs(x)
  return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def lanczos(x: np.ndarray) -> np.ndarray:
  return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)


@pytest.mark.parametrize("size", [(256, 256), (384, 384), (503, 300), (200, 333)])
@pytest.mark.parametrize("kind", ["lanczos", "bicubic"])
def test_inception_input_is_the_two_resizes_written_out(size, kind):
  rng = np.random.default_rng(size[0])
  smooth = ndimage.gaussian_filter(rng.normal(size=(size[1], size[0], 3)), (2, 2, 0))
  image = np.clip(128 + 120 * smooth / smooth.std(), 0, 255).round().astype(np.uint8)  # saturated: both ends are cut
  out = distances.inception_input(Image.fromarray(image), lanczos=kind == "lanczos")
  assert out.shape == (299, 299, 3) and out.dtype == np.float32
  short = min(size)
  left, top = {(503, 300): (102, 0), (200, 333): (0, 66)}.get(size, (0, 0))  # 101.5 and 66.5 to even
  square = image[top : top + short, left : left + short].astype(np.float64)
  kernel, support = (lanczos, 3.0) if kind == "lanczos" else (cubic, 2.0)
  for c in range(3):
    plane = square[..., c]
    if short != 256:
      plane = resampled(plane, 256, kernel, support, whole=True)
    expected = np.clip(resampled(plane, 299, cubic, 2.0, whole=False), 0, 255)
    error = np.abs(out[..., c] - expected)
    assert error.max() < 1.5 and error.mean() < 0.02  # fixed-point weights now and then round to another level


def clean_fid_pictures():
  """Ten pictures of noise of random sizes, and the squares of 256 x 256 that GigaGAN's script makes of them."""
  rng = np.random.default_rng(0)
  for _ in range(10):
    width, height = rng.integers(60, 700, 2)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    short = min(image.size)
    left, top = (round((length - short) / 2) for length in image.size)
    square = image.crop((left, top, left + short, top + short))
    yield image, square if short == 256 else square.resize((256, 256), Image.Resampling.LANCZOS)


def test_inception_input_is_what_clean_fid_made():
  """Every 13th pixel of what the library made of the same squares, kept in tests/golden/clean_fid.npz.

  Made once by cleanfid.resize.build_resizer("clean") of clean-fid 0.1.35 with Pillow 12.3.0 and NumPy 2.
  """
  with np.load(tiny.ROOT / "tests" / "golden" / "clean_fid.npz") as golden:
    assert len(golden.files) == 10
    for i, (image, _) in enumerate(clean_fid_pictures()):
      expected = golden[f"{i}_{image.width}x{image.height}"]
      np.testing.assert_allclose(distances.inception_input(image)[::13, ::13], expected, rtol=1e-6, atol=1e-4)


def test_inception_input_is_that_of_clean_fid():
  """With the library installed (JFLOW_PARITY=1); the rest of GigaGAN's script is torchvision's crop and Pillow."""
  pytest.importorskip("torch")
  resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
  for image, square in clean_fid_pictures():
    np.testing.assert_array_equal(distances.inception_input(image), resize(np.asarray(square)))


def test_inception_input_of_gray_and_transparent_pictures_has_three_channels():
  for mode in ("L", "RGBA", "P"):
    assert distances.inception_input(Image.new(mode, (40, 30))).shape == (299, 299, 3)
