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
from refusals import refused

from jflow.data import images
from jflow.data.images import ImageError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "processor"


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


def test_generation_may_cut_the_middle_or_keep_all_of_a_picture():
  wide, rng = _gradient(201, 50), np.random.default_rng(0)
  np.testing.assert_array_equal(images.for_generation(wide, 50, rng, "center"), wide[:, 75:125])
  tall = _encode(Image.fromarray(wide.transpose(1, 0, 2)))
  np.testing.assert_array_equal(images.for_generation(tall, 50, rng, "center"), wide.transpose(1, 0, 2)[75:125])
  padded = images.for_generation(wide[:, :200], 200, rng, "pad")
  np.testing.assert_array_equal(padded[75:125], wide[:, :200])
  assert (padded[:75] == 127).all() and (padded[125:] == 127).all()
  assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state  # nothing is drawn


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
  np.testing.assert_array_equal(images.decode(_encode(Image.fromarray(pixels), exif=exif)), np.rot90(pixels, -1))


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


def test_the_clear_color_of_sixteen_bits_is_laid_over_white():
  values = np.array([[0x1234, 0x1235, 0x8000]], np.uint16)
  grey = images.decode(_encode(Image.fromarray(values), transparency=0x1234))
  assert grey[0, :, 0].tolist() == [255, 0x12, 0x80]
  data = _encode(Image.new("RGB", (3, 1)))
  end = data.index(b"IEND") - 4
  pixels = np.array([[0x1212, 0x3434, 0x5656], [0x1212, 0x3434, 0xFFFF], [0, 0, 0]], ">u2")
  header = _chunk(b"IHDR", struct.pack(">2L5B", 3, 1, 16, 2, 0, 0, 0))
  clear = _chunk(b"tRNS", pixels[0].tobytes())
  body = _chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))
  color = images.decode(data[:8] + header + clear + body + data[end:])
  assert color[0].tolist() == [[255] * 3, [0x12, 0x34, 255], [0] * 3]


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


def _chunk(kind: bytes, body: bytes = b"") -> bytes:
  """A chunk of a PNG."""
  return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _segment(code: int, body: bytes = b"") -> bytes:
  """A segment of a JPEG."""
  return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body


def _riff(name: bytes, body: bytes) -> bytes:
  """A chunk of a WEBP."""
  return name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)


def _png_header(width: int, height: int) -> bytes:
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"")) + _chunk(b"IEND")


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


SOUND = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8))
PNG, JPEG, GIF = (_encode(SOUND, format) for format in ("PNG", "JPEG", "GIF"))
GIF_START = 13 + 768  # behind the header and the palette
LARGE, UNFOLDS = bytes(2 * 2**20), zlib.compress(bytes(3 * 2**20))
# EXIF whose rotation says "upside down", but for a tag behind it that lies outside.
ENTRIES = struct.pack("<HHHLHHHHLL", 2, 0x0112, 3, 1, 3, 0, 0x0131, 2, 10**6, 10**6)
TURNED = b"II*\0\x08\0\0\0" + ENTRIES
HEXADECIMAL = b"\nexif\n      34\n" + TURNED.hex().encode()
MANY_TAGS = b"II*\0\x08\0\0\0\xff\xff" + b"".join(struct.pack("<HHLL", i, 2, 500_000, 8) for i in range(60_000))


def _in_png(*chunks: bytes, behind: bytes = b"") -> bytes:
  return PNG[:33] + b"".join(chunks) + PNG[33:-12] + behind + PNG[-12:]


def _in_jpeg(*segments: bytes) -> bytes:
  return JPEG[:2] + b"".join(segments) + JPEG[2:]


def _in_webp(before: bytes = b"", behind: bytes = b"", flags: int = 0x2C) -> bytes:
  canvas = bytes([flags, 0, 0, 0]) + (39).to_bytes(3, "little") + (29).to_bytes(3, "little")
  body = b"WEBP" + _riff(b"VP8X", canvas) + before + _encode(SOUND, "WEBP", lossless=True)[12:] + behind
  return b"RIFF" + struct.pack("<I", len(body)) + body


def _in_gif(extension: bytes) -> bytes:
  return GIF[:GIF_START] + extension + GIF[GIF_START:]


def _telephone(**options) -> bytes:
  """Two pictures in one file, as telephones write them; the first is the photograph."""
  return _encode(SOUND, "MPO", save_all=True, append_images=[SOUND.rotate(180)], **options)


