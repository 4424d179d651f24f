"""Fuzzes the reading of pictures: python tests/tools/fuzz_pictures.py --seed=0 --tries=6000

Half of the tries are pictures of which bytes were changed: nothing but `ImageError` may escape, in time. The other half
are sound pictures with metadata that is spoiled, large or of a wrong kind: their pixels have to come out, upright or in
any rotation that the metadata may say. Prints one line of JSON, {"tried", "escaped", "hung", "lost"}, and on stderr
what broke.
"""

import argparse
import io
import json
import pathlib
import random
import struct
import sys
import time
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from tools.fuzzing import spoil_bytes

from jflow.data import images

SECONDS = 5  # of a try, far beyond what one takes
MAX_PIXELS = 2**18


def _encode(picture: Image.Image, format: str, **options) -> bytes:
  file = io.BytesIO()
  picture.save(file, format, **options)
  return file.getvalue()


_NOISE = np.random.default_rng(0)
RGB = Image.fromarray(_NOISE.integers(0, 256, (18, 24, 3), np.uint8))
RGBA = Image.fromarray(_NOISE.integers(0, 256, (18, 24, 4), np.uint8))
DEEP = Image.fromarray(_NOISE.integers(0, 65536, (18, 24), np.uint16))
EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F], EXIF[0x0131] = 6, "Maker", "Software" * 9
_FRAMES = {"save_all": True, "append_images": [RGB.rotate(180), RGB.rotate(90)]}
PICTURES = (
  _encode(RGB, "PNG", exif=EXIF, icc_profile=bytes(300)),
  _encode(RGBA, "PNG"),
  _encode(DEEP, "PNG"),
  _encode(RGB.convert("P"), "PNG", transparency=3),
  _encode(RGB.convert("1"), "PNG"),
  _encode(RGB, "PNG", **_FRAMES),
  _encode(RGB, "JPEG", exif=EXIF, icc_profile=bytes(70_000), comment=b"a"),
  _encode(RGB, "JPEG", progressive=True),
  _encode(RGB.convert("L"), "JPEG"),
  _encode(RGB.convert("CMYK"), "JPEG", exif=EXIF),
  _encode(RGB, "MPO", **_FRAMES),
  _encode(RGB, "JPEG", keep_rgb=True),
  _encode(RGB, "WEBP", exif=EXIF),
  _encode(RGBA, "WEBP", lossless=True),
  _encode(RGB, "WEBP", lossless=True, **_FRAMES),
  _encode(RGB, "GIF", comment=b"b" * 600, **_FRAMES),
  _encode(RGB.convert("L"), "GIF", transparency=9),
)
TIFFS = tuple(
  _encode(picture, "TIFF", **options)
  for picture in (RGB, RGBA, DEEP, RGB.convert("P"), RGB.convert("CMYK"), RGB.convert("1"))
  for options in ({}, {"compression": "tiff_lzw"}, {"compression": "packbits"}, {"exif": EXIF})
)


def _body(rng: random.Random) -> bytes:
  """Something that metadata may hold."""
  exif, text = EXIF.tobytes(), b'<x:xmpmeta tiff:Orientation="3"/>' * rng.choice((1, 40))
  body = rng.choice((b"", exif, exif[6:], text, bytes(rng.choice((1, 5000))), rng.randbytes(rng.choice((1, 3, 90)))))
  return spoil_bytes(rng, body) if rng.random() < 0.6 else body


