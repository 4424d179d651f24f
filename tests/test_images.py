"""Images: golden preprocessing, conversion rules, refusals."""

import collections
import io
import json
import os
import pathlib
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from jflow.data import images
from jflow.data.images import ImageError
from jflow.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "processor"


def _encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, format, **options)
  return buffer.getvalue()


def _gradient(width: int, height: int) -> np.ndarray:
  """Returns uint8[height, width, 3] whose red is the column and green the row."""
  pixels = np.zeros((height, width, 3), np.uint8)
  pixels[..., 0], pixels[..., 1] = np.meshgrid(np.arange(width), np.arange(height))
  return pixels


def _golden_images():
  arrays = np.load(GOLDEN / "golden.npz")
  for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]:
    names = [name for turn in case["conversation"] for name in turn.get("images", [])]
    for index, name in enumerate(names):
      yield pytest.param(name, arrays[case["name"] + "/pixel_values"][index], id=f"{case['name']}-{name}")


@pytest.mark.parametrize("name, expected", list(_golden_images()))
def test_understanding_reproduces_the_release(name, expected):
  pixels = images.for_understanding((GOLDEN / name).read_bytes(), 48)
  assert pixels.dtype == np.uint8
  np.testing.assert_allclose((pixels / 255 - 0.5) / 0.5, expected.transpose(1, 2, 0), rtol=0, atol=1e-6)


def test_arrays_bytes_and_pictures_are_the_same_image():
  pixels = _gradient(100, 60)
  forms = [
    pixels,
    _encode(Image.fromarray(pixels)),
    Image.fromarray(pixels),
    _encode(Image.fromarray(pixels), "WEBP", lossless=True),
  ]
  for form in forms:
    np.testing.assert_array_equal(images.decode(form), pixels)
    np.testing.assert_array_equal(images.for_understanding(form, 32), images.for_understanding(pixels, 32))


def test_understanding_pads_with_grey_and_keeps_the_aspect():
  square = images.for_understanding(np.full((30, 60, 3), 255, np.uint8), 40)
  assert (square[:10] == 127).all() and (square[10:30] == 255).all() and (square[30:] == 127).all()


def test_generation_cuts_a_square_inside_the_picture():
  wide = _gradient(200, 50)
  lefts = []
  for seed in range(40):
    crop = images.for_generation(wide, 50, np.random.default_rng(seed))
    left = int(crop[0, 0, 0])
    np.testing.assert_array_equal(crop, wide[:, left : left + 50])  # side 50 to 50: no resampling
    lefts.append(left)
  assert min(lefts) < 30 and max(lefts) > 120
  tall = np.ascontiguousarray(wide.transpose(1, 0, 2))
  crop = images.for_generation(tall, 50, np.random.default_rng(0))
  top = int(crop[0, 0, 0])
  np.testing.assert_array_equal(crop, tall[top : top + 50])


def test_generation_resizes_the_whole_of_a_square():
  pixels = _gradient(90, 90)
  expected = np.asarray(Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(images.for_generation(pixels, 24, np.random.default_rng(1)), expected)


def test_generation_survives_a_sliver():
  assert images.for_generation(np.zeros((1, 5000, 3), np.uint8), 16, np.random.default_rng(0)).shape == (
    16,
    16,
    3,
  )


class Drawn:
  def render(self, size):
    return np.full((size, size, 3), 7, np.uint8)


def test_what_renders_itself_is_drawn_at_the_size():
  assert (images.for_understanding(Drawn(), 12) == np.full((12, 12, 3), 7)).all()
  assert (images.for_generation(Drawn(), 12, np.random.default_rng(0)) == np.full((12, 12, 3), 7)).all()


def test_exif_rotation_is_applied():
  pixels = _gradient(40, 20)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
  np.testing.assert_array_equal(
    images.decode(_encode(Image.fromarray(pixels), exif=exif)), np.rot90(pixels, -1)
  )


def test_alpha_is_laid_over_white():
  rgba = np.zeros((4, 4, 4), np.uint8)
  rgba[:, 2:] = (10, 20, 30, 255)
  pixels = images.decode(_encode(Image.fromarray(rgba)))
  assert (pixels[:, :2] == 255).all() and (pixels[:, 2:] == (10, 20, 30)).all()
  grey = np.full((4, 4, 2), (100, 0), np.uint8)
  assert (images.decode(_encode(Image.fromarray(grey, "LA"))) == 255).all()


def test_palette_with_and_without_transparency():
  picture = Image.new("P", (4, 4))
  picture.putpalette([0, 0, 0, 200, 100, 50])
  picture.putpixel((1, 0), 1)
  plain, clear = images.decode(_encode(picture)), images.decode(_encode(picture, transparency=0))
  assert tuple(plain[0, 1]) == (200, 100, 50) and tuple(plain[0, 0]) == (0, 0, 0)
  assert tuple(clear[0, 1]) == (200, 100, 50) and tuple(clear[0, 0]) == (255, 255, 255)


def test_sixteen_bits_keep_the_upper_eight():
  values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)
  pixels = images.decode(_encode(Image.fromarray(values)))
  assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255] and (pixels == pixels[..., :1]).all()


