"""text: documents come out as they went in, wherever the parts are cut."""

import bz2
import gzip
import json
import lzma

import pytest
from preparing import read_back, run, write_lines
from refusals import refused

from jflow.data.importers import text


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "in"
  (folder / "more").mkdir(parents=True)
  return folder


def _run(folder, name="", **options):
  return run(folder, "text", name, "text", **options)


def _texts(output):
  return [record.text for record in read_back(output, "text")]


def test_a_file_is_a_document(folder):
  (folder / "b.txt").write_text("Second.\n\nIts end.")
  (folder / "a.md").write_text("\ufeffFirst né.", encoding="utf-8")
  (folder / "more" / "c.TXT").write_text("Third.")
  (folder / "picture.png").write_bytes(b"x")
  summary, output = _run(folder)
  assert _texts(output) == ["First né.", "Second.\n\nIts end.", "Third."]
  assert [record.id for record in read_back(output, "text")] == ["a.md", "b.txt", "c.TXT"]
  assert summary["shard_lengths"] == [3]  # small files share a shard


DOCUMENTS = [f"Document {i}.\nLine" + f" {i} again and again." * (i % 7) + f"\nIts end {i}." for i in range(40)]


@pytest.mark.parametrize("part_bytes", [1, 37, 500, 10**9])
@pytest.mark.parametrize("gap", ["\n\n", "\n \n\n\t\n", "\r\n\r\n"])
def test_paragraphs_are_the_same_wherever_parts_are_cut(folder, monkeypatch, part_bytes, gap):
  monkeypatch.setattr(text, "PART_BYTES", part_bytes)
  (folder / "all.txt").write_text("\n\n" + gap.join(DOCUMENTS) + gap, newline="")
  summary, output = _run(folder, "all.txt", documents="paragraph")
  assert [document.strip() for document in _texts(output)] == DOCUMENTS
  assert (len(summary["shard_lengths"]) > 1) == (part_bytes < 1000)


@pytest.mark.parametrize("part_bytes", [1, 100, 10**9])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".txt"])
def test_lines_are_the_same_wherever_parts_are_cut(folder, monkeypatch, part_bytes, ending):
  monkeypatch.setattr(text, "PART_BYTES", part_bytes)
  lines = [f"Line {i} né" if ending == ".txt" else json.dumps({"text": DOCUMENTS[i], "id": i}) for i in range(40)]
  data = "\n".join(lines[:20] + [""] + lines[20:]).encode()
  (folder / ("lines" + ending)).write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
  _, output = _run(folder, documents="line")
  assert [t.strip() for t in _texts(output)] == (lines if ending == ".txt" else DOCUMENTS)


def test_a_file_is_one_document_also_where_it_is_compressed(folder):
  (folder / "a.txt").write_bytes(gzip.compress(b"one\n\ntwo"))
  (folder / "b.txt").write_bytes(b"three")
  summary, output = _run(folder)
  assert _texts(output) == ["one\n\ntwo", "three"] and summary["rejected"] == {}


def test_the_text_may_stand_under_another_key(folder):
  write_lines(folder / "a.jsonl", [{"content": "one"}, {"document": "two"}])
  assert _texts(_run(folder)[1]) == ["one", "two"]
  write_lines(folder / "b.jsonl", [{"body": "three", "text": "not this"}])
  (folder.parent / "out").rename(folder.parent / "first")
  assert _texts(_run(folder, "b.jsonl", text_column="body")[1]) == ["three"]


def test_conversations_without_pictures(folder):
  turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
  write_lines(folder / "chat.jsonl", [{"messages": turns}])
  assert read_back(_run(folder)[1], "text")[0].turns == (("user", "Why?"), ("assistant", "So."))


def test_each_broken_document_is_counted_under_its_reason(folder, monkeypatch):
  monkeypatch.setattr(text, "MAX_DOCUMENT", 1000)
  cases = [
    (b'{"text": ', "broken_json"),
    (b'{"text": "a", "text": "b"}', "duplicate_key"),
    (b'{"text": "\xff"}', "invalid_utf8"),
    (b'{"text": "\\ud800"}', "invalid_utf8"),
    (b'{"text": "a\\u0000b"}', "nul_character"),
    (b'{"title": "none"}', "missing_text"),
    (b'{"text": ["a"]}', "bad_field"),
    (b'{"text": " "}', "empty_text"),
    (b'{"text": "' + b"x" * 2000 + b'"}', "too_large"),
  ]
  good = json.dumps({"text": "good"}).encode()
  write_lines(folder / "a.jsonl", [good, *(line for line, _ in cases), good])
  (folder / "b.jsonl").write_bytes(b"")
  (folder / "c.jsonl.gz").write_bytes(gzip.compress(good)[:-6])
  (folder / "d.jsonl.gz").write_bytes(gzip.compress(b" " * 2**24))
  summary, output = _run(folder, max_rejected_share=1.0)
  reasons = [reason for _, reason in cases] + ["empty_shard", "broken_gzip", "bomb"]
  assert summary["rejected"] == {reason: reasons.count(reason) for reason in reasons}
  assert _texts(output) == ["good", "good"] and "a.jsonl byte 17" in summary["first_rejected"]["broken_json"]["where"]


def test_mistakes_get_one_clear_line(folder):
  with refused("--task", "generation"):
    run(folder, "generation", "", "text")
  with refused(".txt"):
    _run(folder)
  with refused("--documents=page"):
    _run(folder, documents="page")


LINE = b'{"text": "A document."}\n'


@pytest.mark.parametrize(
  "name, data", [("a.jsonl", gzip.compress(LINE)), ("a.jsonl.gz", LINE), ("a.jsonl.gz", gzip.compress(LINE))]
)
def test_gzip_is_told_by_its_contents(folder, name, data):
  (folder / name).write_bytes(data)
  _, output = _run(folder)
  assert _texts(output) == ["A document."]


@pytest.mark.parametrize(
  "format, name, data, word",
  [
    ("text", "a.jsonl.zst", b"\x28\xb5\x2f\xfd" + LINE, "unzstd"),
    ("text", "a.jsonl", bz2.compress(LINE), "bunzip2"),
    ("text", "a.jsonl.xz", lzma.compress(LINE), "unxz"),
    ("text", "a.txt.gz", gzip.compress(LINE), "text to learn from"),
    ("llava-jsonl", "a.jsonl.gz", gzip.compress(LINE), "gunzip"),
    ("parquet", "a.parquet.gz", gzip.compress(LINE), "gunzip"),
  ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_what_is_packed_otherwise_is_named_with_what_unpacks_it(folder, format, name, data, word, whole):
  (folder / name).write_bytes(data)
  with refused(name, word):
    run(folder, "text", "" if whole else name, format)
