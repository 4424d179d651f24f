"""webdataset: samples as img2dataset writes them, against Python's tarfile; tars that attack."""

import bz2
import collections
import gzip
import io
import json
import lzma
import os
import pathlib
import tarfile

import numpy as np
import pytest
from preparing import image, read_back, run, write_tar
from refusals import refused

from jflow.data.importers import tar
from jflow.data.records import RecordError, Turn
from jflow.errors import UserError


def _sample(key: str, index: int, caption: str, **more) -> dict[str, bytes]:
  """A sample as img2dataset writes it."""
  meta = {
    "caption": caption,
    "url": f"http://a.b/{key}.jpg",
    "key": key,
    "status": "success",
    "error_message": None,
    "width": 12 + index,
    "height": 9,
    "original_width": 800,
    "exif": "{}",
    **more,
  }
  return {
    f"{key}.jpg": image(index, "JPEG"),
    f"{key}.txt": caption.encode(),
    f"{key}.json": json.dumps(meta).encode(),
  }


@pytest.fixture
def tars(tmp_path):
  """Three tars of four samples, one of them compressed."""
  folder = tmp_path / "in"
  folder.mkdir()
  for shard in range(3):
    members = {}
    for i in range(4):
      members |= _sample(f"{shard:05d}{i:04d}", i, f"Shard {shard}, number {i}.", aesthetic=float(i))
    name = f"{shard:05d}.tar" + (".gz" if shard == 2 else "")
    write_tar(folder / name, members, "w:gz" if shard == 2 else "w")
  (folder / "00000_stats.json").write_text("{}")
  return folder


def _run(tars, task="generation", name="", **options):
  return run(tars, task, name, "webdataset", **options)


def test_samples_come_out_as_img2dataset_wrote_them(tars):
  summary, output = _run(tars, processes=2)
  assert summary["accepted"] == 12 and summary["shard_lengths"] == [4, 4, 4] and not summary["rejected"]
  for number, record in enumerate(read_back(output, "generation")):
    shard, i = divmod(number, 4)
    assert record.id == f"{shard:05d}{i:04d}" and record.images == (image(i, "JPEG"),)
    assert record.text == f"Shard {shard}, number {i}." and record.turns == ()


def test_the_metadata_stays_with_the_record(tars):
  import tensorflow_datasets as tfds

  _, output = _run(tars)
  meta = json.loads(tfds.builder_from_directory(output).as_data_source("train")[5]["meta"])
  assert meta["url"] == "http://a.b/000010001.jpg" and meta["original_width"] == 800 and meta["aesthetic"] == 1.0
  assert "caption" not in meta and "error_message" not in meta


@pytest.mark.parametrize(
  "name, shards",
  [("00001.tar", [1]), ("0000[01].tar", [0, 1]), ("{00000..00001}.tar", [0, 1]), ("", [0, 1, 2])],
)
def test_a_file_a_pattern_a_range_or_a_folder(tars, name, shards):
  _, output = _run(tars, name=name)
  assert [r.id[:5] for r in read_back(output, "generation")] == [f"{s:05d}" for s in shards for _ in range(4)]


@pytest.mark.parametrize(
  "name, message",
  [
    ("{00000..00004}.tar", "00002.tar"),
    ("{00003..00001}.tar", "{00003..00001}.tar"),
    ("*.zip", "*.zip"),
    ("none", "none"),
  ],
)
def test_a_shard_that_is_missing_gets_one_clear_line(tars, name, message):
  with refused(message):
    _run(tars, name=name)
  (tars / "empty").mkdir()
  with refused(".tar"):
    _run(tars, name="empty")


def test_conversations_and_interleaved_documents_in_json(tars):
  turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "This."}]
  members = {
    "a.png": image(1),
    "a.json": json.dumps({"conversations": turns}).encode(),
    "b.0.png": image(2),
    "b.1.webp": image(3, "WEBP"),
    "b.txt": b"First <image>, then <image>.",
    "c.PNG": image(4),
    "c.txt": "\ufeffné".encode(),
  }
  write_tar(tars / "mixed.tar", members)
  _, output = _run(tars, "understanding", "mixed.tar")
  first, second, third = read_back(output)
  assert first.turns == (Turn("user", "<image>\nWhich?"), Turn("assistant", "This.")) and first.images == (image(1),)
  assert second.images == (image(2), image(3, "WEBP")) and second.text == "First <image>, then <image>."
  assert third.text == "né" and third.images == (image(4),)