def _png(rng: random.Random) -> bytes:
  key = rng.choice(
    (b"a", b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp", b"transparency", b"bbox", b"\xff", b"")
  )
  body = _body(rng)
  body = zlib.compress(body * rng.choice((1, 1, 9000))) if rng.random() < 0.4 else body
  name = rng.choice(
    (
      b"tEXt",
      b"zTXt",
      b"iTXt",
      b"iCCP",
      b"eXIf",
      b"pHYs",
      b"sRGB",
      b"gAMA",
      b"cHRM",
      b"acTL",
      b"bKGD",
      b"prVt",
    )
  )
  contents = key + rng.choice((b"\0", b"\0\0", b"\0\1\0\0\0", b"")) + body if name[1:2] in b"TC" else body
  sum_ = zlib.crc32(name + contents) if rng.random() < 0.8 else rng.randrange(2**32)
  return struct.pack(">I", len(contents)) + name + contents + struct.pack(">I", sum_)


def _jpeg(rng: random.Random) -> bytes:
  starts = (
    b"Exif\0\0",
    b"http://ns.adobe.com/xap/1.0/\0",
    b"ICC_PROFILE\0\1\2",
    b"MPF\0",
    b"Photoshop 3.0\0008BIM",
    b"FPXR\0",
    b"",
  )
  code = rng.choice((0xE1, 0xE2, 0xE3, 0xED, 0xEF, 0xFE))
  contents = (rng.choice(starts) + _body(rng))[:65_000]
  return struct.pack(">BBH", 0xFF, code, len(contents) + 2) + contents


def _webp(rng: random.Random) -> bytes:
  contents = _body(rng)
  name = rng.choice((b"EXIF", b"XMP ", b"ICCP", b"abcd"))
  return name + struct.pack("<I", len(contents)) + contents + bytes(len(contents) % 2)


def _gif(rng: random.Random) -> bytes:
  blocks = [rng.randbytes(rng.choice((1, 11, 255))) for _ in range(rng.choice((0, 1, 40)))]
  code = rng.choice((0xFE, 0xFF, 0x01, 0x77))
  return b"!" + bytes([code]) + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


SOUND: dict[str, tuple[bytes, Callable[[random.Random], bytes]]] = {
  "PNG": (_encode(RGB, "PNG"), _png),
  "JPEG": (_encode(RGB, "JPEG"), _jpeg),
  "WEBP": (_encode(RGB, "WEBP", lossless=True, icc_profile=b"icc"), _webp),
  "GIF": (_encode(RGB, "GIF"), _gif),
}


def _with_metadata(rng: random.Random) -> tuple[bytes, bytes]:
  """Returns a sound picture with metadata, and without."""
  format = rng.choice(list(SOUND))
  data, make = SOUND[format]
  added = b"".join(make(rng) for _ in range(rng.choice((1, 1, 2, 5))))
  at = {"PNG": rng.choice((33, len(data) - 12)), "JPEG": 2, "WEBP": rng.choice((30, len(data))), "GIF": 781}[format]
  spoiled = data[:at] + added + data[at:]
  if format == "WEBP":
    spoiled = b"RIFF" + struct.pack("<I", len(spoiled) - 8) + spoiled[8:]
  return spoiled, data


def _rotations(pixels: np.ndarray) -> list[np.ndarray]:
  return [np.rot90(each, turns) for each in (pixels, pixels[:, ::-1]) for turns in range(4)]


def one(rng: random.Random) -> str:
  """Reads one picture; returns "" or what broke."""
  spoiled, sound = (b"", b"") if rng.random() < 0.5 else _with_metadata(rng)
  started = time.monotonic()
  try:
    if sound:
      pixels, whole = images.decode(spoiled, MAX_PIXELS), images.decode(sound)
      if not any(np.array_equal(pixels, each) for each in _rotations(whole)):
        return "lost: other pixels"
    else:
      tiff = rng.random() < 0.2
      spoiled = spoil_bytes(rng, rng.choice(TIFFS if tiff else PICTURES))
      read = rng.choice((images.size, images.decode, images.as_published, images.tiff_as_png))
      (images.tiff_as_png if tiff else read)(spoiled)
  except images.ImageError as error:
    if sound:
      return f"lost: {error}"
  except Exception as error:
    return f"escaped: {type(error).__name__}: {error}"
  return "hung: " if time.monotonic() - started > SECONDS else ""


def fuzz(seed: int, tries: int) -> dict[str, int]:
  """Runs so many tries; returns the counts."""
  counts = {"tried": tries, "escaped": 0, "hung": 0, "lost": 0}
  for number in range(tries):
    broken = one(random.Random(f"{seed}/{number}"))
    if broken:
      counts[broken.partition(":")[0]] += 1
      print(f"seed {seed}, try {number}: {broken}", file=sys.stderr)
  return counts


def main() -> int:
  """Runs the command line; exit code 1 where anything broke."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--tries", type=int, default=6000)
  args = parser.parse_args()
  counts = fuzz(args.seed, args.tries)
  print(json.dumps(counts))
  return int(any(counts[what] for what in ("escaped", "hung", "lost")))


if __name__ == "__main__":
  sys.exit(main())
