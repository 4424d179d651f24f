"""Config files and the fields of a command line: nothing beside a config is imported, every mistake is one line."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import refusals
import tiny

from jflow.config import RunConfig
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.models.config import ModelConfig, ReaderConfig
from jflow.sections import flat, kinds
from jflow.training import config_files
from jflow.training import workdir as workdirs

STAGE2 = f"{tiny.ROOT}/configs/stage2.py:tiny"
FOLLOW = "from configs import stage2\nget_config = stage2.get_config\n"
CHANGED = FOLLOW + "def get_config(size, c=get_config):\n  c = c(size).to_dict()\n  {}\n  return c\n"
PLANTED = "raise SystemExit('what lies beside a config was imported')\n"


def load(file: pathlib.Path, *settings: str) -> RunConfig:
  return config_files.load(f"{file}:tiny", settings)


def refused(named: str, *arguments: str) -> str:
  with pytest.raises(UserError) as error:
    config_files.load(named, arguments)
  message = str(error.value)
  assert message.isprintable() and len(message) < 1200
  return message


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
  """A folder where others can write: whatever a run imports lies in it, and beside its folders."""
  for name in ("jax", "numpy", "json", "flax", "configs", "jflow", "random", "grain"):
    (tmp_path / f"{name}.py").write_text(PLANTED)
    (tmp_path / "inner" / name).mkdir(parents=True)
    (tmp_path / "inner" / name / "__init__.py").write_text(PLANTED)
  return tmp_path


def test_what_lies_beside_a_config_or_above_it_is_not_imported(folder):
  (folder / "inner" / "x.py").write_text(FOLLOW)
  command = [
    sys.executable,
    "-m",
    "jflow",
    "train",
    f"--config={folder / 'inner' / 'x.py'}:tiny",
    "--workdir=/dev/null/run",
  ]
  environment = os.environ | {"PYTHONPATH": str(tiny.ROOT), "JAX_PLATFORMS": "cpu"}
  done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr == "jflow: workdir /dev/null/run cannot be written: Not a directory\n"


@pytest.mark.parametrize("name", ["random.py", "types.py", "json.py", "jax.py", "x.py", "a:b.py", "no_suffix"])
def test_a_config_may_have_any_name_and_hides_no_module_of_it(folder, name):
  (folder / name).write_text("import json, random, types\nimport jax, numpy\nassert jax.__version__\n" + FOLLOW)
  before, modules = list(sys.path), {n: id(m) for n, m in sys.modules.items() if not n.startswith("jax.")}
  assert load(folder / name).train.steps == 20
  assert sys.path == before and {n: id(sys.modules.get(n)) for n in modules} == modules
  assert not list(folder.rglob("*.pyc"))


@pytest.mark.parametrize("inside", ["mine", "jax", "random", "jflow", "my.folder"])
def test_a_config_imports_what_lies_in_its_own_folder(tmp_path, inside, monkeypatch):
  """By the folder's name, unless something that is installed has it, and always relatively."""
  own = tmp_path / inside
  own.mkdir()
  (own / "__init__.py").write_text("")
  (own / "base.py").write_text("from . import other\nSTEPS = other.STEPS\n")
  (own / "other.py").write_text("STEPS = 7\n")
  named = f"from {inside} import base as again\nassert again.STEPS == 7\n" if inside == "mine" else ""
  (own / "x.py").write_text(
    f"import jax, random, jflow.errors\nassert jax.__version__ and random.random\nfrom . import base\n{named}"
    "from configs import stage2\n\ndef get_config(size):\n  c = stage2.get_config(size)\n"
    "  c.train.steps = base.STEPS\n  return c\n"
  )
  assert load(own / "x.py").train.steps == 7
  (tmp_path / "link.py").symlink_to(own / "x.py")
  assert load(tmp_path / "link.py").train.steps == 7
  assert load(own / ".." / inside / "x.py").train.steps == 7
  monkeypatch.chdir(own)
  assert load(pathlib.Path("x.py")).train.steps == 7
  assert not [name for name in sys.modules if name.startswith(("mine", "jflow_config"))]
  assert not list(tmp_path.rglob("*.pyc"))