METADATA = {
  "PNG, profile of 2 MiB": _in_png(_chunk(b"iCCP", b"icc\0\0" + UNFOLDS)),
  "PNG, profile cut": _in_png(_chunk(b"iCCP", b"icc\0\0" + UNFOLDS[:9])),
  "PNG, profile of an unknown compression": _in_png(_chunk(b"iCCP", b"icc\0\7abc")),
  "PNG, zTXt of 3 MiB": _in_png(_chunk(b"zTXt", b"parameters\0\0" + UNFOLDS)),
  "PNG, iTXt of 3 MiB behind the pixels": _in_png(behind=_chunk(b"iTXt", b"workflow\0\1\0\0\0" + UNFOLDS)),
  "PNG, much text": _in_png(*[_chunk(b"tEXt", b"a\0" + LARGE)] * 40),
  "PNG, EXIF of garbage": _in_png(_chunk(b"eXIf", b"garbage")),
  "PNG, EXIF of garbage behind the pixels": _in_png(behind=_chunk(b"eXIf", b"garbage")),
  "PNG, EXIF of many large tags": _in_png(_chunk(b"eXIf", MANY_TAGS)),
  "PNG, EXIF in a chain of names": _in_png(_chunk(b"eXIf", b"Exif\0\0" * 2**20)),
  "PNG, profile in a text that is no text": _in_png(_chunk(b"zTXt", b"Raw profile type exif\0\0" + UNFOLDS)),
  "PNG, texts named as what Pillow knows": _in_png(_chunk(b"tEXt", b"transparency\0x"), _chunk(b"tEXt", b"bbox\0x")),
  "PNG, chunks without contents": _in_png(
    *map(_chunk, (b"iCCP", b"pHYs", b"sRGB", b"gAMA", b"eXIf", b"acTL", b"fcTL"))
  ),
  "PNG, two animations": _in_png(*[_chunk(b"acTL", struct.pack(">II", 2, 0))] * 2),
  "PNG, text with a wrong checksum": _in_png(_chunk(b"tEXt", b"a\0b")[:-4] + b"sum!"),
  "PNG, text cut at the end": PNG[:-12] + _chunk(b"tEXt", b"a\0" + LARGE)[:-9],
  "WEBP, EXIF of garbage": _in_webp(behind=_riff(b"EXIF", b"Exif\0\0garbage")),
  "WEBP, EXIF cut": _in_webp(behind=_riff(b"EXIF", LARGE))[:-1000],
  "WEBP, profile of 2 MiB": _in_webp(before=_riff(b"ICCP", LARGE)),
  "WEBP, XMP that is no text": _in_webp(behind=_riff(b"XMP ", b"\xff" * 99)),
  "WEBP, metadata promised": _in_webp(),
  "JPEG, EXIF of garbage": _in_jpeg(_segment(0xE1, b"Exif\0\0garbage")),
  "JPEG, EXIF in many segments": _in_jpeg(*[_segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 100),
  "JPEG, profile cut": _in_jpeg(_segment(0xE2, b"ICC_PROFILE\0\1\3" + bytes(60_000))),
  "JPEG, profile without a number": _in_jpeg(_segment(0xE2, b"ICC_PROFILE\0")),
  "JPEG, JFIF, Adobe and MPF cut": _in_jpeg(
    _segment(0xE0, b"JFIF"), _segment(0xEE, b"Adobe"), _segment(0xE2, b"MPF\0")
  ),
  "JPEG, MPF of garbage": _in_jpeg(_segment(0xE2, b"MPF\0II*\0\x08\0\0\0" + b"\xff" * 90)),
  "JPEG, Photoshop's cut": _in_jpeg(_segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\xff")),
  "JPEG, comments": _in_jpeg(*[_segment(0xFE, bytes(65_000))] * 100),
  "JPEG, fill bytes": _in_jpeg(b"\xff" * 2**20),
  "JPEG, two pictures": _telephone(),
  "JPEG, two pictures, the second cut": _telephone()[:-700],
  "GIF, comments": _in_gif(b"!\xfe" + (b"\xff" + bytes(255)) * 20_000 + b"\0"),
  "GIF, a program's data": _in_gif(b"!\xff\x0bNETSCAPE2.0\0"),
  "GIF, zeros": _in_gif(LARGE),
}


@pytest.mark.parametrize("data", METADATA.values(), ids=METADATA)
def test_metadata_never_costs_a_picture(data):
  plain = {b"\x89": PNG, b"\xff": JPEG, b"G": GIF, b"R": PNG}[data[:1]]
  np.testing.assert_array_equal(images.decode(data), images.decode(plain))
  assert images.size(data) == SOUND.size
  np.testing.assert_array_equal(
    images.for_generation(data, 8, np.random.default_rng(0)),
    images.for_generation(plain, 8, np.random.default_rng(0)),
  )
  np.testing.assert_array_equal(images.as_published(data), images.as_published(plain))


def _xmp(orientation: int) -> bytes:
  return f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()


@pytest.mark.parametrize(
  "data",
  [
    _in_png(_chunk(b"eXIf", TURNED)),
    _in_png(behind=_chunk(b"eXIf", TURNED)),
    _in_png(_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(HEXADECIMAL))),
    _in_png(_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _xmp(3)), _chunk(b"eXIf", b"garbage")),
    _in_webp(behind=_riff(b"EXIF", TURNED)),
    _in_webp(behind=_riff(b"EXIF", b"Exif\0\0" + TURNED)),
    _in_webp(behind=_riff(b"XMP ", _xmp(3))),
    _in_jpeg(_segment(0xE1, b"Exif\0\0" + TURNED)),
    _in_jpeg(_segment(0xE1, b"Exif\0\0garbage"), _segment(0xE1, b"Exif\0\0" + TURNED)),
    _in_jpeg(_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + _xmp(3))),
    _telephone(exif=b"Exif\0\0" + TURNED),
  ],
  ids=[
    "png",
    "png-behind",
    "png-text",
    "png-xmp",
    "webp",
    "webp-named",
    "webp-xmp",
    "jpeg",
    "jpeg-second",
    "jpeg-xmp",
    "two-pictures",
  ],
)
def test_a_rotation_is_applied_wherever_it_can_be_read(data):
  plain = JPEG if data[:1] == b"\xff" else PNG
  np.testing.assert_array_equal(images.decode(data), np.rot90(images.decode(plain), 2))