def test_another_caption_of_the_json_may_be_asked_for(tars):
  write_tar(tars / "two.tar", _sample("a", 1, "short", recaption="a long one"))
  _, output = _run(tars, name="two.tar", text_column="recaption")
  assert [record.text for record in read_back(output, "generation")] == ["a long one"]


def test_each_broken_sample_is_counted_under_its_reason(tars):
  good = image(1)
  cases = [
    ({"a.txt": b"no image"}, "missing_image"),
    ({"b.jpg": good}, "missing_caption"),
    ({"c.jpg": good, "c.txt": b" \n"}, "empty_caption"),
    ({"d.jpg": good, "d.txt": b"\xff"}, "invalid_utf8"),
    ({"e.jpg": good, "e.json": b"{"}, "broken_json"),
    ({"f.jpg": good, "f.json": b'{"caption": "a", "caption": "b"}'}, "duplicate_key"),
    ({"g.jpg": b"", "g.txt": b"zero bytes"}, "empty"),
    ({"h.jpg": good[:-30], "h.txt": b"cut"}, "unreadable"),
    ({"i.jpg": good, "i.txt": b"a\0b"}, "nul_character"),
    ({"j.jpg": good, "j.txt": b"x" * 2**20}, "text_too_long"),
    ({"b.jpg": good, "b.txt": b"key again"}, "duplicate_key"),
    ({"k.jpg": good, "k.JPG": good, "k.txt": b"twice"}, "duplicate_key"),
    ({"../l.jpg": good, "../l.txt": b"outside"}, "tar_member"),
  ]
  members = [*_sample("first", 1, "good").items()]
  members += [item for case, _ in cases for item in case.items()]
  members += [("._z.jpg", b"x"), ("__index__.json", b"{"), *_sample("last", 1, "good").items()]
  with tarfile.open(tars / "bad.tar", "w") as file:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      file.addfile(info, io.BytesIO(data))
  summary, output = _run(tars, name="bad.tar", max_rejected_share=1.0)
  reasons = [reason for _, reason in cases]
  assert summary["rejected"] == {reason: reasons.count(reason) for reason in reasons}
  assert [record.id for record in read_back(output, "generation")] == ["first", "last"]
  assert "sample g" in summary["first_rejected"]["empty"]["where"]


