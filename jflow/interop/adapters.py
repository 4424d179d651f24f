"""Adapters as folders of their own: what a run with `lora.rank` learned, without the base that it learned beside.

  adapter_model.safetensors  `lora_a` and `lora_b` of each matrix, and the parameters that were trained whole, named as
                             the parameters, keys joined by "/"
  adapter_config.json        rank, alpha, patterns, the names above; the base: its fingerprint, and the type that its
                             matrices were rounded to (`lora.frozen_dtype`); the run, see `Run`

transformers' layout of Janus has PEFT's format in its place, see `peft_layout`. An adapter is merged into a copy of the
matrices that it touches, with the arithmetic of a checkpoint with adapters: the model is that of the run, bit for bit.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jflow import files
from jflow.data import templates
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.generation.base import family, own_settings
from jflow.interop import adapter_files, checkpoints, native, packed, peft_layout, remote, safetensors_io, transfer
from jflow.interop.adapter_files import CONFIG, STEM
from jflow.interop.fields import Fields
from jflow.models import lora
from jflow.models.build import parameter_shapes
from jflow.models.config import ModelConfig
from jflow.models.unified import cast_matrices
from jflow.strict_json import read_object, shown

PEFT_BASE = "base.json"  # beside PEFT's files, which have no place for a fingerprint
DTYPES = ("float32", "bfloat16")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_UNUSED = "understanding_encoder/head/"  # SigLIP's pooling head, which transformers' layout of Janus has no place for


class Base(NamedTuple):
  """The base that an adapter belongs to."""

  fingerprint: str | None  # see `fingerprint`; None: the folder does not tell
  dtype: str  # that its frozen matrices were rounded to


class Run(NamedTuple):
  """How a run told its text and is sampled, which may differ from its base's; None: the folder does not tell."""

  template: str | None = None  # of `data.templates`
  caption_prompt: str | None = None  # `data.caption_prompt`
  tokenizer: str | None = None  # `Tokenizer.reading`
  sampling: Mapping[str, Any] | None = None  # see `generation.base.own_settings`


class Adapter(NamedTuple):
  """An adapter whose files fit a model, its tensors not read yet."""

  directory: pathlib.Path
  base: Base
  whole: tuple[str, ...]  # parameters that it replaces
  read: Callable[[], dict[str, np.ndarray]]  # path -> leaf: of the adapters, and the parameters of `whole`
  run: Run


def fingerprint(params: Mapping[str, Any], config: ModelConfig, without: Collection[str] = ()) -> str:
  """The sha256 over the parameters of a base, rounded to bfloat16, so that it is one in every layout and type.

  It leaves out what a checkpoint may lack or an adapter replaces: heads of training alone, the autoencoder, which some
  layouts have apart, SigLIP's pooling head, and `without`.

  Args:
    params: flat, keys joined by "/".
    config: of the model.
    without: paths.
  """
  stored = family(config.generation).stored
  out = (_UNUSED, f"{stored.part}/") if stored else (_UNUSED,)
  total = hashlib.sha256()
  for path, shape in sorted(parameter_shapes(dataclasses.replace(config, objectives=())).items()):
    if path.startswith(out) or path in without:
      continue
    total.update(f"{path} {list(shape)}\n".encode())
    flat = np.asarray(params[path]).reshape(-1)
    for at in range(0, flat.size, 2**22):
      total.update(flat[at : at + 2**22].astype(_BFLOAT16, copy=False).view(np.uint16).tobytes())
  return total.hexdigest()