def test_grey_bilevel_and_cmyk():
  assert (images.decode(_encode(Image.new("L", (3, 3), 77))) == 77).all()
  assert (images.decode(_encode(Image.new("1", (3, 3), 1))) == 255).all()
  red = images.decode(_encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
  assert (red[..., 0] > 200).all() and (red[..., 1:] < 60).all()


def test_an_animation_gives_its_first_frame():
  frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
  for format in ("PNG", "WEBP", "GIF"):
    data = _encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert (images.decode(data) == (255, 0, 0)).all()


def _png_header(width: int, height: int) -> bytes:
  def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(
  "data, reason",
  [
    (b"", "empty"),
    (b"hello", "format"),
    (_encode(Image.new("RGB", (8, 8)), "TIFF"), "format"),
    (_encode(Image.new("RGB", (8, 8)), "BMP"), "format"),
    (_png_header(20_000, 20_000), "too_large"),
    (_png_header(9_000, 9_000), "too_large"),
    (_png_header(2**31 - 1, 2**31 - 1), "too_large"),
    (_png_header(50, 50), "unreadable"),
    (_encode(Image.effect_noise((64, 64), 50), "JPEG")[:-1000], "unreadable"),
    (np.zeros((4, 4), np.uint8), "format"),
    (np.zeros((4, 4, 3), np.float32), "format"),
    (np.zeros((0, 4, 3), np.uint8), "format"),
    (3, "format"),
  ],
  ids=[
    "empty",
    "text",
    "tiff",
    "bmp",
    "400M",
    "81M",
    "huge",
    "no-pixels",
    "truncated",
    "grey-array",
    "float-array",
    "no-rows",
    "number",
  ],
)
def test_what_cannot_be_used_has_a_reason(data, reason):
  for use in (
    images.decode,
    lambda x: images.for_understanding(x, 16),
    lambda x: images.for_generation(x, 16, np.random.default_rng(0)),
  ):
    with pytest.raises(ImageError) as caught:
      use(data)
    assert caught.value.reason == reason and "\n" not in str(caught.value)


def _resident() -> float:
  """Megabytes of memory that this process holds."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(
  not os.path.exists("/proc/self/statm"), reason="reads the memory of a process as Linux shows it"
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
def test_damaged_images_raise_nothing_else(capsys):
  """S5: 9,000 mutated images; only our error comes out, and no memory stays behind."""
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8))
  exif = Image.Exif()
  exif[0x0112] = 3
  frames = [Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)) for _ in range(3)]
  originals = [
    _encode(picture, "PNG", exif=exif),
    _encode(picture, "JPEG", exif=exif),
    _encode(picture, "WEBP"),
    _encode(picture.convert("P")),
    _encode(picture.convert("CMYK"), "JPEG", progressive=True),
    _encode(frames[0], "GIF", save_all=True, append_images=frames[1:]),
  ]
  outcomes, memory = collections.Counter(), []
  for _ in range(1500):
    for original in originals:
      data = np.frombuffer(original, np.uint8).copy()
      places = rng.integers(0, min(len(data), rng.choice([64, len(data)])), rng.integers(1, 6))
      data[places] = rng.integers(0, 256, len(places))
      data = data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data
      try:
        pixels = images.decode(data.tobytes(), max_pixels=2**18)
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
        outcomes["decoded"] += 1
      except ImageError as error:
        outcomes[error.reason] += 1
    memory.append(_resident())
  grown = max(memory[-100:]) - max(memory[:300])
  assert outcomes.total() == 9000 and min(outcomes[r] for r in ("decoded", "format", "unreadable")) > 300
  assert grown < 16
  with capsys.disabled():
    print(
      f"\nS5 mutated images 9,000: escaped 0, {dict(outcomes)}, memory {grown:+.1f} MB after the first 1,800"
    )


def test_read_names_the_file(tmp_path):
  with pytest.raises(UserError, match="nothing.png not found"):
    images.read(str(tmp_path / "nothing.png"))
  (tmp_path / "broken.png").write_bytes(b"x")
  with pytest.raises(UserError, match="broken.png"):
    images.read(str(tmp_path / "broken.png"))
  np.testing.assert_array_equal(
    images.read(str(GOLDEN / "wide.png")), np.asarray(Image.open(GOLDEN / "wide.png"))
  )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_square_of_a_large_jpeg_is_that_of_the_whole_picture(orientation):
  """Decoded at a half or a quarter, whatever its rotation; nearly the pixels of the full decode."""
  rng = np.random.default_rng(orientation)
  soft = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize(
    (421, 307), Image.Resampling.BICUBIC
  )
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  buffer = io.BytesIO()
  soft.save(buffer, "JPEG", quality=95, exif=exif)
  upright = Image.fromarray(images.decode(buffer.getvalue()))
  for size in (48, 100, 153, 200):
    box = images.random_square(buffer.getvalue(), np.random.default_rng(size))
    left, top, side = box
    assert side == min(upright.size) and left + side <= upright.width and top + side <= upright.height
    got = images.square(buffer.getvalue(), size, box)
    np.testing.assert_array_equal(
      got, images.for_generation(buffer.getvalue(), size, np.random.default_rng(size))
    )
    edges = (left, top, left + side, top + side)
    whole = np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC, box=edges))
    assert np.abs(got.astype(int) - whole).mean() < 1.5
    moved = (max(left - 12, 0), top, side) if left > 12 else (left, max(top - 12, 0), side)
    if moved != box:
      assert np.abs(images.square(buffer.getvalue(), size, moved).astype(int) - whole).mean() > 3


def test_a_square_outside_the_picture_is_refused():
  for box in ((0, 0, 9), (-1, 0, 8), (5, 0, 8), (0, 1, 8), (0, 0, 0)):
    with pytest.raises(images.ImageError) as caught:
      images.square(_gradient(12, 8), 4, box)
    assert caught.value.reason == "crop"
