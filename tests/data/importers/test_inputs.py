"""The files of an input: hidden, linked, missing and foreign ones are read once, counted, or refused."""

import gzip
import json
import os

import pytest
from preparing import chat, image, make_folder, read_back, run, write_lines, write_tar
from refusals import refused

from jflow.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 1234\n"


@pytest.fixture
def folder(tmp_path):
  """A folder with one document, and beside it one with two."""
  (tmp_path / "far" / "deep").mkdir(parents=True)
  (tmp_path / "far" / "b.txt").write_text("b")
  (tmp_path / "far" / "deep" / "c.txt").write_text("c")
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.txt").write_text("a")
  return tmp_path / "in"


def _texts(folder, name=""):
  """Imports text; returns the documents, sorted, and what was left out."""
  summary, output = run(folder, "text", name, "text")
  return "".join(sorted(record.text for record in read_back(output, "text"))), summary["left_out"]


def _write(path, data=b"x"):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)


def test_an_import_into_a_folder_of_its_own_input_reads_no_file_of_its_own(folder):
  """Neither of the parts that a refused import leaves for the next start, nor of a data set that is finished."""
  write_lines(folder / "a.jsonl", [b'{"text": "x"}'] * 3 + [b"{"])
  out = str(folder / "out")
  with refused("max_rejected_share"):
    run(folder, "text", "", "text", output=out, max_rejected_share=0.01)
  summary, _ = run(folder, "text", "", "text", output=out, max_rejected_share=0.5)
  assert (summary["accepted"], summary["rejected"]) == (4, {"broken_json": 1})
  (folder / "again").symlink_to("out")
  _write(folder / "mine" / "summary.json", b'{"schema": "my own", "accepted": 3}')
  _write(folder / "mine" / "b.txt")
  summary, _ = run(folder, "text", "", "text", max_rejected_share=0.5)
  assert summary["accepted"] == 5 and summary["left_out"] == {"prepared": 1}


HIDDEN = (
  ".git",
  ".ipynb_checkpoints",
  ".cache/deep",
  ".Trash-1000/files",
  "sub/.hidden",
  "__MACOSX",
  "@eaDir",
)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_folders_are_left_out_and_counted_unless_they_are_named(folder, hidden):
  _write(folder / hidden / "x.txt")
  _write(folder / hidden / "._y.txt")
  for name in ("", "**/*.txt", "**/**/**/*.txt"):
    assert _texts(folder, name) == ("a", {"hidden": 1})
    (folder.parent / "out").rename(folder.parent / f"out{len(name)}")
  assert _texts(folder, hidden) == ("x", {"hidden": 1})
  (folder.parent / "out").rename(folder.parent / "out-named")
  assert _texts(folder, f"{hidden}/[x].txt") == ("x", {})


def test_the_name_of_a_file_costs_no_text(folder):
  for name, ids in (("caf\udce9.txt", ["caf\\xe9.txt"]), ("b\udce9.jsonl", ["b\\xe9.jsonl:0"]), ("ü.txt", ["ü.txt"])):
    (folder / name).write_bytes(b'{"text": "x"}')
    _, output = run(folder, "text", name, "text", output=str(folder.parent / ids[0]))
    assert [record.id for record in read_back(output, "text")] == ids


def _hide_jsonl(folder):
  make_folder(folder)
  _write(folder / ".cache" / "more.jsonl", (folder / "chat.jsonl").read_bytes())


def _hide_parquet(folder):
  pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  folder.mkdir()
  for name in ("a.parquet", "._a.parquet", ".git/b.parquet"):
    (folder / name).parent.mkdir(exist_ok=True)
    parquet.write_table(pa.Table.from_pylist([{"image": image(i), "text": str(i)} for i in range(12)]), folder / name)


def _hide_tar(folder):
  folder.mkdir()
  members = {f"{i}{end}": data for i in range(12) for end, data in ((".png", image(i)), (".txt", b"t"))}
  hidden = {f"{at}/{name}": data for at in (".git", "__MACOSX") for name, data in members.items()}
  write_tar(folder / "a.tar", members | hidden)
  for name in ("._a.tar", ".Trash-1000/b.tar"):
    (folder / name).parent.mkdir(exist_ok=True)
    write_tar(folder / name, members)