def test_no_bytecode_beside_a_config_is_taken_for_it(tmp_path):
  import py_compile

  bad, good = tmp_path / "bad.py", tmp_path / "x.py"
  bad.write_text(PLANTED)
  good.write_text(FOLLOW)
  cached = tmp_path / "__pycache__" / f"x.{sys.implementation.cache_tag}.pyc"
  py_compile.compile(str(bad), str(cached), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
  assert load(good).train.steps == 20


@pytest.mark.parametrize(
  "source, line, said",
  [
    ("def get_config(size:\n  pass\n", 1, "'(' was never closed"),
    ("x = 1\nraise KeyError('a')\n", 2, "KeyError: 'a'"),
    ("raise ValueError('two\\nlines')\n", 1, "two lines"),
    ("import sys\nsys.exit(3)\n", 2, "the config ends Python (3)"),
    ("raise BaseException('odd')\n", 1, "BaseException: odd"),
    ("import helper\n", 1, "No module named 'helper'"),
    ("x = 1\n\n\ndef get_config(size):\n  return 3\n", 4, "must return a ConfigDict, got a int"),
    ("def get_config(size):\n  pass\n", 1, "must return a ConfigDict, got a NoneType"),
    ("def get_config():\n  pass\n", 1, "takes no size, got 'tiny'"),
    ("def get_config(size):\n  return get_config(size)\n", 2, "RecursionError"),
    ("def get_config(size):\n  return {'a': {'b': 1}}\n", 0, "the config has no"),
    ("x = 3\n", 0, "must have a function get_config(size)"),
    ("get_config = 3\n", 0, "must have a function get_config(size)"),
    ("x = 1\0\n", 1, "null bytes"),
    (FOLLOW + "def get_config(size, c=get_config):\n  c = c(size)\n  del c.train['ema']\n  return c\n", 0, "train.ema"),
    (FOLLOW + "def get_config(size, c=get_config):\n  c = c(size)\n  c.train.steps = '3'\n  return c\n", 5, "steps"),
    (CHANGED.format("c[3] = 1"), 3, "no config"),
    (CHANGED.format("c['train'][1, 2] = 1"), 3, "no config"),
    (CHANGED.format("import ml_collections as m; c['size'] = m.config_dict.required_placeholder(str)"), 3, "no config"),
    (CHANGED.format("c['model'] = 'x'"), 0, "config.model must be a section"),
    (CHANGED.format("c['model'] = object()"), 0, "config.model must be a section"),
    (CHANGED.format("c['model']['language_model']['layers'] = 8"), 0, "model.language_model.layers"),
  ],
)
def test_a_config_that_fails_is_one_line_with_its_place(tmp_path, capfd, source, line, said):
  file = tmp_path / "x.py"
  file.write_text(source)
  message = refused(f"{file}:tiny")
  assert message.startswith(f"{file}:{line}: " if line else f"{file}: ") and said in message
  assert capfd.readouterr() == ("", "")


def test_what_a_config_prints_is_no_result(tmp_path, capsys):
  (tmp_path / "x.py").write_text("print('hello')\n" + FOLLOW)
  load(tmp_path / "x.py")
  assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize("named", ["", "x", "configs", "/dev/null", ":", "::", "x\0y", "a" * 5000, "x:tiny"])
def test_a_config_that_is_not_there(named):
  assert "does not exist" in refused(named)


@pytest.mark.parametrize("size", ["nonsense", "tiny:tiny", "9" * 5000, "\n", "٣"])
def test_a_size_that_no_config_has(size):
  assert "unknown size" in refused(f"{tiny.ROOT}/configs/stage2.py:{size}")


# --- --config.FIELD=VALUE -----------------------------------------------------------------------------------

LONG = "5" * 5000
DEEP = "(" * 500
EMPTY = "(" * 100 + ")" * 100  # ()
ODD = (
  "",
  "nan",
  "inf",
  "-inf",
  "1e400",
  "2.5",
  LONG,
  DEEP,
  "(1,",
  "[",
  "'",
  "b'x'",
  "{}",
  "None",
  "true",
  "1+2j",
  "\n",
  "٣",
  "a b",
  "a,b",
  "9" * 22,
  "-0",
  EMPTY,
  "(1e400,)",
  "('\\x00',)",
  "(None,)",
  "-" * 3000 + "1",
)
# Field -> those of ODD that it takes, and as what.
TAKES = {
  "optimizer.warmup_steps": {"-0": 0},
  "train.ema": {"-0": 0.0},
  "train.watchdog_seconds": {"2.5": 2.5, "-0": 0.0},
  "log.tensorboard": {"true": True},
  "train.init_from": {value: value for value in ODD if value != "\n"},
  "optimizer.muon": {
    "true": ("true",),
    "nan": ("nan",),
    "inf": ("inf",),
    "-inf": ("-inf",),
    "٣": ("٣",),
    "-" * 3000 + "1": ("-" * 3000 + "1",),
    EMPTY: (),
  },
  "optimizer.rates": {EMPTY: ()},
  "data.mixture": {EMPTY: ()},
  "train": {},
  "objective.weights": {},
}


@pytest.mark.parametrize("field", TAKES)
def test_any_value_for_any_field(field):
  for value in ODD:
    alone = field == "log.tensorboard" or value.startswith("--")  # what stands behind it is not its value
    alone = alone or value not in TAKES[field]  # refused behind it by what refuses it beside it
    for arguments in ([f"--config.{field}={value}"], [f"--config.{field}", value])[: 1 if alone else 2]:
      if value in TAKES[field]:
        read = functools.reduce(getattr, field.split("."), config_files.load(STAGE2, arguments))
        assert read == TAKES[field][value] and type(read) is type(TAKES[field][value])
      else:
        assert f"config.{field}" in refused(STAGE2, *arguments), value


@pytest.mark.parametrize("pattern", [".*", ".*lora.*", "(a|b)/c", "[ab].*", "./runs/a", "2d/x"])
def test_a_pattern_without_quotes_is_the_only_element(pattern):
  config = config_files.load(STAGE2, [f"--config.optimizer.muon={pattern}"])
  assert config.optimizer.muon == (pattern,)


@pytest.mark.parametrize(
  "argument, named",
  [
    ("--config.train.stpes=3", "unknown field 'stpes' (--config.train.stpes=3); did you mean train.steps?"),
    ("--config.learning_rate=3", "did you mean optimizer.learning_rate?"),
    ("--config.a.b.c=3", "unknown field 'a' (--config.a.b.c=3)"),
    ("--config.train.steps.x=3", "train.steps is a field"),
    ("--config.=3", "unknown field '' (--config.=3)"),
    ("--config..=3", "unknown field '' (--config..=3)"),
    ("--config.data.mixture[0]=3", "did you mean data.mixture?"),
    ("--config.__class__=3", "unknown field '__class__'"),
    ("--config.items=3", "unknown field 'items'"),
    ("--config.train={'steps': 3}", "names a section"),
    ("--config.train.steps", "--config.train.steps needs a value"),
    ("--noconfig.train.steps", "must be a whole number"),
    ("--flagfile=/etc/hostname", "unknown argument '--flagfile=/etc/hostname'"),
    ("steps=3", "unknown argument 'steps=3'"),
    ("--", "unknown argument '--'"),
  ],
)
def test_an_argument_that_is_no_field(argument, named):
  assert named in refused(STAGE2, argument)


def test_a_field_that_is_named_again():
  """The last value counts, so that a launcher's own can be replaced; those of a tuple add up."""
  again = (
    "--config.train.steps=1",
    "--config.train.steps=2",
    "--config.optimizer.muon=a",
    "--config.optimizer.muon=b(c|d)",
  )
  read = config_files.load(STAGE2, [*again, "--config.log.tensorboard", "--config.checkpoint.keep", "5"])
  assert read.train.steps == 2 and read.optimizer.muon == ("a", "b(c|d)")
  assert read.log.tensorboard is True and read.checkpoint.keep == 5
  tags = "--config.data.shapes.tags"
  assert config_files.load(STAGE2, [f"{tags}={{'a': 1}}", f"{tags}={{'b': 2}}"]).data.shapes.tags == {"b": 2.0}
  assert config_files.load(STAGE2, [f"{tags}={{'a': 1}}", f"{tags}=None"]).data.shapes.tags is None


def test_each_field_has_a_value_in_the_file_and_comes_back():
  """Of configs/base.py each field is one of the typed config; config.json gives the same config again."""
  read = config_files.load(STAGE2)
  others = ("model.", "objective.weights.", "objective.draws.", "sampling.", "rl.explore.")
  named = {name for name, _ in flat(read.to_dict()) if not name.startswith(others)}
  assert named | {"objective.weights", "objective.draws", "sampling", "rl.explore"} == {
    name for name, _ in kinds(RunConfig)
  }
  again = RunConfig.from_dict(json.loads(json.dumps(read.to_dict())), ModelConfig.from_dict)
  assert again == read and list(flat(again.to_dict())) == list(flat(read.to_dict()))


@pytest.mark.parametrize("name", ["train.stpes", "data.shapes.sizes", "trian"])
def test_a_field_that_no_config_has_is_refused_in_a_file_too(tmp_path, name):
  assigned = f"  c.{name} = 3\n"
  (tmp_path / "x.py").write_text(
    f"from configs import stage2\n\ndef get_config(size):\n  c = stage2.get_config(size)\n{assigned}  return c\n"
  )
  assert f"unknown field {name}" in refused(f"{tmp_path / 'x.py'}:tiny")


HUGE = 10**9
NEVER = {  # field -> values that are refused before anything is built
  **dict.fromkeys(("train.batch_size", "mesh.data", "checkpoint.interval"), (0, -1, 2**40, "3", 2.5, None, True)),
  "train.steps": (-1, 2**40, "3", 2.5, None, True),  # 0 needs train.epochs: test_setup.py
  **dict.fromkeys(
    ("mesh.fsdp", "mesh.model", "train.batch_size", "data.workers", "data.threads", "data.prefetch"), (HUGE,)
  ),
  **dict.fromkeys(("train.spike_window", "world.fit_images", "data.row_images"), (HUGE, 10**5000)),
  **dict.fromkeys(("model.language_model.num_layers", "model.generation.encoder_blocks"), (10**6, 10**5000)),
  **dict.fromkeys(
    ("optimizer.learning_rate", "objective.draws.time_mean", "train.watchdog_seconds", "data.prompt_drop"),
    (float("nan"), float("inf"), "1", None, True, 1e300j),
  ),
  **dict.fromkeys(
    ("optimizer.trained", "optimizer.frozen", "optimizer.muon"), ("a", ("",), (1,), ("(",), ("a{99999999999}",))
  ),
  "optimizer.rates": ("a", ("a", 0.5), (("a",),), (("a", 0.0),), (("a", True),), (("(", 0.5),), (("", 0.5),)),
  **dict.fromkeys(("train.init_fresh", "train.init_dropped"), ("vae", (3,), None)),
  "data.mixture": (
    3,
    ("((((",),
    ((0, (1, 1)),),
    ((1, (1, 1, 1)),),
    ((0, (0, 0, 0)),),
    ((0, (1, -1, 1)),),
    ((0, "abc"),),
    ((0, (1, 1, float("nan"))),),
    ((0, (1, 1, 1)), (0, (1, 1, 1))),
  ),
  "data.sources.text": ("shapes", (("shapes",),), ((3, 1.0),), (("", 1.0),), (("shapes", float("inf")),)),
  "distributed.coordinator": ("head", "head:99999", "a b:1", 3),
  "data.tokenizer": ("a\nb", "a\0b", 3),
}


@pytest.mark.parametrize("field", NEVER)
def test_values_of_a_config_file_are_checked_as_well(field):
  *sections, name = field.split(".")
  for value in NEVER[field]:
    values = config_files.load(STAGE2).to_dict()
    section = values
    for part in sections:
      section = section[part]
    section[name] = value
    with pytest.raises(UserError) as error:
      RunConfig.from_dict(values, ModelConfig.from_dict)
    assert field in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
  "old, value, now",
  [
    ("data.latents", True, "data.stored"),
    ("objective.time_mean", -0.5, "objective.draws.time_mean"),
    ("train.fit_images", 7, "world.fit_images"),
    ("objective.time_std", 0.25, "objective.draws.time_std"),
  ],
)
def test_the_name_that_a_field_had_before_still_sets_it(tmp_path, old, value, now):
  """In a config file, on the command line, and in the config.json of a run that goes on."""
  (tmp_path / "x.py").write_text(
    f"from configs import stage2\n\ndef get_config(size):\n  c = stage2.get_config(size)\n  c.{old} = {value}\n  return c\n"
  )
  given = config_files.load("stage2:tiny", [f"--config.{now}={value}"])
  assert config_files.load(f"{tmp_path / 'x.py'}:tiny") == given
  assert config_files.load("stage2:tiny", [f"--config.{old}={value}"]) == given
  values = given.to_dict()
  before = values | {"data": values["data"] | {"latents": values["data"].pop("stored")}}
  draws = values["objective"].pop("draws")
  before = before | {"objective": values["objective"] | draws, "train": values["train"] | before.pop("world")}
  workdirs.check_same_run(_run(tmp_path, before), given, Tokenizer.load(given.data.tokenizer))


