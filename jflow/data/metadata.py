"""Removal of metadata from encoded images, except for the rotation, before they are decoded.

Color profiles, texts, thumbnails, EXIF and XMP are not needed for the pixels, and damage in them makes decoders fail.
The parts that determine the pixels are kept byte for byte. Of an animation or of several images in one file (MPO, as
telephones write it) the first is kept. Nothing is decoded here.
"""

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

MAX_PARTS = 100_000  # chunks, segments or blocks of a file; libpng writes 15 MB as 2,000 chunks
_MAX_PROFILE = 2**20  # bytes of an uncompressed profile at most, Pillow's limit
_EXIF = re.compile(rb"(?:Exif\0\0)*+")
_ORIENTATION = 0x0112
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")
_INTEGERS = {3: "H", 4: "L", 8: "h", 9: "l", 13: "L"}  # TIFF's type -> struct's
_WEBP_PIXELS = (b"VP8X", b"ALPH", b"VP8 ", b"VP8L", b"ANIM", b"ANMF")
_WEBP_METADATA = 0x20 | 0x08 | 0x04  # flags of VP8X: ICC, EXIF, XMP


class Bare(NamedTuple):
  """An encoded image without its metadata."""

  format: str  # as Pillow names it: "PNG", "JPEG", "WEBP" or "GIF"
  data: bytes
  orientation: int  # as in EXIF: 1 is upright, 5 to 8 lie on a side
  scans: int  # scans of a progressive JPEG


class TooManyParts(Exception):
  """A file of more than MAX_PARTS parts, which no encoder writes."""


def strip(data: bytes) -> Bare | None:
  """Returns an encoded image without its metadata; None where it is not PNG, JPEG, WEBP or GIF.

  Damage in the parts that are kept is left for the decoder to find. An unreadable rotation counts as upright.

  Raises:
    TooManyParts: the file has more than MAX_PARTS parts.
  """
  found = next((entry for entry in _FORMATS if re.match(entry[1], data, re.DOTALL)), None)
  return found and Bare(found[0], *found[2](data))


