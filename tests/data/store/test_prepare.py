"""prepare: what goes in comes out, a kill costs nothing, filters count apart, mistakes get one line."""

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from PIL import Image
from preparing import chat, image, make_folder, read_back, run, write_lines
from refusals import refused

from jflow.batch import TASKS
from jflow.cli import prepare as prepare_command
from jflow.data.filters import Filters
from jflow.data.records import Turn, digest
from jflow.data.store import prepare, prepared
from jflow.data.store.partial import open_partial
from jflow.data.store.prepared import PreparedSource
from jflow.world.source import WorldSource

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture
def folder(tmp_path):
  return make_folder(tmp_path / "in")


def test_records_come_out_as_they_went_in(folder):
  summary, output = run(folder, part_records=5)
  assert summary["accepted"] == 12 and summary["rejected"] == {} and summary["schema"] == 1
  assert json.loads(pathlib.Path(output, "summary.json").read_text()) == summary
  for i, record in enumerate(read_back(output)):
    assert record.id == f"r{i}" and record.images == (image(i),) and record.text == ""
    assert record.turns == (Turn("user", "<image>\nWhich?"), Turn("assistant", f"Number {i}, né."))
  outlines = list(PreparedSource(output, "understanding").outlines())
  assert outlines == [record._replace(images=(digest(*record.images),)) for record in read_back(output)]
  assert sorted(os.listdir(folder.parent)) == ["in", "out"]


def test_tfds_reads_the_directory(folder):
  import tensorflow_datasets as tfds

  _, output = run(folder, part_records=5)
  sources = [tfds.builder_from_directory(output).as_data_source("train")]
  named = folder.parent / "data" / prepared.dataset_name("understanding") / "1.0.0"  # where TFDS looks by name
  shutil.copytree(output, named)
  sources.append(tfds.data_source("jflow_understanding", data_dir=folder.parent / "data", split="train"))
  assert [len(source) for source in sources] == [12, 12]
  assert all(sources[0][i]["id"] == sources[1][i]["id"] for i in range(12))
  source = sources[1]
  for i in (0, 4, 5, 11):
    assert source[i]["id"] == f"r{i}".encode() and list(source[i]["images"]) == [image(i)]
    assert json.loads(source[i]["conversations"])[1] == ["assistant", f"Number {i}, né."]
    assert json.loads(source[i]["meta"])["sizes"] == [[12 + i, 9]]


def test_too_many_broken_lines_make_no_output_and_name_the_first(folder):
  lines = [chat("pictures/1.png")] * 97 + [chat("pictures/none.png")] + [chat("pictures/2.png", answer="")] * 2
  write_lines(folder / "chat.jsonl", lines)
  with refused("line 98", "pictures/none.png", "3 of 100", "share=0.02"):
    run(folder, max_rejected_share=0.02)
  assert sorted(os.listdir(folder.parent)) == ["in", "out.partial"]
  (folder / "pictures" / "none.png").write_bytes(image(1))  # found again: its line is read again
  summary, output = run(folder, max_rejected_share=0.02)
  assert summary["accepted"] == len(read_back(output)) == 98 and summary["rejected"] == {"no_answer": 2}
  assert sorted(os.listdir(folder.parent)) == ["in", "out"]


def test_a_larger_share_goes_on_with_what_is_done(folder, monkeypatch):
  lines = [{"id": str(i), "text": f"Document {i}." if i % 10 else ""} for i in range(40)]
  write_lines(folder / "books.jsonl", lines)
  with refused("4 of 40"):
    run(folder, "text", "books.jsonl", "text")
  monkeypatch.setattr(prepare, "import_part", None)  # no part is read again
  summary, output = run(folder, "text", "books.jsonl", "text", max_rejected_share=0.1)
  assert summary["rejected"] == {"empty_text": 4}
  assert [record.id for record in read_back(output, "text")] == [str(i) for i in range(40) if i % 10]