def export(source: pathlib.Path, weights: str, layout: str, directory: pathlib.Path) -> None:
  """Writes the adapter of a run.

  Args:
    source: workdir or step.
    weights: "ema" or "raw".
    layout: "jflow", or "transformers" for PEFT's format.
    directory: to write into; must exist.

  Raises:
    UserError: it is no run with adapters, or the layout cannot hold what it trained.
  """
  if packed.is_packed(source):
    raise UserError(f"{source} holds merged weights and no adapter: name the run's workdir")
  step = checkpoints.locate(source)  # which a run that goes on does not change
  found = checkpoints.describe(step, weights=weights)
  workdir = checkpoints.workdir_of(step)
  fields = native.read_config(workdir)
  own, data = fields.get("lora") or {}, fields["data"]
  frozen, trained = map(transfer.flatten, native.load_parts(step, weights))
  scales = {path: x for path, x in frozen.items() if path.endswith(f"/{lora.SCALE}")}
  if not scales:
    raise UserError(f"{source} has no adapter: it was trained with lora.rank=0; convert it without --adapter")
  rank, alpha = own.get("rank"), own.get("alpha")
  if not rank or any(np.any(x != np.float32(alpha / rank)) for x in scales.values()):
    raise UserError(
      f"{workdir / 'config.json'}: lora.rank={rank!r}, lora.alpha={alpha!r} must be those of its adapters"
    )
  config = dataclasses.replace(found.config, objectives=())
  known = parameter_shapes(config)
  whole = {path: x for path, x in trained.items() if path in known}
  base = Base(fingerprint(frozen | trained, config, whole), own.get("frozen_dtype", "float32"))
  words = workdir / "tokenizer"
  reading = Tokenizer.load(str(words)).reading() if words.is_dir() else None
  sampling = found.sampling if "sampling" in fields else None  # of an earlier version
  run = Run(found.template, data.get("caption_prompt") or None, reading, sampling)
  told = {"run": {name: x for name, x in run._asdict().items() if x is not None}}
  if layout == "transformers":
    if whole:
      raise UserError(
        f"{source} trained {sorted(whole)[0]} whole (optimizer.trained), which PEFT's adapters do not hold: use --to=jflow, "
        "or convert the merged model"
      )
    pairs = {path: x for path, x in trained.items() if lora.is_adapter(path)}
    peft_layout.save(directory, config, pairs, rank, alpha)
    files.write_json(directory / PEFT_BASE, {"fingerprint": base.fingerprint, "dtype": base.dtype} | told)
    return
  tensors = {path: x for path, x in sorted(trained.items()) if lora.is_adapter(path)} | dict(sorted(whole.items()))
  body = {
    "format": "jflow",
    "rank": rank,
    "alpha": alpha,
    "patterns": list(own["patterns"]),
    "matrices": [path.removesuffix(lora.SCALE) + "kernel" for path in sorted(scales)],
    "whole": sorted(whole),
    "base": {"fingerprint": base.fingerprint, "dtype": base.dtype},
  } | told
  adapter_files.save(directory, body, {path: np.asarray(x, np.float32) for path, x in tensors.items()})


def describe(path: str | pathlib.Path, config: ModelConfig) -> Adapter:
  """Reads and checks all of an adapter but its tensors.

  Args:
    path: its folder, of either layout, or its name on the Hugging Face hub.
    config: of the model that it is for.

  Raises:
    UserError: it is no adapter, holds a pickle, or does not fit the model or itself.
  """
  directory = remote.local(path)
  if not directory.is_dir():
    raise UserError(f"--adapter={path} is not a directory")
  if not adapter_files.is_adapter(directory):
    raise UserError(f"--adapter={path} has no {CONFIG}: `convert --adapter` writes an adapter")
  values = read_object(directory / CONFIG)
  checkpoint = safetensors_io.Checkpoint(directory, (STEM,))
  if "peft_type" in values:
    read = peft_layout.describe(Fields(values, str(directory / CONFIG)), checkpoint, config)
    base, run = _peft_base(directory, config)
    return Adapter(directory, base, (), read, run)
  return _describe_own(Fields(values, str(directory / CONFIG)), checkpoint, config)


def _describe_own(f: Fields, checkpoint: safetensors_io.Checkpoint, config: ModelConfig) -> Adapter:
  """An adapter of jflow's own layout; see `describe`."""
  f.only("format", "jflow")
  f.get("patterns", list, [])
  rank, alpha = f.get("rank", int), f.get("alpha", float)
  matrices, whole = (_names(f, name) for name in ("matrices", "whole"))
  shapes = parameter_shapes(dataclasses.replace(config, objectives=()))
  wanted = {}
  for path in matrices:
    kernel = shapes.get(path)
    if kernel is None or not path.endswith("/kernel"):
      raise UserError(f"{f.where}: {shown(path)} is no matrix of this model: an adapter of another one?")
    if rank > min(kernel[-2:]):
      raise UserError(f"{f.where}: rank={rank} must be at most {min(kernel[-2:])}, the smaller side of {path}")
    place = path.removesuffix("kernel")
    wanted[place + "lora_a"], wanted[place + "lora_b"] = (*kernel[:-1], rank), (*kernel[:-2], rank, kernel[-1])
  for path in whole:
    if path not in shapes:
      raise UserError(f"{f.where}: {shown(path)} is no parameter of this model: an adapter of another one?")
    wanted[path] = shapes[path]
  run, base = _run(f, config), _base(f.sub("base"))  # after the matrices: another model's settings are a lesser sign
  f.close()
  transfer.check(wanted, checkpoint)

  def read() -> dict[str, np.ndarray]:
    leaves = {name: checkpoint.read(name).astype(np.float32, copy=False) for name in wanted}
    scale = lambda path: np.full(shapes[path][:-2], alpha / rank, np.float32)
    return leaves | {path.removesuffix("kernel") + lora.SCALE: scale(path) for path in matrices}

  return Adapter(checkpoint.directory, base, whole, read, run)


