"""prepare on many machines: shares joined are what one machine makes, and what is missing is named."""

import glob
import os
import pathlib
import shutil

import pytest
from preparing import chat, make_folder, read_back, run, write_lines
from refusals import refused

from jflow.cli import prepare as prepare_command
from jflow.data.store import partial
from jflow.errors import UserError


@pytest.fixture
def folder(tmp_path):
  """Twelve conversations and two lines that are none."""
  made = make_folder(tmp_path / "in")
  with open(made / "chat.jsonl", "ab") as lines:
    lines.write(b"{}\n")
  write_lines(made / "more.jsonl", [chat("pictures/1.png", answer="")])
  return made


OPTIONS = dict(part_records=3, max_rejected_share=0.5)


def contents(output):
  return {str(p.relative_to(output)): p.read_bytes() for p in sorted(pathlib.Path(output).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("machines", [1, 2, 3, 7])
def test_the_shares_joined_are_what_one_machine_makes(folder, machines):
  whole, one = run(folder, **OPTIONS)
  output = str(folder.parent / "many")
  for machine in reversed(range(1, machines + 1)):  # in any order
    share, _ = run(folder, output=output, part=(machine, machines), **OPTIONS)
    assert share["accepted"] < 12 or machines == 1
    assert not os.path.exists(output)
  summary, _ = run(folder, output=output, merge=True, **OPTIONS)
  assert summary == whole and whole["accepted"] == 12 and sum(whole["rejected"].values()) == 1
  assert read_back(output) == read_back(one)
  mine, theirs = contents(output), contents(one)
  assert mine == theirs
  assert sorted(os.listdir(folder.parent)) == ["in", "many", "out"]


def test_what_a_kill_leaves_beside_a_whole_output_is_removed_by_the_same_command(folder):
  output = str(folder.parent / "many")
  for machine in (1, 2):
    run(folder, output=output, part=(machine, 2), **OPTIONS)
    shutil.copytree(f"{output}.machine-0000{machine}-of-00002", folder.parent / f"left{machine}")
  whole, _ = run(folder, output=output, merge=True, **OPTIONS)
  made = contents(output)
  for machine, name in ((1, ".machine-00001-of-00002"), (2, ".partial")):
    shutil.move(folder.parent / f"left{machine}", output + name)
  with refused(output, "exists"):
    run(folder, output=output, merge=True, **{**OPTIONS, "part_records": 4})
  assert sorted(os.listdir(folder.parent)) == ["in", "many", "many.machine-00001-of-00002", "many.partial"]
  assert run(folder, output=output, merge=True, **OPTIONS)[0] == whole
  assert sorted(os.listdir(folder.parent)) == ["in", "many"] and contents(output) == made
  with refused(output, "exists"):
    run(folder, output=output, merge=True, **OPTIONS)


def test_a_share_goes_on_with_its_missing_parts_and_until_then_is_named(folder):
  output = str(folder.parent / "many")
  for machine in (1, 2):
    run(folder, output=output, part=(machine, 2), **OPTIONS)
  (report, *rest) = sorted(glob.glob(f"{output}.machine-00002-of-00002/part-*.json"))
  kept = [pathlib.Path(path).stat().st_mtime_ns for path in rest]
  os.remove(report)  # as a kill leaves it
  with refused("part-00001", "--part=2/2"):
    run(folder, output=output, merge=True, **OPTIONS)
  assert not os.path.exists(output)
  run(folder, output=output, part=(2, 2), **OPTIONS)
  assert [pathlib.Path(path).stat().st_mtime_ns for path in rest] == kept
  assert run(folder, output=output, merge=True, **OPTIONS)[0]["accepted"] == 12


def test_a_changed_byte_of_a_share_is_noticed(folder):
  output = str(folder.parent / "many")
  run(folder, output=output, part=(1, 1), **OPTIONS)
  path = pathlib.Path(sorted(glob.glob(f"{output}.machine-*/part-*.array_record"))[0])
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with refused("--part=1/1"):
    run(folder, output=output, merge=True, **OPTIONS)


def missing(folder, output):
  os.rename(f"{output}.machine-00002-of-00002", f"{folder}/elsewhere")


def other_flags(folder, output):
  run(folder, output=output, part=(2, 2), **{**OPTIONS, "part_records": 4})


def other_input(folder, output):
  write_lines(folder / "chat.jsonl", [chat("pictures/1.png")] * 9)


def two_numbers(folder, output):
  run(folder, output=output, part=(1, 3), **OPTIONS)


def other_version(folder, output):
  shutil.rmtree(f"{output}.machine-00002-of-00002")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(partial, "__version__", "99.0")
    run(folder, output=output, part=(2, 2), **OPTIONS)


@pytest.mark.parametrize(
  "change, part",
  [
    (missing, "--part=2/2"),
    (other_flags, "part_records"),
    (other_input, "files"),
    (two_numbers, "00002 and of 00003"),
    (other_version, "00002/part-00001 by jflow 99.0"),
  ],
)
def test_shares_that_do_not_belong_together_are_refused(folder, change, part):
  output = str(folder.parent / "many")
  for machine in (1, 2):
    run(folder, output=output, part=(machine, 2), **OPTIONS)
  change(folder, output)
  with pytest.raises(UserError) as error:
    run(folder, output=output, merge=True, **OPTIONS)
  assert part in str(error.value) and not os.path.exists(output)


def test_without_shares_there_is_nothing_to_merge(folder):
  with refused("--part=K/N"):
    run(folder, merge=True, **OPTIONS)
  assert sorted(os.listdir(folder.parent)) == ["in"]


@pytest.mark.parametrize("value", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_a_part_must_be_one_of_all(value, capsys):
  with pytest.raises(SystemExit):
    prepare_command.main(["--format=text", "--input=x", "--output=y", "--task=text", f"--part={value}"])
  assert value in capsys.readouterr().err
