"""The page of a corpus: every count of the summaries stands on it, nothing of a record becomes markup."""

import html
import html.parser
import re

import numpy as np
import pytest
from preparing import chat, make_folder, run, write_lines
from refusals import refused

from jflow.cli import prepare as prepare_command
from jflow.data import corpus
from jflow.data.filters import Filters

EVIL = "<script>alert(1)</script>"


@pytest.fixture
def sets(tmp_path):
  folder = make_folder(tmp_path / "in")
  write_lines(folder / "more.jsonl", [chat(f"pictures/{n}.png", answer=f"{EVIL} {n}") for n in ("1", "2", "none")])
  write_lines(folder / "books.jsonl", [{"text": "word " * (n + 1)} for n in range(50)])
  talks = run(folder, name="", output=str(tmp_path / "talks"), max_rejected_share=0.9, filters=Filters(max_aspect=2.0))
  books = run(folder, "text", "books.jsonl", "text", output=str(tmp_path / "books"))
  return [talks, books]


class Tags(html.parser.HTMLParser):
  def __init__(self, page):
    super().__init__()
    self.seen, self.text = [], []
    self.feed(page)

  def handle_starttag(self, tag, _):
    self.seen.append(tag)

  def handle_data(self, data):
    self.text.append(data)


def test_counts_and_samples_are_on_the_page_as_text(sets):
  measured = [corpus.measured(directory, None, 5) for _, directory in sets]
  read = Tags(corpus.page(measured))
  text = " ".join(read.text)
  for summary, directory in sets:
    assert directory in text and f"{summary['accepted']:,}" in text
    for kind in ("rejected", "filtered"):
      for reason, count in summary[kind].items():
        assert re.search(rf"{reason}\s+{count:,}\b", text), (reason, count)
    for first in summary["first_rejected"].values():
      assert first["message"] in text
  assert "script" not in read.seen and EVIL in text
  assert read.seen.count("img") == 5  # of the first set; the other has no pictures


def test_what_is_counted_is_what_is_there(sets):
  talks, books = (corpus.measured(directory, None, 0) for _, directory in sets)
  assert books.words.tolist() == list(range(1, 51)) and not books.sizes.size and not books.shown
  assert talks.pictures.tolist() == [1] * sets[0][0]["accepted"] and (talks.turns == 2).all()
  assert sorted(talks.sizes[:, 0].tolist())[:2] == [12, 13] and set(talks.sizes[:, 1].tolist()) == {9}


@pytest.mark.parametrize("values", [[0, 1, 2], [0, 10**6], [0.5, 2.5], [7, 7, 9000, 4], []])
def test_a_chart_counts_every_value_once(values):
  chart = corpus._chart("x", np.array(values), True)
  assert "3 of all 5" in corpus._chart("x", np.full(5, 3), True)
  assert sum(int(count.replace(",", "")) for count in re.findall(r": ([\d,]+)</title>", chart)) == len(values)


def test_the_command_writes_one_file_and_refuses_others(sets, tmp_path):
  directories = [directory for _, directory in sets]
  assert prepare_command.main(["--report", *directories, f"--output={tmp_path}/page.html"]) == 0
  assert EVIL not in (tmp_path / "page.html").read_text()
  with refused("page.txt"):
    prepare_command.main(["--report", *directories, f"--output={tmp_path}/page.txt"])
  with refused(tmp_path / "in"):
    prepare_command.main(["--report", str(tmp_path / "in"), f"--output={tmp_path}/page.html"])


@pytest.mark.parametrize("flag, value", [("--cache", "{}/in/chat.jsonl/x"), ("--cache_gib", "1e-06")])
def test_a_cache_that_cannot_hold_a_set_of_a_store_is_named_by_its_flag(sets, tmp_path, flag, value):
  flags = {"--cache": f"{tmp_path}/cache", flag: value.format(tmp_path)}
  with refused(f"{flag}={flags[flag]}"):
    given = [f"{name}={value}" for name, value in flags.items()]
    prepare_command.main(["--report", f"file://{sets[0][1]}", f"--output={tmp_path}/page.html", *given])
