"""Names of a table: what an installed package declares is loaded when asked for, and its failure is one line."""

import math

import pytest

from jflow.errors import UserError
from jflow.registry import Registry

DECLARED = """[test.things]
good = math:pi
taken = math:e
broken = no_such_module_at_all:thing
absent = math:no_such_attribute
twice = math:pi
odd = math:sqrt
"""


@pytest.fixture
def things(tmp_path, monkeypatch) -> Registry:
  for name, text in (("one", DECLARED), ("two", "[test.things]\ntwice = math:e\n")):
    folder = tmp_path / f"{name}-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(text)
  monkeypatch.syspath_prepend(str(tmp_path))
  return Registry("field", "test.things", {"taken": "math:tau"}, needs=("real",))


def test_a_name_of_jflow_comes_before_one_of_a_package(things):
  assert things.get("good") == math.pi and things.get("taken") == math.tau
  assert things.names()[0] == "taken" and sorted(things.names()[1:]) == ["absent", "broken", "good", "odd", "twice"]


def test_all_of_a_table_is_what_can_be_loaded(things, capsys):
  """A package that fails costs its own names alone, and is told once."""
  assert things.all() == things.all() == {"taken": math.tau, "good": math.pi}
  said = capsys.readouterr().err.splitlines()
  assert sorted(line.split("'")[1] for line in said) == ["absent", "broken", "odd", "twice"]


@pytest.mark.parametrize(
  "name", ["broken", "absent", "twice", "odd", "math:pi", "os", "", None, 3, ["good"], {"good": 1}]
)
def test_a_name_that_gives_nothing_is_one_line(things, name):
  with pytest.raises(UserError) as error:
    things.get(name)
  assert f"field={name!r}" in str(error.value) and "\n" not in str(error.value)
