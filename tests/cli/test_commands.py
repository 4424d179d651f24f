"""The command line: a mistake gets one line and exit code 2, help answers, good commands do what they say."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import official_checkpoint
import pytest
import tiny
from PIL import Image

from jflow.__main__ import COMMANDS, main
from jflow.cli import generate as generate_command
from jflow.cli import prepare as prepare_command
from jflow.data.tokenizer import Tokenizer
from jflow.errors import Terminated
from jflow.generation.flow import equations as flow
from jflow.generation.flow.settings import SOLVERS
from jflow.interop.native import save_params
from jflow.outputs import write_json
from jflow.training import config_files

CONFIG = f"{tiny.ROOT}/configs/stage2.py:tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> pathlib.Path:
  """A jflow checkpoint of the tiny model."""
  workdir = tmp_path_factory.mktemp("model") / "run"
  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  params = jax.tree.map(np.asarray, tiny.params())
  save_params(workdir, params, config, Tokenizer.load(str(tiny.TOKENIZER)))
  return workdir


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("picture") / "a.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
  return path


def _run(capsys, *argv) -> tuple[int, str, str]:
  """Runs a command in this process; an exception other than SystemExit would be a traceback, and fails."""
  try:
    code = main([str(a) for a in argv])
  except SystemExit as exit:
    code = exit.code
  out = capsys.readouterr()
  return code or 0, out.out, out.err


def _refused(capsys, *argv) -> str:
  """The one line that a mistake gets; of argparse, the last line below its usage."""
  code, out, err = _run(capsys, *argv)
  assert code == 2 and out == ""
  lines = err.splitlines()
  if lines[0].startswith("usage:"):
    assert ": error: " in lines[-1]
    return lines[-1]
  assert len(lines) == 1 and lines[0].startswith("jflow: "), err
  return lines[0]


# --- as a process -----------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
  "arguments, said",
  [
    (
      ["paint"],
      "jflow: unknown command 'paint'; known: prepare, train, ",
    ),
    (
      ["understand", "--checkpoint=x", "--question=q", "--image=no.png"],
      "jflow: image no.png cannot be read: ",
    ),
    (
      ["train", f"--config={CONFIG}", "--workdir=w", "--config.train.stepz=3"],
      f"jflow: {tiny.ROOT}/configs/stage2.py: unknown field 'stepz' (--config.train.stepz=3); did you mean train.steps?",
    ),
  ],
)
def test_a_mistake_ends_the_process_with_code_2_and_one_line(tmp_path, arguments, said):
  environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-m", "jflow", *arguments]
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.smoke
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_is_printed_with_escapes(monkeypatch, tmp_path, encoding):
  """In a result as in a mistake, also a name of bytes that are no text at all, which no encoding can show."""
  (tmp_path / "text.txt").write_text("one document\n")
  streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
  for name, stream in streams.items():
    monkeypatch.setattr(sys, name, stream)
  command = ["prepare", "--format=text", "--task=text", f"--input={tmp_path / 'text.txt'}"]
  for name, expected in (("ünï-\u732b", 0), ("ünï-\u732b-\udcff", 2)):
    assert main([*command, f"--output={tmp_path}/{name}"]) == expected
    stream = streams["stderr" if expected else "stdout"]
    stream.flush()
    assert name.encode(encoding, "backslashreplace") in stream.buffer.getvalue()
  assert (tmp_path / "ünï-\u732b" / "summary.json").exists() and len(list(tmp_path.iterdir())) == 2


def test_where_python_reads_names_in_another_encoding_it_is_said(tmp_path):
  """In a C locale without UTF-8, what is written would lie under another name, or nowhere."""
  (tmp_path / "ü.txt").write_text("one document\n")
  environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}
  command = [sys.executable, "-m", "jflow", "prepare", "--format=text", "--task=text", "--input=ü.txt"]
  for output, code in (("öut", 2), ("out", 0)):
    done = subprocess.run(
      [*command, f"--output={output}"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code and ("PYTHONUTF8=1" in done.stderr) == bool(code)
  assert json.loads((tmp_path / "out" / "summary.json").read_text())["accepted"] == 1


def test_a_name_that_is_no_text_costs_no_picture(capsys, model, tmp_path):
  output = f"{tmp_path}/a-\udcff"
  code, said, _ = _run(
    capsys,
    "generate",
    f"--checkpoint={model}",
    "--prompt=a ring",
    f"--output={output}",
    "--steps=1",
    f"--json={output}.json",
  )
  assert code == 0 and os.path.exists(f"{output}/sheet.png")
  assert json.loads(open(f"{output}.json").read())["pictures"][0]["file"] == "0000_00.png"
  with Image.open(f"{output}/0000_00.png") as picture:  # a picture says how it was made
    assert picture.text["Description"] == "a ring"
    told = json.loads(picture.text["jflow"])
    assert (told["prompt"], told["seed"], told["steps"], told["checkpoint"]) == ("a ring", 0, 1, model.name)


def test_a_checkpoint_under_a_name_that_is_no_text_is_told(capsys, model, tmp_path):
  os.symlink(model, f"{tmp_path}/a-\udcff")
  code, said, told = _run(
    capsys, "generate", f"--checkpoint={tmp_path}/a-\udcff", "--prompt=a", f"--output={tmp_path}/o"
  )
  assert (code, said) == (2, "") and "--checkpoint" in told and told.count("\n") == 1


def test_a_result_on_standard_output_stands_behind_its_lines(monkeypatch, tmp_path):
  """--json=/dev/stdout where that is a file, of which the lines so far would be written over, and not UTF-8."""
  with open(tmp_path / "all", "w", encoding="ascii") as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    print("before")
    write_json(tmp_path / "all", {"name": "ün"})
    print("after")
  assert (tmp_path / "all").read_text(encoding="utf-8") == 'before\n{\n "name": "ün"\n}\nafter\n'


# --- every command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_a_command(capsys, command):
  code, out, err = _run(capsys, command, "--help")
  assert code == 0 and err == ""
  assert out.startswith(f"usage: python -m jflow {command} ") and len(out.splitlines()) > 5


def test_help_lists_the_commands(capsys):
  code, out, err = _run(capsys, "--help")
  assert code == 0 and err == "" and all(f"  {command} " in out for command in COMMANDS)
  code, out, _ = _run(capsys)
  assert code == 2 and out.startswith("usage:")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_refused(capsys, command):
  assert "jflow" in _refused(capsys, command, "--no_such_flag=1")


# --- generate and understand ------------------------------------------------------------------------------


def test_a_missing_or_unreadable_image(capsys, model, picture, tmp_path):
  ask = lambda file: _refused(capsys, "understand", f"--checkpoint={model}", "--question=q", f"--image={file}")
  assert f"{tmp_path / 'no.png'} cannot be read: No such file" in ask(tmp_path / "no.png")
  assert "cannot be read: Is a directory" in ask(tmp_path)
  (tmp_path / "text.png").write_text("no picture")
  assert "text.png: not a readable PNG, JPEG, WEBP or GIF image" in ask(tmp_path / "text.png")
  (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
  assert "cut.png: the image is " in ask(tmp_path / "cut.png")
  (tmp_path / "empty.png").write_bytes(b"")
  assert "empty.png: the image has no bytes" in ask(tmp_path / "empty.png")


def test_a_prompt_longer_than_the_context(capsys, model, tmp_path):
  long = "red " * 200
  generate = ("generate", f"--checkpoint={model}", f"--output={tmp_path}")
  assert "and the context holds 111: shorten it" in _refused(capsys, *generate, f"--prompt={long}")
  understand = ("understand", f"--checkpoint={model}")
  assert "and the context holds 127: shorten it" in _refused(capsys, *understand, f"--question={long}")


@pytest.mark.parametrize(
  "flags, said",
  [
    ([], "give --prompt=TEXT, or --prompts=FILE"),
    (["--prompts=no.txt"], "--prompts=no.txt cannot be read: No such file"),
    (["--prompt= "], "the prompt is empty"),
    (["--prompt=a", "--steps=0"], "steps=0 must be at least 1"),
    (["--prompt=a", "--steps=many"], "argument --steps: invalid int value"),
    (["--prompt=a", "--guidance=nan"], "guidance=nan"),
    (["--prompt=a", "--num_images=0"], "num_images=0 must be at least 1"),
    (["--prompt=a", "--solver=rk45"], "argument --solver: invalid choice: 'rk45'"),
    (["--prompt=a", "--precision=half"], "argument --precision: invalid choice: 'half'"),
    (["--prompt=a", "--steps=0", "--checkpoint=nowhere"], "steps=0 must be at least 1"),
    (["--prompt=a", "--json=/dev/null/x/y.json"], "--json: directory /dev/null/x cannot be made"),
    (["--prompt=a", "--output=/dev/null/x"], "--output: directory /dev/null/x cannot be made"),
    (["--prompt=a", "--output="], "argument --output: expected a path, got ''"),
    (["--prompt=a", "--outp="], "argument --output: expected a path, got ''"),
    (["--prompt=a", "--output", ""], "argument --output: expected a path, got ''"),
    (["--prompt=a", "--json=out/0000_00.png"], "--json=out/0000_00.png must not be a picture of --output=out"),
    (["--prompt=a", "--output=/proc"], "--output: directory /proc cannot be written"),
    (["--prompt=a", "--checkpoint=nowhere"], "checkpoint nowhere is not a directory"),
    (["--prompt=a", "--checkpoint=."], ". must be a jflow checkpoint"),
  ],
)
def test_generate_refuses(capsys, model, tmp_path, monkeypatch, flags, said):
  monkeypatch.chdir(tmp_path)
  assert said in _refused(capsys, "generate", f"--checkpoint={model}", "--output=out", *flags)


def test_a_checkpoint_of_another_model(capsys, model, tmp_path):
  """config.json of one model beside the weights of another: in jflow's layout and in the published one."""
  mixed = pathlib.Path(shutil.copytree(model, tmp_path / "mixed"))
  config = json.loads((mixed / "config.json").read_text())
  config["model"]["language_model"]["mlp_dim"] = 40
  (mixed / "config.json").write_text(json.dumps(config))
  said = _refused(capsys, "understand", f"--checkpoint={mixed}", "--question=q")
  assert "mlp/down/kernel has shape (2, 48, 32), its config.json asks for (2, 40, 32)" in said

  config["model"]["language_model"]["hight"] = 1
  (mixed / "config.json").write_text(json.dumps(config))
  said = _refused(capsys, "understand", f"--checkpoint={mixed}", "--question=q")
  assert "unknown field model.language_model.hight" in said

  official = official_checkpoint.write(tmp_path / "official", tokenizer=True)
  config = json.loads((official / "config.json").read_text())
  config["language_config"]["intermediate_size"] += 8
  (official / "config.json").write_text(json.dumps(config))
  assert "has the shape" in _refused(capsys, "understand", f"--checkpoint={official}", "--question=q")