def test_a_shard_that_the_machine_lost_is_made_again(folder, monkeypatch):
  finish = prepare.finish
  monkeypatch.setattr(prepare, "finish", lambda *_: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run(folder, part_records=4)
  os.truncate(folder.parent / "out.partial" / "part-00001.array_record", 100)
  monkeypatch.setattr(prepare, "finish", finish)
  _, output = run(folder, part_records=4)
  assert [record.id for record in read_back(output)] == [f"r{i}" for i in range(12)]


HARM = {  # to what a killed import left: of a part, whose report alone says that it is whole
  "report": lambda part, name: (part / f"{name}.json").write_text("[]"),
  "report cut": lambda part, name: os.truncate(part / f"{name}.json", 30),
  "report nested": lambda part, name: (part / f"{name}.json").write_text("[" * 100_000),
  "report of text": lambda part, name: (part / f"{name}.json").write_text('{"records": "4", "files": {}}'),
  "report a pipe": lambda part, name: ((part / f"{name}.json").unlink(), os.mkfifo(part / f"{name}.json")),
  "shard of NUL": lambda part, name: _zero(part / f"{name}.array_record"),
  "outlines of NUL": lambda part, name: _zero(part / f"{name}.outlines"),
  "no outlines": lambda part, name: (part / f"{name}.outlines").unlink(),
  "no rejected": lambda part, name: (part / f"{name}.rejected").unlink(),
  "shard a link": lambda part, name: _link(part / f"{name}.array_record", part.parent / "precious"),
  "outlines a pipe": lambda part, name: ((part / f"{name}.outlines").unlink(), os.mkfifo(part / f"{name}.outlines")),
}


def _zero(path):  # as a power cut leaves a file: of its size
  path.write_bytes(bytes(path.stat().st_size))


def _link(path, target):
  target.write_text("mine")
  path.unlink()
  path.symlink_to(target)


@pytest.mark.parametrize("harm", HARM)
def test_a_part_that_is_not_whole_is_read_again(folder, harm):
  write_lines(folder / "books.jsonl", [{"id": str(i), "text": f"Document {i}." if i else ""} for i in range(12)])
  with refused("1 of 12"):
    run(folder, "text", "books.jsonl", "text", part_records=5)
  HARM[harm](folder.parent / "out.partial", "part-00000")
  _, output = run(folder, "text", "books.jsonl", "text", part_records=5, max_rejected_share=0.1)
  assert [record.id for record in read_back(output, "text")] == [str(i) for i in range(1, 12)]
  if harm == "shard a link":
    assert (folder.parent / "precious").read_text() == "mine"


@pytest.mark.parametrize(
  "job", [None, b"", b"{", b"[]", b"\0" * 40, b"[" * 100_000], ids=lambda value: ascii(value)[:24]
)
def test_work_of_which_nothing_is_known_is_not_removed(folder, job):
  """Parts whose job.json is lost may be days of work; and a folder of that name may be the user's."""
  write_lines(folder / "books.jsonl", [{"text": f"Document {i}." if i else ""} for i in range(12)])
  with refused("1 of 12"):
    run(folder, "text", "books.jsonl", "text", part_records=5)
  partial = folder.parent / "out.partial"
  (partial / "job.json").unlink()
  if job is not None:
    (partial / "job.json").write_bytes(job)
  before = sorted(os.listdir(partial))
  with refused("out.partial", "part-00000", "job.json"):
    run(folder, "text", "books.jsonl", "text", part_records=5, max_rejected_share=0.1)
  assert sorted(os.listdir(partial)) == before


def test_a_kill_while_the_job_was_written_leaves_nothing_in_the_way(tmp_path):
  partial = tmp_path / "out.partial"
  partial.mkdir()
  (partial / "job.json.1a2b3c4d.part").write_bytes(b"{")
  open_partial(str(partial), {"a": 1}, "--output").close()
  assert sorted(os.listdir(partial)) == ["job.json", "lock"]


def test_a_file_system_without_links_gets_copies(folder, monkeypatch):
  def refuse(*_):
    raise PermissionError(1, "Operation not permitted")

  monkeypatch.setattr(os, "link", refuse)
  _, output = run(folder, part_records=5)
  assert [record.id for record in read_back(output)] == [f"r{i}" for i in range(12)]


@pytest.mark.parametrize("task", TASKS)
def test_the_built_in_world_is_drawn_once(tmp_path, task):
  output = str(tmp_path / "out")
  summary = prepare.prepare("shapes", output, task, records=7, seed=3, image_size=32)
  world = WorldSource(task, 7, 3)
  assert summary["accepted"] == 7
  for i, record in enumerate(read_back(output, task)):
    assert (record.text, record.turns) == (world[i].text, world[i].turns)
    for picture, scene in zip(record.images, world[i].images, strict=True):
      np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(picture))), scene.render(32))