def test_colors_are_read_by_what_stays():
  """Adobe's segment says that the three colors of a JPEG are red, green and blue."""
  plain = _encode(SOUND, "JPEG", keep_rgb=True, quality=95)
  assert np.abs(images.decode(plain).astype(int) - np.asarray(SOUND)).mean() < 8
  first_frame = _encode(SOUND, save_all=True, append_images=[SOUND.rotate(180)])
  np.testing.assert_array_equal(images.decode(first_frame), SOUND)
  clear = _encode(SOUND.convert("P"), transparency=SOUND.convert("P").getpixel((0, 0)))
  assert (images.decode(clear)[0, 0] == 255).all()


def _progressive(side: int, scans: int) -> bytes:
  """A gray progressive JPEG whose last scans hold nothing but empty bands."""
  blocks = (side // 8) ** 2
  runs = ""
  while blocks:
    bits = min(14, blocks.bit_length() - 1)
    run = min(blocks, 2 ** (bits + 1) - 1)
    runs += format(bits, "04b") + (format(run - 2**bits, f"0{bits}b") if bits else "")
    blocks -= run
  first, more = (
    int(b + "1" * (-len(b) % 8), 2).to_bytes(-(-len(b) // 8), "big").replace(b"\xff", b"\xff\0")
    for b in ("0" * (side // 8) ** 2, runs)
  )
  head = b"\xff\xd8" + _segment(0xDB, b"\0" + b"\1" * 64)
  head += _segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
  head += _segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0")
  head += _segment(0xC4, b"\x10" + bytes([0, 0, 0, 15] + [0] * 12) + bytes(i << 4 for i in range(15)))
  head += _segment(0xDA, b"\1\1\0\0\0\0") + first + _segment(0xDA, b"\1\1\0\1\x3f\x01") + more
  return head + (_segment(0xDA, b"\1\1\0\1\x3f\x10") + more) * (scans - 2) + b"\xff\xd9"


def test_the_passes_over_a_jpeg_are_limited_before_it_is_decoded():
  for data in (_progressive(8192, 30), _progressive(64, 300), _progressive(8, 10**5)):
    for use in (
      images.decode,
      images.size,
      images.as_published,
      lambda data: images.for_understanding(data, 16),
    ):
      with pytest.raises(ImageError) as caught:
        use(data)
      assert caught.value.reason == "too_large"
  assert images.decode(_progressive(64, 64)).shape == (64, 64, 3)
  for mode in ("L", "RGB", "CMYK"):  # as encoders make them
    progressive = images.decode(_encode(SOUND.convert(mode), "JPEG", progressive=True))
    np.testing.assert_array_equal(progressive, images.decode(_encode(SOUND.convert(mode), "JPEG")))


@pytest.mark.parametrize(
  "data",
  [
    JPEG[:2] + _segment(0xFE) * 10**6 + JPEG[2:],
    JPEG[:-2] + _segment(0xDC, b"\0\1") * 10**6 + JPEG[-2:],
    _in_png(_chunk(b"tEXt") * 10**6),
    _in_png(_chunk(b"IDAT") * 10**6),
    _in_webp(behind=_riff(b"EXIF", b"") * 10**6),
    _in_gif(b"!\xfe\0" * 10**6),
    _in_gif(b"!\xfe" + b"\1x" * 10**6 + b"\0"),
  ],
  ids=["jpeg", "jpeg-behind", "png-text", "png-pixels", "webp", "gif", "gif-blocks"],
)
def test_a_picture_in_a_million_pieces_is_refused(data):
  with pytest.raises(ImageError) as caught:
    images.decode(data)
  assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
  "data, word",
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    (_encode(SOUND, "TIFF"), "TIFF"),
    (_encode(SOUND, "BMP"), "BMP"),
    (b"\n<!DOCTYPE html><html>404", "web page"),
    (b"\0\0\0\x1cftypheic\0\0", "HEIC"),
    (b"<svg xmlns=''/>", "SVG"),
  ],
)
def test_what_is_no_image_is_named(data, word):
  with refused(word, error=ImageError) as caught:
    images.decode(data)
  assert caught.value.reason == "format"


def test_a_rotation_of_a_pillow_image_that_cannot_be_read_is_none():
  picture = Image.open(io.BytesIO(_in_jpeg(_segment(0xE1, b"Exif\0\0garbage"))))
  np.testing.assert_array_equal(images.decode(picture), images.decode(JPEG))


def _resident() -> float:
  """Megabytes of memory that this process holds."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads the memory of a process as Linux shows it")
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
    print(f"\nS5 mutated images 9,000: escaped 0, {dict(outcomes)}, memory {grown:+.1f} MB after the first 1,800")


def test_read_names_the_file(tmp_path):
  with refused("nothing.png"):
    images.read(str(tmp_path / "nothing.png"))
  (tmp_path / "broken.png").write_bytes(b"x")
  with refused("broken.png"):
    images.read(str(tmp_path / "broken.png"))
  np.testing.assert_array_equal(images.read(str(GOLDEN / "wide.png")), np.asarray(Image.open(GOLDEN / "wide.png")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_square_of_a_large_jpeg_is_that_of_the_whole_picture(orientation):
  """Decoded at a half or a quarter, whatever its rotation; nearly the pixels of the full decode."""
  rng = np.random.default_rng(orientation)
  soft = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((421, 307), Image.Resampling.BICUBIC)
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
    np.testing.assert_array_equal(got, images.for_generation(buffer.getvalue(), size, np.random.default_rng(size)))
    edges = (left, top, left + side, top + side)
    whole = np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC, box=edges))
    assert np.abs(got.astype(int) - whole).mean() < 1.5
    moved = (max(left - 12, 0), top, side) if left > 12 else (left, max(top - 12, 0), side)
    if moved != box:
      assert np.abs(images.square(buffer.getvalue(), size, moved).astype(int) - whole).mean() > 3


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_to_read_may_be_decoded_at_a_fraction(orientation):
  """Nearly the same pixels, and the very same where no fraction is decoded: turned, not a JPEG, or not twice as
  large."""
  rng = np.random.default_rng(orientation)
  soft = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((421, 307), Image.Resampling.BICUBIC)
  exif = Image.Exif()
  exif[ExifTags.Base.Orientation] = orientation
  buffer, png = io.BytesIO(), io.BytesIO()
  soft.save(buffer, "JPEG", quality=95, exif=exif)
  soft.save(png, "PNG")
  for size in (48, 100, 210, 300):
    exact, scaled = (images.for_understanding(buffer.getvalue(), size, scaled=scaled) for scaled in (False, True))
    assert np.abs(exact.astype(int) - scaled).mean() < 1.5
    assert (exact == scaled).all() == (orientation != 1 or size > 210)
    one, two = (images.for_understanding(png.getvalue(), size, scaled=scaled) for scaled in (False, True))
    np.testing.assert_array_equal(one, two)


def test_a_square_outside_the_picture_is_refused():
  for box in ((0, 0, 9), (-1, 0, 8), (5, 0, 8), (0, 1, 8), (0, 0, 0)):
    with pytest.raises(images.ImageError) as caught:
      images.square(_gradient(12, 8), 4, box)
    assert caught.value.reason == "crop"
