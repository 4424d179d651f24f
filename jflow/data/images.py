"""Decoding of untrusted images with limits, and the papers' two ways to preprocess them."""

import io
import os
import re
import warnings
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from jflow import git_lfs
from jflow.data import metadata, tiff
from jflow.data.records import RecordError
from jflow.errors import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_PIXELS = 64 * 2**20
# Most scans of a progressive JPEG: encoders write 10 to 18, and a hundred bytes can add one.
MAX_SCANS = 100
MAX_LARGE_SCANS = 20  # of an image with MAX_PIXELS
_WHITE = (255, 255, 255)
_UPRIGHT = {  # EXIF rotation -> what undoes it
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
_OTHERS = (  # first bytes of files that are often mistaken for one of FORMATS
  (rb"\s*<(?:!doctype html|html)", "a web page"),
  (rb"\s*<(?:\?xml|svg)", "SVG or other XML"),
  (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
  (rb"BM", "BMP"),
  (rb"....ftypavi[fs]", "AVIF"),
  (rb"....ftyp(?:hei[cxms]|mif1|msf1)", "HEIC"),
  (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
  (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
  (rb"8BPS", "Photoshop"),
  (rb"%PDF", "PDF"),
  (rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ", "video"),
)

# Pillow only warns where an image passes its own limit; `decode` raises, and at a lower limit.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data|Truncated File Read", UserWarning)  # a line per image


class ImageError(RecordError):
  """An image that cannot be used. `reason` is one of "empty", "format", "too_large", "unreadable"."""


class _Picture(NamedTuple):
  """An image whose pixels are not decoded yet."""

  image: Image.Image
  orientation: int  # as in EXIF: 1 is upright, 5 to 8 lie on a side


def decode(image: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """Returns the pixels of an image as uint8[H, W, 3], RGB, upright.

  Rules: EXIF rotation is applied; an animated image gives its first frame; alpha is blended with white
  (Differs from the release, which drops it); palette, grey and CMYK are converted by Pillow; of 16 bits the
  upper 8 are kept. The size is checked before any pixel is decoded. Large or broken metadata are ignored; at most
  the rotation is lost.

  Args:
    image: encoded bytes (PNG, JPEG, WEBP or GIF), a PIL image, or uint8[H, W, 3].

  Raises:
    ImageError: the image cannot be used.
  """
  if isinstance(image, np.ndarray):
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
      raise ImageError("format", f"an image array must be uint8[H, W, 3], got {image.dtype}{list(image.shape)}")
    return image
  return np.asarray(_open(image, max_pixels))


def as_published(image: Any) -> Image.Image:
  """Returns an image as the published code opens it: Pillow's RGB, alpha dropped, EXIF ignored. Limits as in `decode`.

  Only pixels are kept, so that no later step rotates it or blends it with white.

  Args:
    image: encoded bytes or a PIL image.

  Raises:
    ImageError: the image cannot be used.
  """
  picture = _header(image, MAX_PIXELS).image
  try:
    return Image.fromarray(np.asarray(picture.convert("RGB")))
  except Exception as error:
    raise _damage(error) from None


def tiff_as_png(data: bytes) -> bytes:
  """Returns a TIFF image as PNG, upright and RGB as by `decode`; other bytes are returned unchanged.

  Raises:
    ImageError: the TIFF is damaged, too large, or of an unsupported form.
  """
  if not tiff.is_tiff(data):
    return data
  try:
    image = Image.open(io.BytesIO(tiff.first_picture(data)), formats=("TIFF",))
  except ValueError as error:
    raise ImageError("unreadable", f"the TIFF {error}") from None
  except Exception as error:  # as in `_from_bytes`
    raise _damage(error) from None
  _check_pixels(image, MAX_PIXELS)
  file = io.BytesIO()
  _load(_Picture(image, 1)).save(file, "PNG")  # Pillow itself applies the rotation of a TIFF
  return file.getvalue()


def read(path: str) -> np.ndarray:
  """Returns the pixels of an image file as uint8[H, W, 3]; see `decode`.

  Raises:
    UserError: the file is missing or is not a readable image.
  """
  if not os.path.isfile(path):
    raise UserError(f"image {path} not found")
  try:
    with open(path, "rb") as file:
      return decode(file.read())
  except (ImageError, OSError) as error:
    raise UserError(f"image {path}: {error}") from None


def for_understanding(
  image: Any,
  size: int,
  background: tuple[int, int, int] = (127, 127, 127),
  min_size: int = 14,
  scaled: bool = False,
) -> np.ndarray:
  """Returns an image to read, uint8[size, size, 3]: long side to `size`, padded to a square.

  Reproduces the release to the bit: Pillow's bicubic on uint8, the short side truncated with a floor of
  `min_size`, the padding centred with its offset rounded down.

  Args:
    image: see `decode`; an object with `render(size)` draws itself at that size.
    size: side in pixels.
    scaled: decode large JPEGs at a fraction of their size, as `square` does; no longer the release's pixels.

  Raises:
    ImageError: the image cannot be used.
  """
  if hasattr(image, "render"):
    return image.render(size)
  header = _header(image, MAX_PIXELS)
  whole = header.image.size
  if scaled and header.orientation == 1:
    header.image.draft(None, _fitted(whole, size, min_size))
    picture = _load(header)
    scale = round(whole[0] / picture.width)
  else:
    picture = _load(header)
    whole, scale = picture.size, 1
  width, height = _fitted(whole, size, min_size)
  picture = _resize(picture, (width, height), (0, 0, whole[0] / scale, whole[1] / scale))
  square = np.empty((size, size, 3), np.uint8)
  square.reshape(size, -1)[:] = np.tile(np.array(background, np.uint8), size)
  left, top = (size - width) // 2, (size - height) // 2
  square[top : top + height, left : left + width] = np.asarray(picture)
  return square


def _fitted(sides: tuple[int, int], size: int, min_size: int) -> tuple[int, int]:
  """The sides of an image whose longer one becomes `size`."""
  width, height = (max(int(side / max(sides) * size), min(min_size, size)) for side in sides)
  return width, height


def for_generation(image: Any, size: int, rng: np.random.Generator, crop: str = "random") -> np.ndarray:
  """Returns an image to generate, uint8[size, size, 3]: its largest square; see `square`.

  Args:
    image: see `decode`; an object with `render(size)` draws itself at that size.
    size: side in pixels.
    rng: chooses the place of the square where it is random.
    crop: "random" (the paper's), "center", or "pad": the whole image with margins, as `for_understanding` has it.

  Raises:
    ImageError: the image cannot be used.
  """
  if hasattr(image, "render"):
    return image.render(size)
  if crop == "pad":
    return for_understanding(image, size)
  picture = _header(image, MAX_PIXELS)
  return _cut(picture, size, _draw_square(picture, rng) if crop == "random" else _central_square(picture))


def random_square(image: Any, rng: np.random.Generator) -> tuple[int, int, int]:
  """Returns the square that `for_generation` cuts out under `rng`: left, top, side in the upright image.

  Raises:
    ImageError: the image cannot be used.
  """
  return _draw_square(_header(image, MAX_PIXELS), rng)


def square(image: Any, size: int, box: tuple[int, int, int]) -> np.ndarray:
  """Returns a square of an image, uint8[size, size, 3], resized with Pillow's bicubic after the cut.

  An upright JPEG at least twice as large as needed is decoded at a half, a quarter or an eighth of its size, which is
  faster and changes pixels by less than 1 of 255 on average.

  Args:
    image: see `decode`.
    size: side in pixels.
    box: left, top, side in the upright image.

  Raises:
    ImageError: the image cannot be used.
  """
  return _cut(_header(image, MAX_PIXELS), size, box)


def _draw_square(picture: _Picture, rng: np.random.Generator) -> tuple[int, int, int]:
  width, height = _upright_size(picture)
  side = min(width, height)
  left = int(rng.integers(width - side + 1))
  top = int(rng.integers(height - side + 1))
  return left, top, side


def _central_square(picture: _Picture) -> tuple[int, int, int]:
  width, height = _upright_size(picture)
  side = min(width, height)
  return (width - side) // 2, (height - side) // 2, side


def _cut(picture: _Picture, size: int, box: tuple[int, int, int]) -> np.ndarray:
  left, top, side = box
  width, height = _upright_size(picture)
  if not (0 < side and 0 <= left <= width - side and 0 <= top <= height - side):
    raise ImageError("crop", f"the square {box} does not lie in the image of {width} x {height}")
  if picture.orientation == 1:
    picture.image.draft(None, tuple(-(-length * size // side) for length in picture.image.size))
  upright = _load(picture)
  scale = round(width / upright.width)
  edges = tuple(edge / scale for edge in (left, top, left + side, top + side))
  return np.asarray(_resize(upright, (size, size), edges))


def _upright_size(picture: _Picture) -> tuple[int, int]:
  """Returns width and height once the EXIF rotation is applied."""
  return picture.image.size[::-1] if picture.orientation >= 5 else picture.image.size


def _resize(picture: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float]) -> Image.Image:
  """Resizes a box of an image by Pillow's bicubic, with the same order of its two passes in every version.

  Pillow 13 begins with the height where that shrinks by more than twice what the width does; older versions always
  begin with the width. The order changes pixels by a level or two, since Pillow rounds between the passes.
  """
  shrinks = picture.width - size[0], picture.height - size[1]
  if shrinks[1] > max(0, 2 * shrinks[0]):
    left, top, right, bottom = box
    picture = picture.resize((picture.width, size[1]), Image.Resampling.BICUBIC, box=(0, top, picture.width, bottom))
    box = (left, 0, right, size[1])
  return picture.resize(size, Image.Resampling.BICUBIC, box=box)


def size(image: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
  """Returns the width and height that the header of an encoded image gives, before any rotation.

  Raises:
    ImageError: see `decode`, but not for "unreadable": the body is not read.
  """
  return _header(image, max_pixels).image.size


def _open(image: Any, max_pixels: int) -> Image.Image:
  """Returns the image as an upright RGB image of Pillow's; see `decode`."""
  return _load(_header(image, max_pixels))


def _header(image: Any, max_pixels: int) -> _Picture:
  """Opens an image: its size is known, its pixels are not decoded yet."""
  if isinstance(image, np.ndarray):
    return _Picture(Image.fromarray(decode(image)), 1)
  if isinstance(image, (bytes, bytearray, memoryview)):
    return _from_bytes(bytes(image), max_pixels)
  if not isinstance(image, Image.Image):
    raise ImageError("format", f"an image must be bytes, a PIL image or an array, got {type(image).__name__}")
  _check_pixels(image, max_pixels)
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
  except Exception:  # the rotation alone is lost
    orientation = 1
  return _Picture(image, orientation if orientation in _UPRIGHT else 1)


def _from_bytes(data: bytes, max_pixels: int) -> _Picture:
  if not data:
    raise ImageError("empty", "the image has no bytes")
  try:
    bare = metadata.strip(data)
  except metadata.TooManyParts:
    raise ImageError("too_large", f"the image is cut into more than {metadata.MAX_PARTS:,} pieces") from None
  if not bare:
    raise ImageError("format", f"not a readable PNG, JPEG, WEBP or GIF image{_but(data)}")
  try:
    image = Image.open(io.BytesIO(bare.data), formats=(bare.format,))
  except Image.DecompressionBombError as error:
    raise _damage(error) from None
  except Exception:  # Pillow's parsers raise many types on damaged headers
    raise ImageError("format", "not a readable PNG, JPEG, WEBP or GIF image") from None
  _check_pixels(image, max_pixels)
  if bare.scans > MAX_SCANS or bare.scans * image.width * image.height > MAX_LARGE_SCANS * max_pixels:
    raise ImageError("too_large", f"{bare.scans:,} scans of {image.width} x {image.height} are more than a JPEG has")
  return _Picture(image, bare.orientation)


def _but(data: bytes) -> str:
  """Names the type of a file that is not an image, for a message; "" for an unknown one."""
  if git_lfs.is_pointer(data):
    return ", but a git-lfs pointer: run `git lfs pull` where it came from"
  start = data[:512]
  return next((f", but {name}" for pattern, name in _OTHERS if re.match(pattern, start, re.DOTALL | re.I)), "")


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
  if not image.width * image.height:
    raise ImageError("empty", "the image has no pixels")
  if image.width * image.height > max_pixels:
    raise ImageError("too_large", f"{image.width} x {image.height} is more than {max_pixels:,} pixels")


def _load(picture: _Picture) -> Image.Image:
  """Decodes an image, upright and RGB."""
  image, turn = picture.image, _UPRIGHT.get(picture.orientation)
  try:
    image.load()
    return _to_rgb(image if turn is None else image.transpose(turn))
  except Exception as error:
    raise _damage(error) from None


def _damage(error: Exception) -> ImageError:
  """Returns the ImageError for a decoder's error; a damaged body may raise anything from OSError to struct.error."""
  if isinstance(error, Image.DecompressionBombError):
    return ImageError("too_large", "the image has too many pixels")
  if "truncated" in str(error):
    return ImageError("unreadable", "the image is cut short")
  return ImageError("unreadable", f"the image is damaged ({type(error).__name__})")


def _to_rgb(image: Image.Image) -> Image.Image:
  clear = image.info.get("transparency")  # in a PNG of 16 bits it has 16 bits, too
  if image.mode == "RGB":
    if isinstance(clear, tuple) and max(clear) > 255:  # Pillow has cut the pixels to 8 bits
      image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image if clear is None else _over_white(image)
  if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
    values = np.asarray(image).astype(np.int64)
    values = np.where(values == clear, 65535, values) if isinstance(clear, int) else values
    return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
  if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    return _over_white(image)
  return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
  image = image.convert("RGBA")
  canvas = Image.new("RGBA", image.size, _WHITE + (255,))
  return Image.alpha_composite(canvas, image).convert("RGB")