def template_of(adapter: Adapter, base: checkpoints.Described) -> str:
  """Returns the template of a base's turns with an adapter: that of the adapter's run, else the base's.

  Raises:
    UserError: the run had another tokenizer, or that of the base lacks a token of the template.
  """
  run, words = adapter.run, base.tokenizer
  if words is not None and run.tokenizer is not None and run.tokenizer != words.reading():
    raise UserError(
      f"--adapter={adapter.directory} was trained with another tokenizer than that of {base.directory}: name the "
      "checkpoint that its run started from"
    )
  if run.template is None:
    return base.template
  templates.check(run.template, words)
  return run.template


def sampling_of(adapter: Adapter, own: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the sampling settings of a base with an adapter: those of the adapter's run, else the base's `own`."""
  return own if adapter.run.sampling is None else adapter.run.sampling


def changed(params: Mapping[str, Any], config: ModelConfig, adapter: Adapter) -> dict[str, np.ndarray]:
  """The parameters of a base that an adapter changes, merged as `lora.merged` does, by path.

  Args:
    params: of the base, nested, as they are read (not yet in a compute type); not changed.
    config: of the base.
    adapter: from `describe`.

  Raises:
    UserError: the adapter belongs to another base, or a tensor is damaged.
  """
  flat = transfer.flatten(params)
  if adapter.base.fingerprint is not None:
    found = fingerprint(flat, config, adapter.whole)
    if found != adapter.base.fingerprint:
      raise UserError(
        f"--adapter={adapter.directory} was trained beside a base with the fingerprint {adapter.base.fingerprint[:12]}, and "
        f"--checkpoint has {found[:12]}: name the checkpoint that its run started from"
      )
  leaves, out = adapter.read(), {}
  stored = family(config.generation).stored
  kept = {path: x for path, x in flat.items() if not (stored and path.startswith(f"{stored.part}/"))}
  if adapter.base.dtype != "float32":  # what the base holds beyond the type in which the run froze it
    cast = cast_matrices(transfer.nest(kept), np.dtype(adapter.base.dtype), config)
    for path, x in transfer.flatten(cast).items():
      if x is not kept[path] and not np.array_equal(x.astype(np.float32), kept[path]):
        out[path] = x
  kernels = [path.removesuffix(lora.SCALE) + "kernel" for path in leaves if path.endswith(f"/{lora.SCALE}")]
  beside = {path: out.get(path, flat[path]) for path in kernels} | leaves
  return out | transfer.flatten(lora.merged(transfer.nest(beside)))


def _names(f: Fields, name: str) -> tuple[str, ...]:
  """A list of paths in a field."""
  names = f.get(name, list)
  if not all(type(x) is str for x in names) or len(set(names)) < len(names):
    raise UserError(f"{f.where}: {name}={shown(names)} must be a list of different names")
  return tuple(names)


def _base(f: Fields) -> Base:
  """The base as a file tells it."""
  f.only("dtype", *DTYPES)
  base = Base(f.get("fingerprint", str), f.get("dtype", str, "float32"))
  f.close()
  return base


def _run(f: Fields, config: ModelConfig) -> Run:
  """The run as a field of a file tells it."""
  if f.values.get("run") is None:
    f.ignore(["run"])
    return Run()
  f = f.sub("run")
  f.only("template", *templates.TEMPLATES)
  texts = [f.get(name, str, "") or None for name in ("template", "caption_prompt", "tokenizer")]
  f.ignore(["sampling"])
  f.close()
  given = f.values.get("sampling")
  try:
    return Run(*texts, None if given is None else own_settings(family(config.generation), given))
  except UserError as error:
    raise UserError(f"{f.where}: {error}") from None


def _peft_base(directory: pathlib.Path, config: ModelConfig) -> tuple[Base, Run]:
  """The base and the run of an adapter in PEFT's format, which one of another origin does not tell."""
  path = directory / PEFT_BASE
  if not path.is_file():
    return Base(None, "float32"), Run()
  f = Fields(read_object(path), str(path))
  run = _run(f, config)
  return _base(f), run