def exif_orientation(data: bytes) -> int | None:
  """Returns the rotation in EXIF data, 1 to 8; None where there is none or it is unreadable."""
  data = data[_EXIF.match(data).end() :]
  if data[2:4] not in (b"*\0", b"\0*") or data[:2] not in (b"II", b"MM"):
    return None
  order = "<" if data[:2] == b"II" else ">"
  try:
    (start,) = struct.unpack_from(order + "L", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
      tag, kind, values = struct.unpack_from(order + "HHL", data, entry)
      if tag == _ORIENTATION and values and kind in _INTEGERS:
        size = struct.calcsize(order + _INTEGERS[kind]) * values
        place = entry + 8 if size <= 4 else struct.unpack_from(order + "L", data, entry + 8)[0]
        (value,) = struct.unpack_from(order + _INTEGERS[kind], data, place)
        return value if 1 <= value <= 8 else 1
  except struct.error:  # cut
    pass
  return None


def _rotation(exif: Sequence[bytes], xmp: Sequence[bytes]) -> int:
  """Returns the first readable rotation; EXIF goes before XMP."""
  # EXIF larger than a segment of a JPEG is cut into several; pieces by two programs do not fit together.
  whole = b"".join(each.removeprefix(b"Exif\0\0") for each in exif)
  for data in (whole, *exif[:4]):
    if orientation := exif_orientation(data):
      return orientation
  for data in xmp:
    if match := _XMP_ORIENTATION.search(data):
      return int(match[1])
  return 1


def _counted(parts: Iterator[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
  for number, part in enumerate(parts):
    if number == MAX_PARTS:
      raise TooManyParts
    yield part


# PNG: chunks of length, name, contents and checksum. Those in capitals are needed, and of the others tRNS.

_PNG_NAME = re.compile(rb"[A-Za-z0-9_]{4}")


def _png(data: bytes) -> tuple[bytes, int, int]:
  kept, exif, profiles, xmp = [data[:8]], [], [], []  # of each text the last counts
  end = 8
  for start, end in _counted(_png_chunks(data)):
    name = data[start + 4 : start + 8]
    if name[0] < 97 or name == b"tRNS":
      kept.append(data[start:end])
      if name == b"IEND":
        end = len(data)
        break
    elif name == b"eXIf":
      exif[:] = [(name, data[start + 8 : end - 4])]
    elif name in (b"tEXt", b"zTXt", b"iTXt"):
      key = data[start + 8 : start + 88].split(b"\0")[0]
      found = {b"exif": exif, b"Raw profile type exif": profiles, b"XML:com.adobe.xmp": xmp}.get(key)
      if found is not None:
        found[:] = [(name, data[start + 9 + len(key) : end - 4])]
  kept.append(data[end:])  # no chunk: for the decoder to find
  read = [_png_text(*chunk) for chunk in exif] or [_hexadecimal(_png_text(*chunk)) for chunk in profiles]
  return b"".join(kept), _rotation(read, [_png_text(*chunk) for chunk in xmp]), 1


def _png_chunks(data: bytes) -> Iterator[tuple[int, int]]:
  """Yields where each chunk starts and ends, as far as they follow one another."""
  start = 8
  while _PNG_NAME.match(data, start + 4):
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    yield start, min(end, len(data))
    start = end


def _png_text(name: bytes, contents: bytes) -> bytes:
  """Returns the text of a chunk after its keyword; empty where it cannot be uncompressed."""
  compressed = name == b"zTXt"
  if name == b"zTXt":
    contents = contents[1:]
  elif name == b"iTXt":
    compressed = contents[:1] == b"\1"
    contents = contents[2:].split(b"\0", 2)[-1]
  if not compressed:
    return contents
  unfolding = zlib.decompressobj()
  try:
    text = unfolding.decompress(contents, _MAX_PROFILE)
  except zlib.error:
    return b""
  return b"" if unfolding.unconsumed_tail else text


def _hexadecimal(text: bytes) -> bytes:
  """Parses EXIF that ImageMagick wrote as text: a blank line, a name, a length, then lines of hexadecimal digits."""
  try:
    return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
  except ValueError:
    return b""


# JPEG: segments that begin with 0xff and a code, most with a length. Behind the first scan all stay.

_JPEG_CODE = re.compile(rb"\xff([\x01-\xfe])")
_JPEG_CODE_IN_SCAN = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
# libjpeg determines the color space by these, where they are intact.
_JPEG_COLORS = re.compile(rb"\xff\xe0(?!\0[\0-\x0f])..JFIF\0|\xff\xee(?!\0[\0-\x0d])..Adobe", re.DOTALL)
_JPEG_SCAN, _JPEG_END, _JPEG_COMMENT = 0xDA, 0xD9, 0xFE


def _jpeg(data: bytes) -> tuple[bytes, int, int]:
  kept, exif, xmp = [data[:2]], [], []
  scans, start, end = 0, 2, 2
  for code, start, end in _counted(_jpeg_segments(data)):
    if code == _JPEG_SCAN:
      scans += 1
      if scans == 1:
        kept.append(data[start:])
    elif scans:
      continue
    elif code == 0xE1 and data.startswith(b"Exif\0\0", start + 4):
      exif.append(data[start + 4 : end])
    elif code == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0", start + 4):
      xmp = [data[start + 4 : end]]
    elif not (0xE0 <= code <= 0xEF or code == _JPEG_COMMENT) or _JPEG_COLORS.match(data, start):
      kept.append(data[start:end])
  return b"".join(kept), _rotation(exif, xmp), scans


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
  """Yields code, start and end of each segment of the first image, as libjpeg finds them."""
  pattern, place = _JPEG_CODE, 2
  while match := pattern.search(data, place):
    code, start, place = match[1][0], *match.span()
    if code >= 0xC0 and not 0xD0 <= code <= _JPEG_END:
      place += max(2, int.from_bytes(data[place : place + 2], "big"))
    yield code, start, place
    if code == _JPEG_SCAN:
      pattern = _JPEG_CODE_IN_SCAN
    elif code == _JPEG_END and pattern is _JPEG_CODE_IN_SCAN:
      return


# WEBP: chunks of name, length and contents in a RIFF.


def _webp(data: bytes) -> tuple[bytes, int, int]:
  kept, exif, xmp = [b"WEBP"], [], []
  for start, end in _counted(_webp_chunks(data)):
    name, chunk = data[start : start + 4], data[start:end]
    if name == b"VP8X" and len(chunk) > 8:
      chunk = chunk[:8] + bytes([chunk[8] & ~_WEBP_METADATA]) + chunk[9:]
    if name in _WEBP_PIXELS:
      kept.append(chunk + b"\0" * (len(chunk) % 2))
    elif name == b"EXIF":
      exif.append(chunk[8:])
    elif name == b"XMP ":
      xmp.append(chunk[8:])
  body = b"".join(kept)
  return b"RIFF" + struct.pack("<L", len(body)) + body, _rotation(exif[:1], xmp[:1]), 1


def _webp_chunks(data: bytes) -> Iterator[tuple[int, int]]:
  start, stop = 12, min(len(data), 8 + int.from_bytes(data[4:8], "little"))
  while start + 8 <= stop:
    end = start + 8 + int.from_bytes(data[start + 4 : start + 8], "little")
    yield start, min(end, len(data))
    start = end + end % 2


# GIF: a header and a palette, then extensions and images in blocks. One extension affects the pixels.

_GIF_BLOCK = re.compile(rb"[!,;]")
_GIF_CONTROL = 0xF9


def _gif(data: bytes) -> tuple[bytes, int, int]:
  flags = data[10] if len(data) > 10 else 0
  start = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
  kept, parts = [data[:start]], 0
  while (match := _GIF_BLOCK.search(data, start)) and match[0] == b"!":
    start = end = match.start()
    end += 2
    while end < len(data):
      parts += 1
      if parts > MAX_PARTS:
        raise TooManyParts
      if not data[end]:
        break
      end += 1 + data[end]
    if data[start + 1 : start + 2] == bytes([_GIF_CONTROL]):
      kept.append(data[start : end + 1])
    start = end + 1
  kept.append(data[match.start() :] if match else b"")
  return b"".join(kept), 1, 1


_FORMATS: tuple[tuple[str, bytes, Callable[[bytes], tuple[bytes, int, int]]], ...] = (
  ("JPEG", rb"\xff\xd8\xff", _jpeg),
  ("PNG", rb"\x89PNG\r\n\x1a\n", _png),
  ("WEBP", rb"RIFF....WEBP", _webp),
  ("GIF", rb"GIF8[79]a", _gif),
)