@pytest.mark.parametrize("odd", [3, "x", None])
def test_an_old_name_beside_what_is_no_section_is_refused(odd):
  values = config_files.load("stage2:tiny").to_dict()
  values["objective"] |= dict(time_mean=0.0, draws=odd)
  with refusals.refused("objective.draws", repr(odd)):
    RunConfig.from_dict(values, ModelConfig.from_dict)


def _run(folder: pathlib.Path, values: dict) -> pathlib.Path:
  """A workdir that has begun with a config."""
  Tokenizer.load(values["data"]["tokenizer"]).save(str(folder / "tokenizer"))
  (folder / "config.json").write_text(json.dumps(values))
  (folder / "data.json").write_text("{}")
  return folder


def test_a_reader_may_be_named_by_its_kind_as_before_it_was_a_section(tmp_path):
  named = config_files.load("stage2:tiny", ["--config.model.reader=shared"]).model.reader
  assert named == ReaderConfig("shared", "learned", 1)
  file = tmp_path / "mine.py"
  file.write_text(
    "from configs import stage2\ndef get_config():\n  c = stage2.get_config('tiny').to_dict()\n"
    "  c['model']['reader'] = 'separate'\n  return c\n"
  )
  assert config_files.load(str(file), []).model.reader == ReaderConfig("separate", "learned", 1)
  set_apart = config_files.load("stage2:tiny", ["--config.model.reader.layers=2", "--config.model.reader.start=token"])
  assert set_apart.model.reader == ReaderConfig("siglip", "token", 2)
  with refusals.refused("model.reader.kind='clip'"):
    config_files.load("stage2:tiny", ["--config.model.reader=clip"])
