"""Numbers on the command line: any value of any flag ends in one line that names it, before anything is read."""

import pytest

from jflow.__main__ import main

NONE = "nan inf -inf 1e400 x ٣ 5e 0x10 --".split() + [
  "",
  " ",
  "1\n2",
  "5" * 5000,
  str(10**30),
  "-" + str(10**30),
]
WHOLE = [*NONE, "2.5", "1e3"]  # what no whole number may be
CHECKPOINT = "--checkpoint=/nowhere"
TINY = "--config=configs/stage2.py:tiny"

# Command with what it needs -> flags with whole numbers, and with others.
COMMANDS = {
  "plot /nowhere --output=/dev/null/x.png": (("smooth",), ()),
  f"generate {CHECKPOINT} --prompt=a --output=/dev/null/x": (
    ("steps", "seed", "num_images", "batch_size"),
    ("guidance", "shift"),
  ),
  f"understand {CHECKPOINT} --question=q": (("max_tokens", "seed"), ("temperature", "top_p")),
  f"evaluate --benchmark=shapes {CHECKPOINT} --output=/dev/null/x": (
    ("limit", "batch_size", "seed", "steps", "pictures", "sweep_steps", "part"),
    ("guidance", "sweep_guidance"),
  ),
  "prepare --format=shapes --task=text --output=/dev/null/x": (
    ("processes", "records", "seed", "image_size", "min_size", "part_records"),
    ("max_rejected_share", "max_aspect", "min_aesthetic"),
  ),
  f"prepare --latents --input=/nowhere {CHECKPOINT}": (("batch_size", "seed", "threads"), ()),
  f"prepare --inspect {TINY} --output=/dev/null/x.png": (("rows", "step"), ()),
  f"bench train {TINY}": (("rows", "steps"), ()),
  f"bench generate {CHECKPOINT}": (("repeats", "steps", "batch_size", "prompt_tokens"), ("guidance",)),
  f"bench understand {CHECKPOINT}": (("repeats", "batch_size", "new_tokens", "question_tokens"), ()),
  f"bench data {TINY}": (("pictures", "repeats", "threads", "workers", "plan"), ()),
  f"bench data {TINY} --plan=9": (("hosts", "rows", "steps", "group_records"), ("cache_gib",)),
  f"compile {TINY} --topology=v5e:2x2": (("rows_per_device",), ("effort",)),
  f"serve {CHECKPOINT}": (("port", "slots", "context", "batch", "queue", "max_body"), ("timeout",)),
  f"demo {CHECKPOINT}": (("port", "slots", "context", "batch", "queue", "max_upload"), ("timeout",)),
  f"parity {CHECKPOINT} --golden=/nowhere.npz": ((), ("tolerance",)),
  "convert --from=jflow --to=official --input=/nowhere --output=/dev/null/x": (("seed", "shard_bytes"), ()),
}


def refused(capsys, command: str, *flags: str) -> str:
  try:
    code = main([*command.split(), *flags])
  except SystemExit as exit:
    code = exit.code
  out, err = capsys.readouterr()
  assert code == 2 and out == "" and err.endswith("\n") and err[:-1].isprintable() and len(err) < 1000, err
  return err


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_number_or_no_sound_one(capsys, command):
  whole, others = COMMANDS[command]
  for flag, values in [*((flag, WHOLE) for flag in whole), *((flag, NONE) for flag in others)]:
    for value in values:
      assert f"--{flag}" in refused(capsys, command, f"--{flag}={value}"), (flag, value)


def test_pictures_and_tokens_in_numbers_that_no_machine_holds(capsys):
  _, generate, *_ = COMMANDS
  assert "--num_images" in refused(capsys, generate, f"--num_images={10**9}")
  assert "--interval" in refused(capsys, generate, "--interval", "nan", "1")
  assert "--rows" in refused(capsys, f"bench train {TINY}", f"--rows={10**9}")
  for flag in ("--rows=0", "--steps=0", "--cache_gib=-1"):
    assert flag in refused(capsys, f"bench data {TINY} --hosts=2", flag)
  assert "train.batch_size" in refused(capsys, f"compile {TINY} --topology=v5e:2x2", f"--rows_per_device={10**8}")


def test_an_unknown_flag_and_a_missing_one_are_one_line(capsys):
  assert "--nothing" in refused(capsys, f"generate {CHECKPOINT} --prompt=a --output=x", "--nothing=1")
  assert "--output" in refused(capsys, f"generate {CHECKPOINT} --prompt=a")
  assert "steps" in refused(capsys, f"generate {CHECKPOINT} --prompt=a --output=x", "--steps")
  for mistyped, meant in (("--checkpont=/nowhere", "--checkpoint"), ("--confg=tune", "--config")):
    told = refused(capsys, "train --workdir=x" if "confg" in mistyped else "generate --prompt=a --output=x", mistyped)
    assert mistyped.partition("=")[0] in told and f"{meant}?" in told


@pytest.mark.parametrize(
  "workdir, said",
  [
    ("", "--workdir=''"),
    ("a\0b", "--workdir="),
    ("a\nb", "--workdir="),
    ("/etc/hostname", "workdir /etc/hostname cannot be written"),
    ("/dev/null/x", "workdir /dev/null/x cannot be written"),
    ("/proc/x", "workdir /proc/x cannot be written"),
    ("a" * 5000, "cannot be written: File name too long"),
  ],
)
def test_a_workdir_that_cannot_be(capsys, workdir, said):
  try:
    code = main(["train", TINY, f"--workdir={workdir}"])
  except SystemExit as exit:
    code = exit.code
  out, err = capsys.readouterr()
  assert code == 2 and out == "" and said in err and err.count("\n") == 1