@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_a_killed_run_goes_on_without_losing_or_doubling(folder, monkeypatch, killed_after):
  imported = []
  import_part = prepare.import_part

  def killed(importer, part, stem, *rest):
    if len(imported) == killed_after:
      pathlib.Path(stem + ".array_record").write_bytes(b"half")
      raise KeyboardInterrupt
    imported.append(os.path.relpath(stem, folder.parent))
    return import_part(importer, part, stem, *rest)

  monkeypatch.setattr(prepare, "import_part", killed)
  with pytest.raises(KeyboardInterrupt):
    run(folder, part_records=3)
  assert not (folder.parent / "out").exists()
  killed_after = 99
  summary, output = run(folder, part_records=3)
  assert imported == [f"out.partial/part-{index:05d}" for index in range(4)]
  assert [record.id for record in read_back(output)] == [f"r{i}" for i in range(12)] and summary["accepted"] == 12


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_gets_one_clear_line_and_costs_nothing(folder, processes):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(folder / "pictures" / "noise.png")
  write_lines(folder / "chat.jsonl", [chat("pictures/noise.png", id=f"r{i}") for i in range(60)])
  files = f"--input={folder}/chat.jsonl", f"--output={folder.parent}/out"
  options = "--format=llava-jsonl", "--task=understanding", "--part_records=30", f"--processes={processes}"
  command = f"""
import resource, sys
from jflow.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
sys.exit(main({["prepare", *files, *options]!r}))
"""
  done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert "File too large; run the same command again to go on" in done.stderr
  summary, output = run(folder, part_records=30)
  assert summary["accepted"] == 60 and sorted(os.listdir(folder.parent)) == ["in", "out"]


def test_parts_of_another_input_are_not_used(folder, monkeypatch):
  import_part = prepare.import_part

  def killed(importer, part, stem, *rest):
    if stem.endswith("part-00002"):
      raise KeyboardInterrupt
    return import_part(importer, part, stem, *rest)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(prepare, "import_part", killed)
    run(folder, part_records=3)
  write_lines(folder / "chat.jsonl", [chat("pictures/1.png", answer="changed")] * 10)
  _, output = run(folder, part_records=3)
  assert [record.turns[1].text for record in read_back(output)] == ["changed"] * 10


def test_processes_do_not_change_the_records(folder):
  first, output = run(folder, part_records=3)
  records = read_back(output)
  shutil.rmtree(output)
  second, output = run(folder, part_records=3, processes=2)
  assert first == second and records == read_back(output)


