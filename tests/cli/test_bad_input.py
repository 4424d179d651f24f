"""R11: what is bad in the data costs itself, is counted under its reason, and stops nothing before its share does."""

import collections
import io
import pathlib
import zlib

import numpy as np
from data_config import data_config
from PIL import Image
from preparing import image, run, write_lines, write_tar
from refusals import refused

from jflow.batch import RowShape
from jflow.data import images
from jflow.data.pipeline import Pipeline
from jflow.data.store import prepared
from jflow.data.store.prepared import PreparedSource
from jflow.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.load(pathlib.Path(__file__).parents[2] / "configs" / "tokenizer")
GOOD = 40


def _encode(picture: Image.Image, format: str, **options) -> bytes:
  buffer = io.BytesIO()
  picture.save(buffer, format, **options)
  return buffer.getvalue()


def _bomb() -> bytes:
  """A PNG of 92 bytes whose header says 20,000 by 20,000."""
  png = image(0)
  header = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + png[24:29]
  return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def _odd() -> dict[str, tuple[bytes, tuple[int, ...]]]:
  """Odd images, and the value that the first pixel becomes by the rules of `images.decode`."""
  red, blue = Image.new("RGB", (16, 12), (250, 0, 0)), Image.new("RGB", (16, 12), (0, 0, 250))
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  turned = np.zeros((12, 16, 3), np.uint8)
  turned[-1, -1] = (9, 8, 7)
  palette = Image.new("P", (16, 12), 1)
  palette.putpalette([0, 0, 0, 200, 100, 50])
  return {
    "animated": (_encode(red, "GIF", save_all=True, append_images=[blue]), (250, 0, 0)),
    "CMYK": (_encode(Image.new("CMYK", (16, 12), (0, 255, 255, 0)), "JPEG"), (254, 0, 0)),
    "16 bits": (_encode(Image.fromarray(np.full((12, 16), 0x7FFF, np.uint16)), "PNG"), (127, 127, 127)),
    "EXIF-rotated": (_encode(Image.fromarray(turned), "PNG", exif=exif), (9, 8, 7)),
    "alpha": (_encode(Image.new("RGBA", (16, 12), (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
    "palette": (_encode(palette, "PNG"), (200, 100, 50)),
  }


# Fault -> (line of the file, reason). Images that they name are written by the test.
LINES = {
  "zero-byte image": ({"image": "zero.png", "caption": "a"}, "empty"),
  "cut image": ({"image": "cut.jpg", "caption": "a"}, "unreadable"),
  "20,000 x 20,000 header": ({"image": "bomb.png", "caption": "a"}, "too_large"),
  "missing image": ({"image": "none.png", "caption": "a"}, "missing_image"),
  "caption of 1 MB": ({"image": "good.png", "caption": "word " * 200_000}, "text_too_long"),
  "empty caption": ({"image": "good.png", "caption": ""}, "empty_caption"),
  "no caption": ({"image": "good.png"}, "missing_caption"),
  "NUL": ({"image": "good.png", "caption": "a\0b"}, "nul_character"),
  "lone surrogate": ({"image": "good.png", "caption": "a\ud800"}, "invalid_utf8"),
  "invalid UTF-8": (b'{"image": "good.png", "caption": "\xff"}', "invalid_utf8"),
  "broken JSON": (b'{"image": "good.png", ', "broken_json"),
  "duplicate keys": (b'{"image": "good.png", "caption": "a", "caption": "b"}', "duplicate_key"),
}


def _caption(i: int, name: str = "good.png") -> dict:
  return {"image": name, "caption": f"picture {i}", "id": str(i)}


def _epoch(output) -> collections.Counter:
  """Reads every row once, as a run does; returns what was rejected, by reason."""
  sources = {"generation": ((output, 1.0),)}
  config = data_config(max_rejected_share=1.0, mixture=((0, (0, 1, 0)),), sources=sources)
  pipeline = Pipeline(
    config, TOKENIZER, RowShape(tokens=96, images=4, image_patches=4, image_size=8, writer="flow"), 1, 0
  )
  rows, counts, read = pipeline.sources()[0].plan.rows, collections.Counter(), 0
  for batch, info in pipeline.batches(0, rows):
    counts.update(info["rejected"])
    read += int((batch.image_kind > 0).sum())
  assert read + counts.total() == GOOD + len(_odd())
  return counts


def _shard(output) -> pathlib.Path:
  return pathlib.Path(output, prepared.shard_name("generation", 0, 1))


def test_faults_are_counted_as_often_as_they_were_put_in(tmp_path, capsys):
  table, folder = [], tmp_path / "in"
  folder.mkdir()

  def say(fault, outcome):
    table.append(f"  {fault:34} {outcome}")

  odd = _odd()
  files = {"good.png": image(3), "zero.png": b"", "bomb.png": _bomb()}
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  files["cut.jpg"] = _encode(Image.fromarray(noise), "JPEG")[:-2000]
  for name, data in [
    *files.items(),
    *((f"{number}.img", data) for number, (data, _) in enumerate(odd.values())),
  ]:
    (folder / name).write_bytes(data)

  # prepare: each fault twice among good records, and the odd images once.
  lines = [_caption(i) for i in range(GOOD)] + [_caption(GOOD + i, f"{i}.img") for i in range(len(odd))]
  for line, _ in [*LINES.values(), *LINES.values()]:
    lines.insert(len(lines) // 2, line)
  write_lines(folder / "bad.jsonl", lines)
  summary, output = run(folder, "generation", "bad.jsonl", max_rejected_share=0.5)
  wanted = collections.Counter(reason for _, reason in LINES.values() for _ in range(2))
  assert collections.Counter(summary["rejected"]) == wanted and summary["accepted"] == GOOD + len(odd)
  assert set(summary["first_rejected"]) == set(wanted)
  for fault, (_, reason) in LINES.items():
    say(fault, f"left out as {reason}")
  source = PreparedSource(output, "generation")
  by_id = {source[i].id: source[i] for i in range(len(source))}
  for number, (name, (data, value)) in enumerate(odd.items()):
    pixels = images.decode(by_id[str(GOOD + number)].images[0])
    assert by_id[str(GOOD + number)].images[0] == data
    assert np.abs(pixels[0, 0].astype(int) - value).max() <= 2, name
    say(f"{name} image", f"converted, first pixel {tuple(pixels[0, 0].tolist())}")
  with refused("--max_rejected_share=0.01"):
    run(folder, "generation", "bad.jsonl", output=str(tmp_path / "second"))
  say("more than the allowed share", "nothing written, first fault named")

  # Shards of the input: empty, cut, missing.
  sample = {"a.png": image(1), "a.txt": b"caption a", "b.png": image(2), "b.txt": b"caption b"}
  for number in range(3):
    write_tar(folder / f"0000{number}.tar", sample)
  (folder / "00001.tar").write_bytes(b"")
  (folder / "00002.tar").write_bytes((folder / "00002.tar").read_bytes()[:2600])
  shards, _ = run(
    folder,
    "generation",
    "{00000..00002}.tar",
    "webdataset",
    max_rejected_share=1.0,
    output=str(tmp_path / "tars"),
  )
  assert shards["rejected"] == {"empty_shard": 1, "broken_tar": 1} and shards["accepted"] == 3
  say("empty shard", "counted as empty_shard")
  say("cut shard", "counted as broken_tar, what stands before it kept")
  with refused("00003.tar"):
    run(folder, "generation", "{00000..00003}.tar", "webdataset", output=str(tmp_path / "third"))
  say("missing shard", "refused, the file named")

  # The prepared shard: flipped bits, one at a time, through the loader of a training run.
  whole = _shard(output).read_bytes()
  injected, found = 5, 0
  for place in range(1000, 1000 + 1500 * injected, 1500):  # among the records
    _shard(output).write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    epochs = [_epoch(output) for _ in range(2)]
    assert epochs[0] == epochs[1] and set(epochs[0]) <= {"corrupt", "checksum"}
    found += epochs[0].total()
  _shard(output).write_bytes(whole)
  assert found == injected and not _epoch(output)
  say("flipped bit", f"found by the loader {found}/{injected}, its record left out, the same every time")
  _shard(output).write_bytes(whole[:-1])
  with refused("131,072"):
    _epoch(output)
  _shard(output).unlink()
  with refused(str(_shard(output))):
    _epoch(output)
  say("prepared shard cut, or missing", "refused, the file named")
  bad = 2 * len(LINES) + 2 + injected
  counted = sum(summary["rejected"].values()) + sum(shards["rejected"].values()) + found
  assert counted == bad
  with capsys.disabled():
    print(f"\nR11 faults in the data: bad samples counted {counted}, injected {bad}")
    print("\n".join(table))