@pytest.mark.parametrize(
  "format, make", [("llava-jsonl", _hide_jsonl), ("parquet", _hide_parquet), ("webdataset", _hide_tar)]
)
def test_no_format_reads_what_is_hidden(tmp_path, format, make):
  make(tmp_path / "in")
  summary, _ = run(tmp_path / "in", name="", format=format)
  assert summary["accepted"] == 12 and summary["left_out"]["hidden"]


LINKS = [  # what is made, the input, the documents, what is left out
  (lambda f: (f / "l").symlink_to("../far"), "", "abc", {}),
  (lambda f: (f / "l").symlink_to("../far"), "**/*.txt", "abc", {}),
  (lambda f: (f / "l").symlink_to("../far"), "*/*.txt", "b", {}),
  (lambda f: [(f / n).symlink_to(t) for n, t in (("l", "../far"), ("m", "../far/deep"))], "", "abc", {}),
  (lambda f: [(f / n).symlink_to(".") for n in "lmno"], "", "a", {}),
  (lambda f: [(f / n).symlink_to(".") for n in "lmno"], "**/*.txt", "a", {}),
  (lambda f: (f / "l").symlink_to(".."), "", "a", {"linked_back": 1}),
  (lambda f: (f / "l").symlink_to("/"), "", "a", {"linked_back": 1}),
  (lambda f: (f / "0.txt").symlink_to("a.txt"), "", "a", {"linked_twice": 1}),
  (lambda f: (f / "0.txt").symlink_to("a.txt"), "*.txt", "a", {"linked_twice": 1}),
  (lambda f: (f / "0.txt").symlink_to("../far/b.txt"), "", "ab", {}),
  (lambda f: (f / "0").symlink_to("none"), "", "a", {"broken_link": 1}),
  (lambda f: os.mkfifo(f / "0.txt"), "", "a", {"not_a_file": 1}),
  (lambda f: os.mkfifo(f / "0.txt"), "*", "a", {"not_a_file": 1}),
  (lambda f: _write(f / "sub" / "x.txt"), "*", "a", {"folder": 1}),
]


@pytest.mark.parametrize("case", range(len(LINKS)))
def test_each_file_behind_a_link_is_read_once(folder, case):
  make, name, texts, left_out = LINKS[case]
  make(folder)
  assert _texts(folder, name) == (texts, left_out)


