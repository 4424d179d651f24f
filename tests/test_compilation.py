"""Laws of compilation: where programs are kept, and what is said of one that takes long."""

import argparse
import threading

import jax
import pytest

from jflow import compilation
from jflow.cli import flags
from jflow.errors import UserError


def test_programs_are_kept_where_a_directory_can_be_written(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setenv("HOME", str(tmp_path))
  assert compilation.cache_directory("~/cache") == str(tmp_path / "cache") and (tmp_path / "cache").is_dir()
  assert compilation.cache_directory("gs://bucket/cache") == "gs://bucket/cache"


@pytest.mark.parametrize("wanted", ["", "/dev/null/cache", "/proc/cache", "~nobody-of-this-name/cache"])
def test_no_programs_are_kept_where_none_can_be(wanted, monkeypatch, capsys):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  assert compilation.cache_directory(wanted) is None
  assert capsys.readouterr() == ("", "")


def test_the_directory_that_jax_reads_from_the_environment_wins(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "theirs"))
  compilation.use_cache(str(tmp_path / "ours"))
  assert jax.config.jax_compilation_cache_dir == before and not (tmp_path / "ours").exists()


def test_what_opens_a_model_shares_the_directory_of_train(tmp_path, monkeypatch):
  before = jax.config.jax_compilation_cache_dir
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  monkeypatch.setenv("HOME", str(tmp_path))
  try:
    with pytest.raises(UserError):
      flags.open_model(
        argparse.Namespace(
          checkpoint=str(tmp_path / "none"), vae=None, dtype=None, weights="ema", template=None, adapter=None
        )
      )
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "jflow")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_long_compilation_says_so_and_how_long_it_took(monkeypatch, capsys):
  told = threading.Event()
  say = compilation.progress.say

  def seen(message):
    say(message)
    told.set()

  monkeypatch.setattr(compilation.progress, "say", seen)
  with compilation.said("a step", patience=0.0):
    assert told.wait(60)
    assert capsys.readouterr().err == "jflow: compiling a step ...\n"
  end = capsys.readouterr().err
  assert end.startswith("jflow: compiled a step after ") and end.endswith(" s\n")


def test_a_short_one_says_nothing_also_where_it_fails(capsys):
  with compilation.said("a step", patience=1e6):
    pass
  with pytest.raises(ZeroDivisionError), compilation.said("a step", patience=1e6):
    raise ZeroDivisionError
  assert capsys.readouterr().err == ""


def test_one_that_fails_does_not_say_that_it_is_done(monkeypatch, capsys):
  told = threading.Event()
  monkeypatch.setattr(compilation.progress, "say", lambda message: (print(message), told.set()))
  with pytest.raises(ZeroDivisionError), compilation.said("a step", patience=0.0):
    assert told.wait(60)
    raise ZeroDivisionError
  assert "stopped compiling a step" in capsys.readouterr().out
