"""The commit that reports and checkpoints name."""

import pathlib
import shutil
import subprocess

from jflow import commit as module
from jflow.commit import commit


def git(folder: pathlib.Path, *arguments: str) -> str:
  name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
  return subprocess.run(["git", "-C", folder, *name, *arguments], check=True, capture_output=True, text=True).stdout


def test_a_commit_is_that_of_the_code_and_says_whether_files_differ(tmp_path, monkeypatch):
  file = shutil.copy(module.__file__, tmp_path / "commit.py")
  monkeypatch.setattr(module, "__file__", str(file))
  assert commit() is None
  git(tmp_path, "init")
  (tmp_path / "other.py").write_text("")
  git(tmp_path, "add", "other.py")
  git(tmp_path, "commit", "-m", "of another project")
  assert commit() is None  # a copy that was installed into a checkout of something else
  git(tmp_path, "add", "commit.py")
  git(tmp_path, "commit", "-m", "a")
  head = git(tmp_path, "rev-parse", "HEAD").strip()
  assert commit() == head
  (tmp_path / "new").write_text("")
  assert commit() == head
  file.write_text(file.read_text() + "\n")
  assert commit() == head + "+changes"
