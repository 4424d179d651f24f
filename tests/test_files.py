"""Files are written whole or not at all, and links are replaced, not followed; what is read is not trusted."""

import errno
import os

import pytest
from refusals import refused

from jflow import files, outputs
from jflow.errors import Stopped
from jflow.strict_json import Malformed


def write_through(path):
  with files.replacing(path) as new, open(new, "wb") as file:
    file.write(b"new")


WRITERS = {
  "text": lambda path: files.write_text(path, "new"),
  "bytes": lambda path: files.write_bytes(path, b"new"),
  "another library": write_through,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_names_its_file_and_leaves_what_was_there(tmp_path, monkeypatch, writer, code):
  path = tmp_path / "file.json"
  path.write_text("old")

  def failing(handle):
    raise OSError(code, os.strerror(code))

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", failing)
    with pytest.raises(OSError) as caught:
      WRITERS[writer](path)
  assert caught.value.filename == str(path) and caught.value.errno == code
  assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.json"]
  WRITERS[writer](path)
  assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.json"]


def test_what_fails_inside_leaves_nothing_and_keeps_its_own_error(tmp_path):
  with pytest.raises(FileNotFoundError) as caught, files.replacing(tmp_path / "a"):
    (tmp_path / "nowhere").read_text()
  assert caught.value.filename == str(tmp_path / "nowhere") and not os.listdir(tmp_path)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
  done, sync, replace = [], os.fsync, os.replace
  monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)))
  monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
  files.write_text(tmp_path / "a", "x")
  part, rename, folder = done
  assert part.startswith(str(tmp_path / "a.")) and (rename, folder) == ("rename", str(tmp_path))


def test_a_link_is_replaced_and_what_it_leads_to_stays(tmp_path):
  (tmp_path / "kept").write_text("old")
  for name in ("a", "b"):
    (tmp_path / name).symlink_to(tmp_path / "kept" if name == "a" else "nowhere")
    files.write_text(tmp_path / name, "new")
    assert (tmp_path / name).read_text() == "new" and not (tmp_path / name).is_symlink()
  assert (tmp_path / "kept").read_text() == "old"


def test_an_output_goes_where_its_link_leads(tmp_path):
  """/dev/stdout is such a link, and a pipe takes no other file's place."""
  (tmp_path / "a").symlink_to(tmp_path / "b")
  outputs.write_json(tmp_path / "a", {"x": 1})
  assert (tmp_path / "a").is_symlink() and (tmp_path / "b").read_text() == '{\n "x": 1\n}\n'
  with refused("no/a", error=Stopped):
    outputs.write_json(tmp_path / "no" / "a", {})


def test_a_folder_gets_its_name_when_all_of_it_is_there(tmp_path):
  (tmp_path / "part" / "in").mkdir(parents=True)
  (tmp_path / "part" / "in" / "a").write_text("x")
  (tmp_path / "part" / "link").symlink_to("nowhere")
  files.publish(tmp_path / "part", tmp_path / "whole")
  assert (tmp_path / "whole" / "in" / "a").read_text() == "x"
  with pytest.raises(OSError):
    files.publish(tmp_path / "whole" / "in", tmp_path / "whole")


def test_names_aside_are_free_ones(tmp_path):
  for number in range(3):
    (tmp_path / "a").write_text(str(number))
    files.keep_copy(tmp_path / "a", "damaged")
  assert [(tmp_path / f"a.damaged{n}").read_text() for n in ("", "-2", "-3")] == ["0", "1", "2"]
  assert files.set_aside(tmp_path / "a", "damaged").name == "a.damaged-4" and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
  "content, said",
  [
    (b"", "Expecting value"),
    (b"{", "Expecting"),
    (b"[]", "list instead of an object"),
    (b"null", "NoneType"),
    (b"\xff", "UTF-8"),
    (b"\0" * 9, "Expecting value"),
    (b"[" * 100_000, "nested"),
    (b'{"a": 1, "a": 2}', "twice"),
    (b'{"a": NaN}', "NaN"),
  ],
  ids=lambda value: ascii(value)[:24],
)
def test_an_object_that_is_none_says_why(tmp_path, content, said):
  (tmp_path / "a").write_bytes(content)
  with refused(said, error=Malformed):
    files.read_object(tmp_path / "a")


def test_what_is_no_file_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  (tmp_path / "loop").symlink_to("loop")
  (tmp_path / "dangling").symlink_to("nowhere")
  for name in ("pipe", ".", "loop"):
    with pytest.raises(Malformed):
      files.read_object(tmp_path / name)
  for name in ("nowhere", "dangling"):
    with pytest.raises(FileNotFoundError):
      files.read_object(tmp_path / name)
  (tmp_path / "file").write_text("mine")
  (tmp_path / "link").symlink_to("file")
  for name in ("pipe", ".", "link"):
    with pytest.raises(OSError):
      files.open_lock(tmp_path / name)
  with files.open_lock(tmp_path / "file") as first, files.open_lock(tmp_path / "file") as second:
    assert files.lock(first) and not files.lock(second)
  assert (tmp_path / "file").read_text() == "mine"


def test_of_several_writers_the_first_one_stays(tmp_path, monkeypatch):
  path = tmp_path / "a.json"
  assert files.write_first(path, "one") and not files.write_first(path, "two")
  assert path.read_text() == "one" and [each.name for each in tmp_path.iterdir()] == ["a.json"]

  def no_links(*_):
    raise OSError(errno.EPERM, "no links here")

  monkeypatch.setattr(os, "link", no_links)
  assert not files.write_first(path, "three") and files.write_first(tmp_path / "b.json", "four")
  assert path.read_text() == "one" and (tmp_path / "b.json").read_text() == "four"