def test_a_damaged_checkpoint(capsys, model, tmp_path):
  damaged = pathlib.Path(shutil.copytree(model, tmp_path / "damaged"))
  (damaged / "checkpoints" / "0" / "manifest.json").unlink()
  argv = ("generate", "--prompt=a", f"--output={tmp_path / 'out'}")
  code, _, err = _run(capsys, *argv, f"--checkpoint={damaged}")
  assert code == 2 and err.splitlines()[-1].endswith("holds no complete checkpoint yet")
  assert "the save did not finish" in _refused(capsys, *argv, f"--checkpoint={damaged}/checkpoints/0")


def _beside_the_time(err: str) -> list[str]:
  """Lines of stderr but those that a slow machine gets: that something compiles, and how far it is."""
  return [line for line in err.splitlines() if not line.startswith(("jflow: compil", "generate: "))]


def test_generate_writes_pictures_a_sheet_and_what_it_did(capsys, model, tmp_path):
  (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo blue stars\n", encoding="utf-8")
  out = tmp_path / "out"
  code, said, err = _run(
    capsys,
    "generate",
    f"--checkpoint={model}",
    f"--prompts={tmp_path / 'prompts.txt'}",
    f"--output={out}",
    "--steps=3",
    "--num_images=2",
    "--seed=4",
    "--batch_size=1",
    f"--json={out / 'log' / 'made.json'}",
  )
  assert code == 0 and not _beside_the_time(err)
  names = [f"{i:04d}_{j:02d}.png" for i in range(2) for j in range(2)]
  assert sorted(p.name for p in out.glob("*.png")) == [*names, "sheet.png"] and str(out / "sheet.png") in said
  assert all(Image.open(out / name).size == (16, 16) for name in names)
  made = json.loads((out / "log" / "made.json").read_text())
  assert made["function_evaluations"] == 3
  settings = made["settings"]
  assert (settings["interval"], settings["dtype"], settings["weights"]) == ([0.0, 1.0], "float32", "ema")
  assert [(p["file"], p["prompt"], p["seed"]) for p in made["pictures"]] == [
    (names[0], "a red circle", 4),
    (names[1], "a red circle", 5),
    (names[2], "two blue stars", 4),
    (names[3], "two blue stars", 5),
  ]


@pytest.mark.parametrize(
  "argv",
  [
    ("generate", "--prompt=a", "--output=out", "--checkpoint=x"),
    ("understand", "--question=q", "--checkpoint=x"),
    ("parity", "--golden=x", "--checkpoint=x"),
    ("bench", "generate", "--config=x"),
    ("compile", f"--config={CONFIG}", "--topology=h100:1x1"),
  ],
)
def test_a_folder_in_the_place_of_the_json_file_is_refused_at_once(capsys, tmp_path, monkeypatch, argv):
  monkeypatch.chdir(tmp_path)
  assert "--json=. is a directory: name a file" in _refused(capsys, *argv, "--json=.")


@pytest.mark.parametrize("full", ["0000_00.png", "sheet.png", "made.json"])
def test_a_full_disk_ends_generate_with_one_line(capsys, model, tmp_path, full):
  (tmp_path / full).symlink_to("/dev/full")
  argv = ("generate", f"--checkpoint={model}", "--prompt=a", f"--output={tmp_path}", "--overwrite", "--steps=3")
  code, _, err = _run(capsys, *argv, "--batch_size=1", f"--json={tmp_path / 'made.json'}")
  place = tmp_path / full if full == "made.json" else tmp_path
  assert code == 1 and err.splitlines()[-1] == f"jflow: {place} cannot be written: No space left on device"


def test_a_full_disk_ends_understand_with_one_line(capsys, model, tmp_path):
  (tmp_path / "answer.json").symlink_to("/dev/full")
  argv = ("understand", f"--checkpoint={model}", "--question=Why?", "--max_tokens=5")
  code, _, err = _run(capsys, *argv, f"--json={tmp_path / 'answer.json'}")
  assert code == 1 and "answer.json cannot be written: No space left on device" in err.splitlines()[-1]


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
  "run, code, said",
  [
    ("--help > /dev/full", 1, "jflow: cannot write to standard output: No space left on device\n"),
    ("--help | true", 1, ""),  # nobody reads any more by the time that Python has started
    ("--help >&-", 0, ""),
    ("paint > /dev/full", 2, "jflow: unknown command 'paint'; known: "),
    ("paint >&-", 2, "jflow: unknown command 'paint'; known: "),
  ],
)
def test_output_that_cannot_be_written_ends_without_a_traceback(run, code, said, unbuffered):
  command = f"set -o pipefail; '{sys.executable}' -m jflow {run}"
  environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
  done = subprocess.run(["bash", "-c", command], cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == code and done.stderr.startswith(said), done
  assert done.stderr.count("\n") == bool(said)


@pytest.mark.parametrize("end", ["> /dev/full", "| true", "> FILE"])
def test_an_error_of_another_file_is_not_taken_for_lost_output(tmp_path, end):
  program = "import jflow.__main__ as m; m._run = lambda argv: open('/nowhere/file'); m.main([])"
  command = f"set -o pipefail; '{sys.executable}' -c \"{program}\" {end.replace('FILE', f'{tmp_path}/out')}"
  done = subprocess.run(["bash", "-c", command], cwd=tiny.ROOT, capture_output=True, text=True)
  assert "No such file or directory: '/nowhere/file'" in done.stderr
  assert end != "> FILE" or (tmp_path / "out").read_text() == ""


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
  (tmp_path / "prompts.txt").write_text("a red circle\ntwo stars\n", encoding="utf-8-sig")
  assert generate_command.read_prompts([], tmp_path / "prompts.txt") == ["a red circle", "two stars"]
  (tmp_path / "prompts.txt").write_bytes("a red\u2028circle\r\n \r\ntwo\x85stars".encode())  # no line ends there
  assert generate_command.read_prompts([], tmp_path / "prompts.txt") == ["a red\u2028circle", "two\x85stars"]


def test_generate_replaces_no_earlier_picture_unasked(capsys, model, tmp_path):
  (tmp_path / "0000_00.png").write_bytes(b"of an earlier run")
  argv = ("generate", f"--checkpoint={model}", "--prompt=a red circle", f"--output={tmp_path}", "--steps=3")
  assert "holds 0000_00.png of an earlier run: give another directory, or --overwrite" in _refused(capsys, *argv)
  assert (tmp_path / "0000_00.png").read_bytes() == b"of an earlier run"
  code, _, _ = _run(capsys, *argv, "--overwrite", "--batch_size=1")
  assert code == 0 and Image.open(tmp_path / "0000_00.png").size == (16, 16)


def test_the_flags_offer_the_solvers_there_are():
  assert set(SOLVERS) == set(flow.SOLVERS)


def test_a_question_about_a_picture_that_is_not_there_gets_a_hint(capsys, model):
  argv = ("understand", f"--checkpoint={model}", "--max_tokens=5")
  _, _, err = _run(capsys, *argv, "--question=What is in the picture?")
  assert err == "jflow: the question speaks of a picture and none is given; show one with --image=FILE\n"
  assert _run(capsys, *argv, "--question=Why?")[2] == ""


def test_understand_prints_the_answer(capsys, model, picture, tmp_path):
  file = tmp_path / "answer.json"
  flags = (f"--image={picture}", "--question=What is it?", "--max_tokens=5", f"--json={file}")
  code, out, err = _run(capsys, "understand", f"--checkpoint={model}", *flags)
  assert code == 0 and not _beside_the_time(err)
  made = json.loads(file.read_text())
  assert made["answer"] == out.removesuffix("\n") and made["question"] == "What is it?"
  assert made["images"] == [str(picture)]


# --- train ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  "flags, said",
  [
    (["--config.train.stepz=3"], "unknown field 'stepz'"),
    (["--config=nowhere.py"], "config file nowhere.py does not exist"),
    (
      [f"--config={tiny.ROOT}/configs/stage2.py:huge"],
      "unknown size 'huge'; choose one of 384, 256, tiny, quick, shapes, world",
    ),
    (["--config.mesh.data=2"], "mesh.data x mesh.fsdp x mesh.model = 2 x 1 x 1 does not equal the "),
    (["--config.train.accumulation=3"], "config.train.accumulation must divide"),
    (["--config.model.generation.patch_size=3"], "model.generation.patch_size=3"),
    (["--config.data.tokenizer=nowhere"], "tokenizer.json not found"),
    (["--config.optimizer.trained=('language_model',)"], "matches neither"),
    (["--config.optimizer.muon=('language_model/norm',)"], "matches no parameter named kernel"),
    (["--config.optimizer.rates=(('understanding_encoder',0.1),)"], "matches no trained parameter"),
    (["--config.data.sources=()"], "data.sources"),
    (["--config.train.early_stop=2"], "config.train.early_stop must be 0 without train.validation_every"),
    (["--config.train.init_from=nowhere"], "checkpoint nowhere is not a directory"),
    (["--workdir=/dev/null/run"], "workdir /dev/null/run cannot be written"),
  ],
)
def test_train_refuses(capsys, tmp_path, monkeypatch, flags, said):
  monkeypatch.chdir(tmp_path)
  fields = ("--config.data.shapes.size=20", "--config.compute.compilation_cache=")
  named = [] if any(flag.startswith("--config=") for flag in flags) else [f"--config={CONFIG}"]
  assert said in _refused(capsys, "train", *named, "--workdir=run", *fields, *flags)


def test_a_workdir_that_holds_another_config(capsys, tmp_path):
  fields = ["--config.data.shapes.size=20", "--config.compute.compilation_cache="]
  begun = config_files.load(CONFIG, fields)
  (tmp_path / "config.json").write_text(json.dumps(begun.to_dict()))
  start = ("train", f"--config={CONFIG}", f"--workdir={tmp_path}", *fields)
  said = _refused(capsys, *start, "--config.train.batch_size=4")
  assert f"workdir {tmp_path} holds a run with train.batch_size=8, now 4" in said


def test_a_first_mistake_leaves_the_workdir_free(capsys, tmp_path):
  start = ("train", f"--config={CONFIG}", f"--workdir={tmp_path}", "--config.data.shapes.size=20")
  assert "nowhere" in _refused(capsys, *start, "--config.train.init_from=nowhere")
  assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_command_that_is_interrupted_ends_with_one_line(capsys, monkeypatch, error, code):
  def interrupt(_):
    raise error

  monkeypatch.setattr(prepare_command, "main", interrupt)
  assert main(["prepare"]) == code and capsys.readouterr().err == "jflow: stopped\n"
