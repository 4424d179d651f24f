"""Adapters as folders: beside their base they are the run's own checkpoint, bit for bit; what does not fit is
refused."""

import json
import pathlib
import shutil

import adapted
import janus
import janus_checkpoint
import numpy as np
import pytest
import tiny
from refusals import refused
from safetensors.numpy import load_file, save_file

import jflow
from jflow.cli import convert as command
from jflow.data.tokenizer import Tokenizer
from jflow.inference.loading import load_with_adapters
from jflow.interop import adapter_files, adapters, checkpoints, convert, transfer
from jflow.models import lora

PATTERNS = ("language_model/layers/(attention/query|mlp)", "language_model/head", "generation_.*/blocks_0")
CODES = ("language_model/layers", "generation_head", "understanding_projector", "language_model/head")
CODES += ("understanding_encoder/(layers|patch_embed)",)  # a convolution there
SAMPLING = {"guidance": 4.0, "steps": 3}


def export(run: pathlib.Path, output: pathlib.Path, *flags: str) -> pathlib.Path:
  assert not command.main(["--adapter", f"--input={run}", f"--output={output}", *flags])
  return output


def tiny_run(folder: pathlib.Path, **more) -> pathlib.Path:
  words = Tokenizer.load(str(tiny.TOKENIZER))
  return adapted.save_run(folder, tiny.CONFIG, tiny.params(), words, PATTERNS, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Holds `run`, its `adapter`, and `other`, a base of other weights."""
  folder = tmp_path_factory.mktemp("adapters")
  told = dict(template="chat", caption_prompt="What is this?", sampling=SAMPLING)
  export(tiny_run(folder / "run", **told), folder / "adapter")
  return folder


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
  """Holds the `run` of a Janus, and its adapter as `own` and as `peft`."""
  folder = tmp_path_factory.mktemp("codes")
  words = Tokenizer.load(str(janus_checkpoint.PROCESSOR))
  run = adapted.save_run(folder / "run", janus.CONFIG, janus.params(), words, CODES, template="pro")
  export(run, folder / "own")
  export(run, folder / "peft", "--to=transformers")
  return folder


def weights(path, **more):
  return transfer.flatten(checkpoints.read_checkpoint(path, **more).params)


def beside(base, adapter) -> dict[str, np.ndarray]:
  """The parameters of a base with an adapter merged."""
  found = checkpoints.read_checkpoint(base)
  changed = adapters.changed(found.params, found.config, adapters.describe(adapter, found.config))
  return transfer.flatten(found.params) | changed


def same(a, b) -> None:
  assert set(a) == set(b)
  for path, x in a.items():
    np.testing.assert_array_equal(x, b[path], err_msg=path, strict=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_its_base_it_is_the_checkpoint_of_its_run(tmp_path, tiny_checkpoint, dtype):
  run = tiny_run(tmp_path / "run", frozen_dtype=dtype, whole=("generation_output_norm/scale",))
  got, want = beside(tiny_checkpoint, export(run, tmp_path / "adapter")), weights(run)
  heads = {path for path in got if path.startswith("alignment_head/")}  # of training alone
  same({path: x for path, x in got.items() if path not in heads}, {p: x for p, x in want.items() if p not in heads})
  base = weights(tiny_checkpoint)
  moved = {path for path in got if not np.array_equal(got[path], base[path])}
  kernels = {path.removesuffix(lora.SCALE) + "kernel" for path in adapted.leaves(base, PATTERNS, 0) if "scale" in path}
  assert kernels | {"generation_output_norm/scale"} <= moved
  assert dtype == "bfloat16" or moved == kernels | {"generation_output_norm/scale"}


def test_it_holds_what_was_learned_alone(folder):
  tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
  made = adapted.leaves(weights_of(tiny.params()), PATTERNS, 0)
  same(tensors, {path: x for path, x in made.items() if not path.endswith(lora.SCALE)})
  assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
    "adapter_config.json",
    "adapter_model.safetensors",
  ]


def weights_of(params):
  return {path: np.asarray(x) for path, x in transfer.flatten(params).items()}


def test_models_of_one_base_share_what_no_adapter_changes(folder, tiny_checkpoint):
  base, beside = load_with_adapters(tiny_checkpoint, {"a": folder / "adapter"})
  alone, run = jflow.load(tiny_checkpoint, adapter=folder / "adapter"), jflow.load(folder / "run")
  leaves = lambda model: transfer.flatten(model.params)
  same(*({p: np.asarray(x) for p, x in leaves(model).items()} for model in (beside["a"], alone)))
  same(*({p: np.asarray(x) for p, x in leaves(model).items()} for model in (beside["a"], run)))
  shared = {path for path, x in leaves(base).items() if x is leaves(beside["a"])[path]}
  changed = {path for path in leaves(base) if path not in shared}
  assert changed == {
    path for path, x in leaves(base).items() if not np.array_equal(x, leaves(beside["a"])[path])
  } and len(changed) < len(shared)
  asked = lambda model: model.request("Why?").tokens.tolist()
  assert asked(beside["a"]) == asked(alone) == asked(run) != asked(base)  # the run's template is not the base's
  assert beside["a"].settings() == alone.settings() == run.settings() == base.settings(**SAMPLING) != base.settings()
  assert hash(base.model) == hash(beside["a"].model) and base.model == beside["a"].model  # so that programs are shared


def test_the_fingerprint_of_a_base_is_one_in_every_layout_and_type(tmp_path):
  config = dict(official=janus_checkpoint.OFFICIAL, transformers=janus_checkpoint.TRANSFORMERS)
  found = [janus_checkpoint.write(tmp_path / name, layout) for name, layout in config.items()]
  found.append(janus_checkpoint.write(tmp_path / "bfloat16", dtype="bfloat16"))
  read = [checkpoints.read_checkpoint(path) for path in found]
  one = {adapters.fingerprint(transfer.flatten(x.params), x.config) for x in read}
  assert len(one) == 1
  changed = transfer.flatten(read[0].params)
  changed["language_model/norm/scale"] = changed["language_model/norm/scale"] * np.float32(1.1)
  assert adapters.fingerprint(changed, read[0].config) not in one


def test_pefts_format_holds_the_same(tmp_path, codes):
  own, theirs = codes / "own", shutil.copytree(codes / "peft", tmp_path / "peft")
  read = [adapters.describe(path, janus.CONFIG) for path in (own, theirs)]
  same(read[0].read(), read[1].read())
  assert read[0].base == read[1].base and read[0].run == read[1].run and read[0].run.template == "pro"
  tensors = load_file(theirs / "adapter_model.safetensors")
  name = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight"
  np.testing.assert_array_equal(tensors[name].T, read[0].read()["language_model/layers/attention/query/lora_a"][1])
  (theirs / adapters.PEFT_BASE).unlink()  # of another origin
  assert adapters.describe(theirs, janus.CONFIG).base.fingerprint is None


# --- refusals ---------------------------------------------------------------------------------------------


def edited(folder: pathlib.Path, **fields) -> None:
  path = folder / adapter_files.CONFIG
  values = json.loads(path.read_text()) | fields
  path.write_text(json.dumps({name: x for name, x in values.items() if x is not None}))


def tensors(folder: pathlib.Path, change) -> None:
  path = folder / "adapter_model.safetensors"
  held = load_file(path)
  change(held)
  save_file(held, path)


A = "language_model/head/lora_a"


def pickle_only(folder: pathlib.Path) -> None:
  (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


@pytest.mark.parametrize(
  "damage, named",
  [
    (lambda f: tensors(f, lambda x: x.pop(A)), (A, "lacks")),
    (lambda f: tensors(f, lambda x: x.update(other=x[A])), ("other",)),
    (lambda f: tensors(f, lambda x: x.update({A: x[A][:-1]})), (A, "adapter_model.safetensors")),
    (lambda f: tensors(f, lambda x: x.update({A: x[A].astype(np.float64)})), (A, "F64")),
    (lambda f: edited(f, rank=3), ("lora_a", "3]")),
    (lambda f: edited(f, rank=4096), ("rank=4096",)),
    (lambda f: edited(f, rank=None), ("rank", "adapter_config.json")),
    (lambda f: edited(f, alpha="much"), ("alpha", "much")),
    (lambda f: edited(f, matrices=["language_model/nothing/kernel"]), ("language_model/nothing/kernel",)),
    (lambda f: edited(f, matrices=[7]), ("matrices", "7")),
    (lambda f: edited(f, whole=["nothing"]), ("nothing",)),
    (lambda f: edited(f, dropout=0.1), ("dropout", "0.1")),
    (lambda f: edited(f, base={"fingerprint": "abc", "dtype": "int8"}), ("dtype", "int8")),
    (lambda f: edited(f, run={"template": "prose"}), ("template", "prose")),
    (lambda f: edited(f, run={"tone": "warm"}), ("run", "tone")),
    (lambda f: edited(f, peft_type="IA3"), ("peft_type", "IA3")),
    (pickle_only, ("adapter_model.bin", "pickle")),
    (lambda f: (f / "adapter_model.safetensors").unlink(), ("adapter_model.safetensors",)),
    (lambda f: (f / "adapter_config.json").unlink(), ("adapter_config.json",)),
    (shutil.rmtree, ("--adapter", "damaged")),
  ],
)
def test_a_damaged_adapter_is_refused_before_weights_are_read(tmp_path, folder, damage, named):
  copy = shutil.copytree(folder / "adapter", tmp_path / "damaged")
  damage(copy)
  with refused(*named):
    adapters.describe(copy, tiny.CONFIG)


@pytest.mark.parametrize(
  "fields, named",
  [
    (dict(use_dora=True), "use_dora"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(rank_pattern={"q_proj": 4}), "rank_pattern"),
    (dict(init_lora_weights="pissa"), "pissa"),
    (dict(r=4096), "4096"),
    (dict(r=3), "lora_A"),
    (dict(layers_to_transform=[0]), "layers_to_transform"),
  ],
)
def test_what_peft_can_do_and_jflow_does_not_is_refused(tmp_path, codes, fields, named):
  theirs = shutil.copytree(codes / "peft", tmp_path / "peft")
  edited(theirs, **fields)
  with refused(named):
    adapters.describe(theirs, janus.CONFIG)


def test_an_adapter_of_another_base_is_refused(tmp_path, folder):
  config = checkpoints.read_config(folder / "run")
  other = {
    path: x + np.float32(0.1) if path == "language_model/embed" else x for path, x in weights(folder / "run").items()
  }
  with refused("--adapter", folder / "adapter", "--checkpoint"):
    adapters.changed(transfer.nest(other), config, adapters.describe(folder / "adapter", config))


def test_an_adapter_tells_how_its_run_read_text_and_another_tokenizer_is_refused(tmp_path, folder, tiny_checkpoint):
  base = checkpoints.describe(tiny_checkpoint, tokenizer=True)
  found = adapters.describe(folder / "adapter", base.config)
  words = Tokenizer.load(str(tiny.TOKENIZER))
  assert found.run == adapters.Run("chat", "What is this?", words.reading(), SAMPLING)
  content = json.loads((tiny.TOKENIZER / "tokenizer.json").read_text())
  same = Tokenizer({"tokenizer.json": json.dumps(content, indent=7).encode()}, "the same")
  assert same.fingerprint != words.fingerprint
  assert adapters.template_of(found, base._replace(tokenizer=same)) == "chat"
  older = shutil.copytree(folder / "adapter", tmp_path / "older")
  edited(older, run=None)
  untold = adapters.describe(older, base.config)
  assert adapters.template_of(untold, base) == base.template == "plain"
  own = {"guidance": 7.0}
  assert adapters.sampling_of(untold, own) == own and adapters.sampling_of(found, own) == SAMPLING
  with refused("an adapter of another one"):  # not by its settings, which a model of codes does not have
    adapters.describe(folder / "adapter", janus.CONFIG)
  with refused("an adapter must be named", "3"):
    jflow.load(tiny_checkpoint, adapter=3)
  edited(older, run={"sampling": {"guidance": 0.5}})
  with refused(older / "adapter_config.json", "sampling.guidance"):
    adapters.describe(older, base.config)
  other = Tokenizer.load(str(janus_checkpoint.PROCESSOR))
  with refused("--adapter", folder / "adapter", "tokenizer"):
    adapters.template_of(found, base._replace(tokenizer=other))


@pytest.mark.parametrize(
  "flags, named",
  [
    (dict(to="official"), "official"),
    (dict(to="transformers"), "transformers"),  # which has none of JanusFlow
    (dict(vae=pathlib.Path("vae")), "--vae"),
    (dict(dtype="bfloat16"), "--dtype"),
    (dict(weights="raw"), "raw"),
  ],
)
def test_an_export_that_cannot_be_is_refused_and_leaves_nothing(tmp_path, folder, flags, named):
  with refused(named):
    convert.convert(convert.Conversion(tmp_path / "out", folder / "run", adapter=True, **flags))
  assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_adapters_has_none_to_export(tmp_path, tiny_checkpoint):
  with refused("lora.rank", tiny_checkpoint):
    convert.convert(convert.Conversion(tmp_path / "out", pathlib.Path(tiny_checkpoint), adapter=True))
  words = Tokenizer.load(str(janus_checkpoint.PROCESSOR))
  whole = ("generation_embed/embed",)
  run = adapted.save_run(tmp_path / "run", janus.CONFIG, janus.params(), words, CODES, template="pro", whole=whole)
  with refused("generation_embed/embed", "PEFT"):
    convert.convert(convert.Conversion(tmp_path / "out", run, adapter=True, to="transformers"))
