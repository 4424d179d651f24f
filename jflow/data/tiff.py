"""Reduction of TIFF files to one image and the tags that its pixels need, before they are decoded.

A TIFF is a graph of directories, each of up to 65,535 tags that may all point at the same bytes; a decoder that follows
it blindly may take unlimited time and memory. Here each tag is checked against the file, and a directory of the sound
ones is appended. `datasets` stores images as TIFF that PNG cannot hold: palettes, CMYK, 16 and 32 bits.
"""

import struct

MAX_PIECES = 65_536  # strips or tiles
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_STRIPS, _ROWS, _STRIP_SIZES = 273, 278, 279
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_SIZES = 322, 323, 324, 325
# The others: photometric interpretation, fill order, orientation, planes, CCITT options, predictor, color map, extra
# samples, sample format, subsampling and reference of YCbCr.
_KEPT = (
  _WIDTH,
  _HEIGHT,
  _BITS,
  _COMPRESSION,
  _SAMPLES,
  _STRIPS,
  _ROWS,
  _STRIP_SIZES,
  _TILE_WIDTH,
  _TILE_HEIGHT,
  _TILES,
  _TILE_SIZES,
  262,
  266,
  274,
  284,
  292,
  293,
  317,
  320,
  338,
  339,
  529,
  530,
  531,
  532,
)
_TYPES = {1: "B", 3: "H", 4: "L", 5: "2L"}
_COMPRESSIONS = (1, 2, 3, 4, 5, 8, 32773, 32946)  # none, CCITT, LZW, deflate, PackBits


def is_tiff(data: bytes) -> bool:
  """Returns whether a file begins as a TIFF or a BigTIFF."""
  return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def first_picture(data: bytes) -> bytes:
  """Returns a TIFF with only its first image, and of its tags only those that the pixels need.

  Raises:
    ValueError: it is damaged, or of an unsupported form; the message says which.
  """
  order = "<" if data[:2] == b"II" else ">"
  if data[2:4] not in (b"*\0", b"\0*"):
    raise ValueError("is a BigTIFF, which is not read")
  try:
    tags = _tags(data, order)
  except struct.error:
    raise ValueError("has a directory that is cut") from None
  values = {tag: list(_numbers(data, order, *tag_entry)) for tag, tag_entry in tags.items()}
  if values.get(_SAMPLES, [1])[0] > 8:
    raise ValueError(f"has {values[_SAMPLES][0]} samples to a pixel, which are not read")
  if not values.get(_WIDTH) or not values.get(_HEIGHT):
    raise ValueError("has no width and height")
  if values.get(_COMPRESSION, [1])[0] not in _COMPRESSIONS:
    raise ValueError(f"has compression {values[_COMPRESSION][0]}, which is not read")
  places, sizes = (_TILES, _TILE_SIZES) if _TILES in values else (_STRIPS, _STRIP_SIZES)
  if len(values.get(places, ())) > MAX_PIECES:
    raise ValueError(f"has more than {MAX_PIECES:,} strips or tiles")
  ends = [place + size for place, size in zip(values.get(places, ()), values.get(sizes, ()))]
  if sum(values.get(sizes, ())) > len(data) or not ends or max(ends) > len(data):
    raise ValueError("is cut: its strips or tiles do not lie in the file")
  samples = values.get(_SAMPLES, [1])[0]
  bits = sum((values.get(_BITS, [1]) * samples)[:samples])
  if values.get(_COMPRESSION, [1])[0] == 1:
    if 8 * sum(values[sizes]) < values[_WIDTH][0] * values[_HEIGHT][0] * bits:
      raise ValueError("is cut: its strips or tiles are smaller than the picture")
  for side, whole in ((_TILE_WIDTH, _WIDTH), (_TILE_HEIGHT, _HEIGHT)):
    if values.get(side, [16])[0] > max(values[whole][0] + 15, 4096):
      raise ValueError("has tiles larger than the picture")
  if values.get(_ROWS, [1])[0] > values[_HEIGHT][0]:  # "all rows" is written as 2**32 - 1
    tags[_ROWS] = (4, 1, struct.pack(order + "L", values[_HEIGHT][0]))
  place = len(data) + len(data) % 2
  directory = struct.pack(order + "H", len(tags))
  for tag, (kind, count, value) in sorted(tags.items()):
    directory += struct.pack(order + "HHL", tag, kind, count) + value
  return b"".join(
    (
      data[:4],
      struct.pack(order + "L", place),
      data[8:],
      bytes(place - len(data)),
      directory,
      bytes(4),
    )
  )


def _tags(data: bytes, order: str) -> dict[int, tuple[int, int, bytes]]:
  """Returns type, count and the last four bytes of the entry of each tag of the first directory that is kept."""
  (start,) = struct.unpack_from(order + "L", data, 4)
  (entries,) = struct.unpack_from(order + "H", data, start)
  tags: dict[int, tuple[int, int, bytes]] = {}
  total = 0
  for entry in range(start + 2, start + 2 + 12 * entries, 12):
    tag, kind, count = struct.unpack_from(order + "HHL", data, entry)
    if tag not in _KEPT:
      continue
    if tag in tags or kind not in _TYPES or not count:
      raise ValueError(f"has a tag {tag} that is damaged")
    total += struct.calcsize(order + _TYPES[kind]) * count
    if total > len(data):
      raise ValueError("has tags larger than the file")
    tags[tag] = kind, count, struct.unpack_from("4s", data, entry + 8)[0]
  return tags


def _numbers(data: bytes, order: str, kind: int, count: int, value: bytes) -> tuple[int, ...]:
  """Returns the numbers of a tag."""
  form = order + _TYPES[kind] * count if kind == 5 else f"{order}{count}{_TYPES[kind]}"
  try:
    if struct.calcsize(form) <= 4:
      return struct.unpack_from(form, value)
    return struct.unpack_from(form, data, struct.unpack(order + "L", value)[0])
  except struct.error:
    raise ValueError("has a tag that lies outside the file") from None