REFUSED = [  # what is made, format, task, the input, what the message names
  (lambda f: (f / "b.txt").symlink_to("none"), "text", "", "b.txt is a link to a file that is not there"),
  (lambda f: (f / "b.txt").symlink_to("none"), "text", "*.txt", "b.txt is a link to a file that is not there"),
  (lambda f: os.mkfifo(f / "b.txt"), "text", "b.txt", "a pipe or a device"),
  (lambda f: (f / "a.txt").rename(f / ".a.txt"), "text", "", "1 hidden"),
  *(
    (lambda f, name=name: _write(f / name, POINTER), format, name, f"{name} is a git-lfs pointer")
    for name, format in (
      ("b.txt", "text"),
      ("b.jsonl", "text"),
      ("b.jsonl.gz", "text"),
      ("b.jsonl", "llava-jsonl"),
      ("b.json", "llava-jsonl"),
      ("b.parquet", "parquet"),
      ("b.tar", "webdataset"),
      ("b.tar.gz", "webdataset"),
    )
  ),
  *(
    (lambda f, name=name, data=data: _write(f / name, data), format, name, "is UTF-16 or UTF-32 text")
    for name, format in (("b.jsonl", "text"), ("b.jsonl", "llava-jsonl"), ("b.json", "llava-jsonl"))
    for data in ('{"text": "a"}'.encode(code) for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"))
  ),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_what_cannot_be_read_is_one_line_that_names_it(folder, case):
  make, format, name, message = REFUSED[case]
  make(folder)
  with pytest.raises(UserError) as caught:
    run(folder, "text", name, format)
  assert message in str(caught.value) and "\n" not in str(caught.value)
  assert not (folder.parent / "out").exists()


def test_a_pointer_in_place_of_a_picture_costs_its_record(tmp_path):
  make_folder(tmp_path / "in")
  (tmp_path / "in" / "pictures" / "3.png").write_bytes(POINTER)
  summary, _ = run(tmp_path / "in", max_rejected_share=0.1)
  assert summary["accepted"] == 11 and summary["rejected"] == {"git_lfs_pointer": 1}


BOM = b"\xef\xbb\xbf"
LINE = json.dumps({"text": "fine"}).encode()
UNICODE = "a\u2028b\x85c\x0bd\x0ce\rf"  # none of these ends a line


@pytest.mark.parametrize(
  "name, data, options, texts",
  [
    ("b.jsonl", BOM + LINE + b"\n" + LINE, {}, ["fine"] * 2),
    ("b.jsonl", BOM + b"\n" + LINE + b"\r\n\r\n" + LINE, {}, ["fine"] * 2),
    ("b.jsonl", BOM, {}, []),
    ("b.jsonl.gz", gzip.compress(BOM + LINE + b"\n" + LINE), {}, ["fine"] * 2),
    ("b.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False).encode(), {}, ["a\u2028b\x85c"]),
    ("b.txt", BOM + b"one", {}, ["one"]),
    ("b.txt", BOM + b"one\r\ntwo", {"documents": "line"}, ["one", "two"]),
    ("b.txt", UNICODE.encode() + b"\nlast", {"documents": "line"}, [UNICODE, "last"]),
    ("b.txt", UNICODE.encode() + b"\n\nlast", {"documents": "paragraph"}, [UNICODE, "last"]),
  ],
)
@pytest.mark.parametrize("format", ["text", "llava-jsonl"])
def test_a_line_ends_where_its_users_think(folder, format, name, data, options, texts):
  if format == "llava-jsonl" and not name.endswith(".jsonl"):
    return
  write_lines(folder / "sound.jsonl", [LINE])
  (folder / "a.txt").unlink()
  (folder / name).write_bytes(data)
  _, output = run(folder, "text", "", format, **options)
  assert [record.text.strip() for record in read_back(output, "text")] == [*texts, "fine"]


def test_an_array_that_stands_in_lines_costs_its_line(folder):
  write_lines(folder / "b.jsonl", [b"[1]", LINE, LINE])
  summary, _ = run(folder, "text", "b.jsonl", "llava-jsonl", max_rejected_share=1.0)
  assert summary["accepted"] == 2 and summary["rejected"] == {"broken_json": 1}


BAD_ENTRIES = {
  '{"text": "a", "text": "b"}': "duplicate_key",
  '{"text": [{"b": 1, "b": 2}]}': "duplicate_key",
  '{"text": "a", "n": %s}' % ("9" * 5000): "broken_json",
  "9" * 5000: "broken_json",
  '{"text": "a", "deep": %s}' % ("[" * 5000 + '"]"' + "]" * 5000): "broken_json",
  "[" * 5000 + "]" * 5000: "broken_json",
  '{"text": "\udcff"}': "invalid_utf8",
  '{"text": "a", "other": "\udcff"}': "invalid_utf8",
  '"text"': "broken_json",
  "null": "broken_json",
}


def test_an_entry_of_an_array_costs_itself(folder):
  entries = [LINE.decode(), *(text for bad in BAD_ENTRIES for text in (bad, LINE.decode()))]
  (folder / "b.json").write_bytes(("[" + " ,\n".join(entries) + "]").encode("utf-8", "surrogateescape"))
  summary, _ = run(folder, "text", "b.json", "llava-jsonl", max_rejected_share=1.0, part_records=3)
  reasons = list(BAD_ENTRIES.values())
  assert summary["rejected"] == {reason: reasons.count(reason) for reason in reasons}
  assert summary["accepted"] == len(reasons) + 1
  for cut in ("[", "[1", "[1,", "[1 2]", "[1] x", '["a', '[{"a": 1, "a": 2', "[tru]"):
    (folder / "b.json").write_text(cut)
    with refused("b.json"):
      run(folder, "text", "b.json", "llava-jsonl", output=str(folder.parent / "cut"))


def test_the_pictures_of_a_record_have_a_limit_together(tmp_path):
  folder = make_folder(tmp_path / "in")
  os.truncate(folder / "pictures" / "1.png", 2**40)  # a sparse file
  (folder / "pictures" / "2.png").write_bytes(image(2) + bytes(2**20))
  many = ["pictures/2.png"] * 300
  lines = [chat("pictures/1.png"), chat(many, "<image>" * 300), chat(many[:2], "<image><image>")]
  write_lines(folder / "chat.jsonl", lines)
  summary, output = run(folder, max_rejected_share=1.0)
  assert summary["rejected"] == {"too_large": 2} and len(read_back(output)[0].images) == 2


def test_arrow_files_are_named_with_what_makes_them_parquet(folder):
  _write(folder / "set" / "data-00000-of-00001.arrow")
  with refused("set", ".parquet", "to_parquet"):
    run(folder, "text", "set", "parquet")