def _content(path) -> list[tuple[str, bytes]]:
  """Plain files, as Python's tarfile reads them."""
  with tarfile.open(path) as file:
    return [(m.name, file.extractfile(m).read()) for m in file if m.isreg()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_the_reader_agrees_with_pythons(tmp_path, format, mode):
  rng = np.random.default_rng(format)
  members = {f"{'x' * 60}/{'y' * 60}/{i}.bin": rng.bytes(int(rng.integers(0, 3000))) for i in range(20)}
  if format != tarfile.USTAR_FORMAT:
    members |= {"z" * 180 + f"/né-{i}.txt": b"long name" for i in range(3)}
  path = write_tar(tmp_path / "a.tar", members, mode, format=format)
  with tarfile.open(tmp_path / "b.tar", "w", format=format) as file:  # a folder, and times that need extended headers
    file.add(tmp_path, "folder", recursive=False)
    info = tarfile.TarInfo("folder/a.txt")
    info.size, info.mtime, info.uname = 3, 1.5, "né"
    file.addfile(info, io.BytesIO(b"abc"))
  for each in (path, tmp_path / "b.tar"):
    assert [(m.name, m.data) for m in tar.members(str(each))] == _content(each)


def _typed(name: str, kind: bytes, link: str = "", data: bytes = b"") -> bytes:
  info = tarfile.TarInfo(name)
  info.type, info.linkname, info.size = kind, link, len(data)
  header = info.tobuf(tarfile.GNU_FORMAT)
  return header + data + bytes(-len(data) % 512)


ATTACKS = {
  "parent": _typed("../../evil.jpg", tarfile.REGTYPE, data=b"x"),
  "absolute": _typed("/tmp/evil.jpg", tarfile.REGTYPE, data=b"x"),
  "symlink": _typed("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"),
  "hard link": _typed("evil.jpg", tarfile.LNKTYPE, "/etc/passwd"),
  "device": _typed("evil.jpg", tarfile.CHRTYPE),
  "sparse": _typed("evil.jpg", tarfile.GNUTYPE_SPARSE, data=b"x" * 10),
  "10,000 characters": _typed("n" * 10_000 + ".jpg", tarfile.REGTYPE, data=b"x"),
  "1:1000": None,  # below
}


def test_tars_that_attack_write_nothing_and_are_counted(tars, capsys):
  """S4: each attack stands between two good samples, which come through."""
  write_tar(tars / "x", _sample("before", 1, "before"))
  before = pathlib.Path(tars / "x").read_bytes().rstrip(b"\0")
  before += bytes(-len(before) % 512)
  write_tar(tars / "x", _sample("after", 1, "after"))
  after = pathlib.Path(tars / "x").read_bytes()
  os.remove(tars / "x")
  outside = {path: sorted(os.listdir(path)) for path in (tars.parent, tars.parent.parent)}
  refused = 0
  for number, (name, attack) in enumerate(ATTACKS.items()):
    path = tars / f"attack{number}.tar"
    if attack is None:  # 300 MB of zeros in 300 kB: the rest of this tar is lost
      info = tarfile.TarInfo("bomb.jpg")
      info.size = 300 * 2**20
      with gzip.open(path, "wb", 9) as file:
        file.write(before + info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(300):
          file.write(bytes(2**20))
        file.write(after)
      reason, kept = "bomb", ["before"]
    else:
      path.write_bytes(before + attack + after)
      reason, kept = "tar_member", ["before", "after"]
    summary, output = _run(tars, name=path.name, max_rejected_share=1.0)
    assert summary["rejected"] == {reason: 1}, name
    assert [record.id for record in read_back(output, "generation")] == kept, name
    refused += 1
    for file in pathlib.Path(output).iterdir():
      file.unlink()
    os.rmdir(output)
    os.remove(path)
  assert {path: sorted(os.listdir(path)) for path in outside} == outside
  with capsys.disabled():
    print(f"\nS4 tar attacks refused and counted {refused}/8, files written outside 0")


def _read(path) -> tuple[list[tuple[str, bytes]], list[str]]:
  """The reader's files, and the reasons of what is damaged."""
  found = list(tar.members(str(path)))
  files = [(m.name, m.data) for m in found if not isinstance(m.data, RecordError)]
  return files, [m.data.reason for m in found if isinstance(m.data, RecordError)]


def test_a_tar_that_is_cut_gives_what_stands_before(tars):
  whole, files, path = (tars / "00000.tar").read_bytes(), _content(tars / "00000.tar"), tars / "cut.tar"
  end = 0
  for name, data in files:  # each member: a header, then its data in blocks of 512
    before = files.index((name, data))
    for cut in {end + 1, end + 511, end + 512, end + 512 + len(data) // 2}:
      path.write_bytes(whole[:cut])
      assert _read(path) == (files[:before], ["broken_tar"])
    end += 512 + -(-len(data) // 512) * 512
  path.write_bytes(whole[:end])
  assert _read(path) == (files, ["broken_tar"])  # whole members, but nothing says that there are no more


def test_a_damaged_header_costs_its_member_and_no_more(tars):
  whole, files, path = (tars / "00000.tar").read_bytes(), _content(tars / "00000.tar"), tars / "damaged.tar"
  end = 0
  for number, (_, data) in enumerate(files):
    for place in (0, 100, 124, 148, 156, 257):  # name, mode, size, checksum, kind, magic
      path.write_bytes(whole[: end + place] + bytes([whole[end + place] ^ 1]) + whole[end + place + 1 :])
      assert _read(path) == (files[:number] + files[number + 1 :], ["broken_tar"])
    end += 512 + -(-len(data) // 512) * 512


@pytest.mark.parametrize("member, lost", [(0, 0), (3, 1), (4, 0), (5, 0), (9, 3)])
def test_damage_in_a_tar_is_counted_once(tars, member, lost):
  """A sample that loses its image is lost; its text and its metadata stand in for each other."""
  data = bytearray((tars / "00000.tar").read_bytes())
  files, end = _content(tars / "00000.tar"), 0
  for _, content in files[:member]:
    end += 512 + -(-len(content) // 512) * 512
  data[end + 3] ^= 1
  (tars / "00000.tar").write_bytes(data)
  summary, output = _run(tars, name="00000.tar", max_rejected_share=1.0)
  kept = [i for i in range(4) if i != lost or member % 3]
  assert summary["rejected"] == {"broken_tar": 1}
  assert [record.id for record in read_back(output, "generation")] == [f"{i:09d}" for i in kept]


def test_damaged_tars_raise_nothing_else(tars):
  rng = np.random.default_rng(0)
  originals = [(tars / name).read_bytes() for name in ("00000.tar", "00002.tar.gz")]
  outcomes = collections.Counter()
  for original in originals:
    for _ in range(300):
      data = np.frombuffer(original, np.uint8).copy()
      places = rng.integers(0, min(len(data), rng.choice([600, len(data)])), rng.integers(1, 5))
      data[places] = rng.integers(0, 256, len(places))
      size = rng.integers(0, len(data) + 1) if rng.random() < 0.3 else len(data)
      (tars / "m.tar").write_bytes(data[:size].tobytes())
      outcomes.update(_read(tars / "m.tar")[1] or ["whole"])
  assert set(outcomes) <= {"broken_tar", "broken_gzip", "empty_shard", "bomb", "tar_member", "whole"}
  assert min(outcomes[name] for name in ("broken_tar", "broken_gzip", "whole")) > 20


JPEG = image(1, "JPEG")


def _tar(*members: tuple[str, bytes], **options) -> bytes:
  """A tar of members, of which a name may come twice."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", **options) as writer:
    for name, data in members:
      info = tarfile.TarInfo(name)
      info.size = len(data)
      writer.addfile(info, io.BytesIO(data))
  return file.getvalue()


def _pair(key: str) -> tuple[tuple[str, bytes], ...]:
  return (f"{key}.jpg", JPEG), (f"{key}.txt", b"a cat")


def _without_end(data: bytes) -> bytes:
  data = data.rstrip(b"\0")
  return data + bytes(-len(data) % 512)


FIRST, SECOND = _tar(*_pair("a")), _tar(*_pair("b"))


def _counts(tars, data: bytes, task="generation", **options) -> dict[str, int]:
  """Returns how many samples of a tar come in, are rejected and dropped, by reason."""
  (tars / "one.tar").write_bytes(data)
  summary, output = _run(tars, task, "one.tar", max_rejected_share=1.0, **options)
  for file in pathlib.Path(output).iterdir():
    file.unlink()
  os.rmdir(output)
  return {"accepted": summary["accepted"], **summary["rejected"], **summary["filtered"]}


@pytest.mark.parametrize(
  "data, counts",
  [
    (FIRST + SECOND, {"accepted": 2}),
    (FIRST + bytes(2**20) + SECOND, {"accepted": 2}),
    (_without_end(FIRST) + bytes(512) + SECOND, {"accepted": 2}),
    (_without_end(FIRST) + SECOND, {"accepted": 2}),
    (gzip.compress(FIRST) + gzip.compress(SECOND), {"accepted": 2}),
    (gzip.compress(FIRST + SECOND) + bytes(999), {"accepted": 2}),
    (FIRST + _without_end(SECOND)[:-600], {"accepted": 1, "broken_tar": 1}),
    (FIRST + b"x" * 512 + SECOND, {"accepted": 2, "broken_tar": 1}),
    (FIRST + b"x" * 99 + SECOND, {"accepted": 1, "broken_tar": 1}),
    (FIRST + b"the end", {"accepted": 1, "broken_tar": 1}),
    (FIRST + gzip.compress(SECOND), {"accepted": 1, "broken_tar": 1}),
    (gzip.compress(FIRST) + SECOND, {"accepted": 1, "broken_gzip": 1}),
  ],
  ids=[
    "joined",
    "far-apart",
    "zeros-inside",
    "no-end",
    "gzips",
    "zeros-behind-gzip",
    "cut",
    "junk",
    "askew",
    "words",
    "gzip-behind",
    "tar-behind-gzip",
  ],
)
def test_what_follows_the_end_of_a_tar_is_read_or_counted(tars, data, counts):
  assert _counts(tars, data) == counts


CHAT = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "This."}]


@pytest.mark.parametrize(
  "members, options, text",
  [
    (
      {"input.jpg": JPEG, "outputs.txt": b"a cat"},
      {"image_column": "input.jpg", "text_column": "outputs.txt"},
      "a cat",
    ),
    ({"img": JPEG, "cap": b"a cat"}, {"image_column": "img", "text_column": "cap"}, "a cat"),
    ({"jpg": JPEG, "Caption": b"a cat"}, {"text_column": ".caption"}, "a cat"),
    ({"05.png": image(1), "05.txt": b"a cat"}, {"text_column": "05.txt"}, "a cat"),
    ({"jpg": JPEG, "cap": b"a cat", "json": b'{"cap": "not this"}'}, {"text_column": "cap"}, "a cat"),
    ({"jpg": JPEG, "txt": b"not this", "json": b'{"cap": "a cat"}'}, {"text_column": "cap"}, "a cat"),
    ({"jpg": JPEG, "cap.json": b'"a cat"'}, {"text_column": "cap.json"}, "a cat"),
    ({"jpg": JPEG, "chat.json": json.dumps(CHAT).encode()}, {"text_column": "chat.json"}, "This."),
    ({"jpg": JPEG, "txt": b"a cat", "json": b'{"broken'}, {}, "a cat"),
    ({"jpg": JPEG, "cap": b"a cat", "json": b'{"broken'}, {"text_column": "cap"}, "a cat"),
  ],
  ids=["writer", "short", "case", "dots", "both", "key", "json-text", "json-chat", "broken-json", "broken-json-beside"],
)
def test_flags_name_the_members_that_are_there(tars, members, options, text):
  write_tar(tars / "one.tar", {f"key.{ending}": data for ending, data in members.items()})
  task = "understanding" if text == "This." else "generation"
  _, output = _run(tars, task, "one.tar", **options)
  (record,) = read_back(output, task)
  assert text in (record.text, *(turn.text for turn in record.turns)) and len(record.images) == 1


@pytest.mark.parametrize(
  "members, options, words",
  [
    ({"jpg": JPEG, "outputs.txt": b"x"}, {}, ("jpg, outputs.txt", "--text_column")),
    ({"jpg": JPEG, "json": b'{"alt": "x"}'}, {}, ("jpg, json (alt)", "--text_column")),
    ({"jpg": JPEG, "txt": b"x"}, {"text_column": "cap"}, ('"cap" is missing', "jpg, txt")),
    ({"img": JPEG, "txt": b"x"}, {}, ("img, txt", "--image_column")),
    ({"": b"x"}, {}, ("no image, only ''",)),
    ({"jpg": JPEG, "txt": b"x"}, {"image_column": "png"}, ("no png", "jpg, txt")),
    ({"jpg": JPEG, "json": b'{"caption": "x"}'}, {"text_column": "json"}, ("must be text, got dict",)),
  ],
)
def test_what_is_missing_is_said_with_what_is_there(tars, members, options, words):
  write_tar(tars / "one.tar", {f"key.{ending}": data for ending, data in members.items()})
  with pytest.raises(UserError) as caught:
    _run(tars, name="one.tar", **options)
  assert all(word in str(caught.value) for word in words)


def _block(name: str, kind: bytes, size: int | bytes, link: str = "") -> bytes:
  """A header whose size field is given as it stands."""
  block = bytearray(_typed(name, kind, link))
  block[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
  block[148:156] = b" " * 8
  block[148:156] = b"%06o\0 " % sum(block)
  return bytes(block)


BAD_LABEL = _typed("a.label", tarfile.SYMTYPE, "/etc/passwd")
FIELDS = b"5 a=\n" * 13_000


@pytest.mark.parametrize(
  "data, counts",
  [
    (
      _tar(("._a.jpg", b"x"), *_pair("a"), ("__MACOSX/a.jpg", b"x"), ("d/.DS_Store", b"x")),
      {"accepted": 1, "hidden": 3},
    ),
    (_tar(*_pair("x/a"), *_pair("y/a"), *_pair("./z/a")), {"accepted": 3}),
    (_tar(*_pair("caf\xe9"), *_pair("caf\xe8"), format=tarfile.USTAR_FORMAT, encoding="latin-1"), {"accepted": 2}),
    (_tar(("a.jpg", JPEG), *_pair("b"), ("a.txt", b"x")), {"accepted": 1, "missing_caption": 1, "duplicate_key": 1}),
    (
      _tar(*_pair("a"), ("b.mp4", bytes(2**10)), ("b.txt", b"x"), ("c.wav", b"x")),
      {"accepted": 1, "with_video": 1, "with_audio": 1},
    ),
    (_tar(*_pair("a")) + _block("b.mp4", b"0", 2**30), {"accepted": 1, "broken_tar": 1}),
    (
      _tar(_pair("a")[0])[: 1024 + 512 * (-(-len(JPEG) // 512) - 1)] + BAD_LABEL + _tar(("a.txt", b"x")),
      {"accepted": 1},
    ),
    (_block("b.jpg", tarfile.LNKTYPE, 5000, "x") + FIRST, {"accepted": 1, "tar_member": 1}),
    (_block("d", tarfile.DIRTYPE, 5000) + FIRST, {"accepted": 1}),
    (_block("name", b"V", 0) + FIRST, {"accepted": 1}),
    (_block("b.jpg", b"0", b"-0000000001\0") + FIRST, {"accepted": 1, "broken_tar": 1}),
    (_block("b.jpg", b"0", b"\xff" * 12) + FIRST, {"accepted": 1, "broken_tar": 1}),
    (_block("b.jpg", b"0", b"\x80" + b"\xff" * 11) + FIRST, {"accepted": 1, "broken_tar": 1}),
    (_block("b", b"L", 2**33 - 1) + FIRST, {"accepted": 1, "broken_tar": 1}),
    (_block("b", b"x", len(FIELDS)) + FIELDS + bytes(-len(FIELDS) % 512) + FIRST, {"accepted": 1}),
    (_tar(*((f"b.{i}", b"") for i in range(5000))) + FIRST, {"accepted": 1, "missing_image": 1}),
  ],
  ids=[
    "hidden",
    "folders",
    "latin-1",
    "apart",
    "media",
    "video-cut",
    "link-not-needed",
    "link-with-size",
    "folder-with-size",
    "label",
    "negative",
    "negative-256",
    "huge-256",
    "long-name",
    "many-fields",
    "many-members",
  ],
)
def test_odd_members_cost_themselves_and_are_counted(tars, data, counts):
  assert _counts(tars, data) == counts


@pytest.mark.parametrize(
  "name, data, word",
  [
    ("one.tar", bz2.compress(FIRST), "bunzip2"),
    ("one.tar.xz", lzma.compress(FIRST), "unxz"),
    ("one.tar", b"\x28\xb5\x2f\xfd" + FIRST, "unzstd"),
    ("one.tar.zst", b"\x28\xb5\x2f\xfd" + FIRST, "unzstd"),
    ("one.tbz2", bz2.compress(FIRST), "bunzip2"),
    ("one.tar", b"PK\3\4" + FIRST, "unzip"),
    (
      "one.tar",
      b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
      "git lfs pull",
    ),
  ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_what_is_packed_otherwise_is_named_with_what_unpacks_it(tars, name, data, word, folder):
  (tars / name).write_bytes(data)
  with refused(name, word):
    _run(tars, name="" if folder else name)


def test_a_gzip_that_is_cut_gives_the_samples_before(tars):
  rng = np.random.default_rng(0)
  members = [
    (f"{i}.jpg", JPEG + rng.bytes(5000)) if j == 0 else (f"{i}.txt", b"a cat") for i in range(40) for j in (0, 1)
  ]
  data = gzip.compress(_tar(*members))
  counts = _counts(tars, data[: len(data) // 2])
  assert counts["broken_gzip"] == 1 and 15 <= counts["accepted"] <= 20