def test_mistakes_get_one_clear_line(folder, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("x")
  with refused("out"):
    run(folder)
  shutil.rmtree(tmp_path / "out")
  for (format, input, output, task), message in [
    (("llava-jsonl", str(folder / "none.jsonl"), str(tmp_path / "out"), "text"), "none.jsonl not found"),
    (("llava-jsonl", "", str(tmp_path / "out"), "text"), "--input"),
    (("parchment", "x", str(tmp_path / "out"), "text"), "--format=parchment"),
    (("shapes", "", str(tmp_path / "out"), "sculpture"), "--task=sculpture"),
    (("shapes", str(folder), str(tmp_path / "out"), "text"), "--input"),
    (
      ("text", str(folder / "pictures" / "1.png"), str(tmp_path / "out"), "text"),
      "1.png",
    ),
    (("shapes", "", str(folder / "chat.jsonl" / "out"), "text"), "chat.jsonl"),
  ]:
    with refused(message):
      prepare.prepare(format, output, task, input)
  for format, flag, value in (
    ("text", "image_root", str(folder)),
    ("text", "image_column", "picture"),
    ("llava-jsonl", "records", 1000),  # the default, but given
    ("llava-jsonl", "seed", 0),
    ("webdataset", "split", "test"),
    ("webdataset", "part_records", 5),
    ("parquet", "documents", "line"),
    ("parquet", "image_size", 32),
    ("tfds", "image_root", str(folder)),
    ("shapes", "text_column", "title"),
  ):
    with refused(f"--format={format}", f"--{flag}"):
      prepare_command.main(
        [f"--format={format}", f"--input={folder}", f"--output={tmp_path / 'out'}", "--task=text", f"--{flag}={value}"]
      )
  (folder / "empty.jsonl").write_bytes(b"")
  with refused("empty.jsonl"):
    run(folder, name="empty.jsonl")
  (folder / "broken.json").write_text("[1, ")
  with refused("broken.json"):
    run(folder, name="broken.json")
  assert not list(folder.parent.glob("*.partial"))


def test_the_command_says_what_comes_next(folder, capsys):
  output = str(folder.parent / "out")
  prepare_command.main(
    [
      "--format=llava-jsonl",
      f"--input={folder}/chat.jsonl",
      f"--output={output}",
      "--task=understanding",
      "--processes=1",
    ]
  )
  printed = capsys.readouterr().out
  assert (
    "12 records with 12 images" in printed and f"--config.data.sources.understanding=\"(('{output}',1.0),)\"" in printed
  )


@pytest.mark.parametrize("arguments", [[], ["--format=papyrus"], ["--max_rejected_share=2"], ["--records=0"]])
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
  full = ["--format=shapes", "--output=x", "--task=text"] if arguments else []
  with pytest.raises(SystemExit) as caught:
    prepare_command.main(full + arguments)
  assert caught.value.code == 2 and "error" in capsys.readouterr().err


def test_a_pattern_that_the_shell_has_opened_is_refused(tmp_path):
  rest = [f"--output={tmp_path / 'out'}", "--format=webdataset", "--task=generation"]
  for inputs in (["--input=a.tar", "--input=b.tar"], ["--input", "a.tar", "b.tar"]):
    with refused("a.tar"):
      prepare_command.main(inputs + rest)
  with refused("https://x.org"):
    prepare_command.main(["--input=https://x.org/{0..1}.tar", *rest])


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_import_that_is_interrupted_says_so_in_one_line(folder, sent, code):
  rows = [chat(f"pictures/{i % 12}.png", answer=f"Answer {i}.", id=f"r{i}") for i in range(20_000)]
  write_lines(folder / "chat.jsonl", rows)
  partial = folder.parent / "out.partial"
  command = [
    sys.executable,
    "-m",
    "jflow",
    "prepare",
    "--format=llava-jsonl",
    f"--input={folder}/chat.jsonl",
    f"--output={folder.parent / 'out'}",
    "--task=understanding",
    "--part_records=200",
    "--processes=2",
  ]
  process = subprocess.Popen(
    command,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=ROOT,
    start_new_session=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
  )
  while not list(partial.glob("part-*.json")) and process.poll() is None:
    time.sleep(0.01)
  # Ctrl-C reaches every process of the terminal, SIGTERM the one that it is sent to.
  os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
  _, said = process.communicate(timeout=60)
  assert process.returncode == code and said == "jflow: stopped; run the same command again to go on\n"


def test_help_teaches(capsys):
  with pytest.raises(SystemExit) as caught:
    prepare_command.main(["--help"])
  text = capsys.readouterr().out
  assert caught.value.code == 0 and '"conversations"' in text and "--max_rejected_share" in text


def _scored(folder):
  """Twelve captions: image i has 12 + i by 9 pixels, a score of i / 2, and none for the last."""
  rows: list[dict] = [
    {"image": f"pictures/{i}.png", "caption": f"number {i}", "aesthetic_score": i / 2, "nsfw": i % 2 == 1}
    for i in range(12)
  ]
  del rows[11]["aesthetic_score"]
  return write_lines(folder / "scored.jsonl", rows)


@pytest.mark.parametrize(
  "filters, kept, counts",
  [
    (Filters(), range(12), {}),
    (Filters(min_size=9), range(12), {}),
    (Filters(max_aspect=2.0), range(7), {"max_aspect": 5}),  # 18 / 9 is still 2
    (Filters(min_aesthetic=2.0), range(4, 11), {"min_aesthetic": 4, "no_aesthetic_score": 1}),
    (Filters(9, 1.9, 2.0), (4, 5), {"min_aesthetic": 4, "max_aspect": 5, "no_aesthetic_score": 1}),
    (Filters(keep=("Aesthetic_Score<=2",)), range(5), {"Aesthetic_Score<=2": 6, "no_Aesthetic_Score": 1}),
    (
      Filters(keep=("aesthetic_score!=3", "words>=2")),
      (*range(6), *range(7, 11)),
      {"aesthetic_score!=3": 1, "no_aesthetic_score": 1},
    ),
    (Filters(keep=("characters<9",)), range(10), {"characters<9": 2}),
    (Filters(keep=("language==en",)), (), {"no_language": 12}),
    (Filters(keep=("nsfw==False",)), (0, 2, 4, 6, 8, 10), {"nsfw==False": 6}),
    (Filters(filter=("filters_of_mine:even",)), range(0, 12, 2), {"filters_of_mine:even": 6}),
  ],
)
def test_filters_keep_what_they_say_and_count_the_others_apart(folder, filters, kept, counts, monkeypatch):
  _scored(folder)
  mine = types.SimpleNamespace(even=lambda record, meta: int(record.text.split()[1]) % 2 == 0 and record.images)
  monkeypatch.setitem(sys.modules, "filters_of_mine", mine)
  if not kept:
    with refused(*counts):
      run(folder, "generation", "scored.jsonl", filters=filters)
    return
  summary, output = run(folder, "generation", "scored.jsonl", filters=filters, max_rejected_share=0.0)
  assert [record.text for record in read_back(output, "generation")] == [f"number {i}" for i in kept]
  assert summary["filtered"] == counts and summary["rejected"] == {}
  assert summary["accepted"] + sum(counts.values()) == 12


@pytest.mark.parametrize(
  "filters, said",
  [
    (Filters(keep=("pwatermark",)), "--keep='pwatermark'"),
    (Filters(keep=("pwatermark<low",)), "pwatermark<low"),
    (Filters(keep=("<0.5",)), "<0.5"),
    (Filters(keep=("pwatermark<nan",)), "pwatermark<nan"),
    (Filters(filter=("os:no_such",)), "os:no_such"),
    (Filters(filter=("no_module_of_mine",)), "no_module_of_mine"),
    (Filters(filter=("os:sep",)), "os:sep"),
    (Filters(filter=("operator:add",)), "operator:add failed on record 'r0'"),
  ],
)
def test_a_filter_that_is_none_is_named(folder, filters, said):
  with refused(said):
    run(folder, filters=filters)


def test_another_version_of_a_filter_starts_an_import_over(folder, tmp_path, monkeypatch):
  _scored(folder)
  with open(folder / "scored.jsonl", "a") as file:
    file.write("{\n" * 2)
  monkeypatch.syspath_prepend(tmp_path)
  for wanted, share in (("True", 0.01), ("'7' in record.text", 0.5)):
    (tmp_path / "filters_in_a_file.py").write_text(f"def keep(record, meta):\n  return {wanted}\n")
    sys.modules.pop("filters_in_a_file", None)
    sys.path_importer_cache.clear()
    mine = dict(filters=Filters(filter=("filters_in_a_file:keep",)), max_rejected_share=share)
    if share == 0.01:
      with refused("max_rejected_share"):
        run(folder, "generation", "scored.jsonl", **mine)
    else:
      summary, _ = run(folder, "generation", "scored.jsonl", **mine)
  assert summary["accepted"] == 1 and summary["filtered"] == {"filters_in_a_file:keep": 11}


def test_filters_may_leave_nothing_and_say_so(folder):
  _scored(folder)
  with refused("min_size", "12"):
    run(folder, "generation", "scored.jsonl", filters=Filters(min_size=10))
  assert os.listdir(folder.parent) == ["in"]


def test_every_image_of_a_record_must_pass(folder):
  row = {"image": ["pictures/1.png", "pictures/11.png"], "text": "One <image>, then <image>."}
  write_lines(folder / "two.jsonl", [row, {**row, "image": ["pictures/1.png", "pictures/2.png"]}])
  summary, output = run(folder, name="two.jsonl", filters=Filters(max_aspect=2.0))
  assert summary["accepted"] == 1 and summary["filtered"] == {"max_aspect": 1}


def test_a_mix_with_and_without_pictures_comes_in_once_per_task(folder):
  plain = {"conversations": chat("", "Why?", "So.")["conversations"]}
  lost = {"conversations": chat("", "<image>\nWhy?", "So.")["conversations"]}
  lines = [chat("pictures/1.png"), plain, {"image": None, **plain}, chat("pictures/2.png")]
  write_lines(folder / "mix.jsonl", lines)
  summary, output = run(folder, name="mix.jsonl", max_rejected_share=0.0)
  assert summary["accepted"] == 2 and summary["filtered"] == {"text_only": 2}
  summary, output = run(folder, "text", "mix.jsonl", max_rejected_share=0.0, output=output + "-text")
  assert summary["accepted"] == 2 and summary["filtered"] == {"with_images": 2}
  others = [
    {"image": "pictures/none.png", "caption": "One."},
    {"image": "pictures/1.png", "text": "<image> it is."},
  ]
  write_lines(folder / "more.jsonl", [*lines, *others, {"text": "A story."}, b"{"])
  summary, _ = run(folder, "text", "more.jsonl", max_rejected_share=0.125, output=output + "-more")
  assert summary["accepted"] == 3 and summary["filtered"] == {"with_images": 4}
  with refused("line 5", "2 of 8"):  # those that were dropped are counted too
    run(folder, name="more.jsonl", max_rejected_share=0.2, output=output + "-few")
  write_lines(folder / "lost.jsonl", [chat("pictures/1.png"), lost])
  summary, _ = run(folder, name="lost.jsonl", max_rejected_share=1.0, output=output + "-lost")
  assert not summary["rejected"] and summary["filtered"] == {"text_only": 1}  # without an image the mark is text


def test_filters_apply_again_to_what_was_prepared(folder):
  _scored(folder)
  _, first = run(folder, "generation", "scored.jsonl")
  prepare.prepare("tfds", first + "2", "generation", first, filters=Filters(min_aesthetic=5.0))
  assert read_back(first + "2", "generation") == read_back(first, "generation")[10:11]


def test_a_run_that_is_killed_for_good_goes_on(folder):
  """SIGKILL of the command while its worker processes write; the same command then gives every record once."""
  rows = [chat(f"pictures/{i % 12}.png", answer=f"Answer {i}.", id=f"r{i}") for i in range(3000)]
  write_lines(folder / "chat.jsonl", rows)
  output = folder.parent / "out"
  command = [
    sys.executable,
    "-m",
    "jflow",
    "prepare",
    "--format=llava-jsonl",
    f"--input={folder}/chat.jsonl",
    f"--output={output}",
    "--task=understanding",
    "--part_records=50",
    "--processes=2",
  ]
  process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
  partial = folder.parent / "out.partial"
  while process.poll() is None and len(list(partial.glob("part-*[0-9].json"))) < 3:
    time.sleep(0.01)
  process.kill()
  assert process.wait() == -signal.SIGKILL and not output.exists()
  done = {path.name: path.stat().st_mtime_ns for path in partial.glob("part-*[0-9].json")}
  assert 3 <= len(done) < 60
  with (
    refused("out.partial"),
    open_partial(str(partial), {}, "--output"),
  ):
    run(folder, part_records=50)
  left = None
  while left != (left := sorted(path.stat().st_mtime_ns for path in partial.glob("part-*.array_record"))):
    time.sleep(0.5)  # the workers end with their parent
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, timeout=120)
  source = PreparedSource(str(output), "understanding")
  assert [record.id for record in source.outlines()] == [f"r{i}" for i in range(3000)]
  assert [source[i].turns[1].text for i in range(0, 3000, 7)] == [f"Answer {i}." for i in range(0, 3000, 7)]
  assert sorted(os.listdir(folder.parent)) == ["in", "out"]
