"""Conversion of checkpoints between the published PyTorch layouts and jflow's own."""

import dataclasses
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Callable

import ml_dtypes
import numpy as np

from jflow import checks, files
from jflow.data import templates
from jflow.data.tokenizer import Tokenizer
from jflow.errors import Stopped, UserError, need_text_name
from jflow.interop import layouts, published, remote, transfer
from jflow.interop.published import Loaded

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Conversion:
  """The flags of `convert`; None takes the default that `convert --help` names."""

  output: pathlib.Path  # directory to create
  input: pathlib.Path | None = None
  source: str | None = None  # the name of a layout, "jflow" or "huggingface-parts"
  to: str | None = None  # the name of a layout, or "jflow"
  llm: pathlib.Path | None = None  # these four: of huggingface-parts
  siglip: pathlib.Path | None = None
  vae: pathlib.Path | None = None
  tokenizer: pathlib.Path | None = None
  dtype: str | None = None  # "float32" or "bfloat16"
  weights: str = "ema"  # or "raw", of a jflow checkpoint
  adapter: bool = False  # writes the adapter of a run alone
  seed: int = 0  # of the fresh parts of huggingface-parts
  shard_bytes: int = 4 * 2**30  # largest file of a published layout


def _read(args: Conversion) -> tuple[Loaded, pathlib.Path | None]:
  """The model, and the directory of the processor's files of a checkpoint of the layout to write, if there is one."""
  dtype = _DTYPES.get(args.dtype)
  if args.source == "huggingface-parts":
    from jflow.interop import parts  # initialises with jax, which the other directions do not need

    missing = [f"--{name}" for name in ("llm", "siglip", "vae") if getattr(args, name) is None]
    if missing:
      raise UserError(f"--from=huggingface-parts needs {', '.join(missing)}")
    return parts.load(args.llm, args.siglip, args.vae, args.tokenizer, dtype, args.seed), None
  layout = layouts.found(args.input)
  if layout is not None:
    if args.weights != "ema":
      raise UserError(f"--weights={args.weights} must be ema: {args.input} holds one set of weights")
    found = published.describe(layout, args.input, args.vae)
    if args.to != "jflow":
      layouts.of(found.config, args.to).write_config(
        found.config, "float32", None
      )  # refuses what that layout cannot hold
    if found.unread and args.to != layout.name:
      parts = sorted({"/".join(path.split("/")[:2]) for path in found.unread})
      print(
        f"jflow: zeros, since the {layout.name} layout has none and nothing uses it: {', '.join(parts)}",
        file=sys.stderr,
      )
    return Loaded(found.config, found.read(dtype), found.has_vae, found.tokenizer, found.template), args.input
  from jflow.interop.checkpoints import describe

  found = describe(args.input, vae=args.vae, weights=args.weights)
  if args.to != "jflow":
    layouts.of(found.config, args.to).write_config(found.config, "float32", None)
  tokenizer = None
  if (found.directory / "tokenizer.json").is_file():
    tokenizer = Tokenizer.load(str(found.directory))
    templates.check_fits(found.template, tokenizer, found.config)
  params = transfer.flatten(found.read_params())
  has_vae = found.config.autoencoder is None or any(path.startswith(("vae/", "vq/")) for path in params)
  wanted = layouts.names() if args.to == "jflow" else [args.to]
  kept = [folder for name in wanted if (folder := found.directory.parent / name).is_dir()]
  loaded = Loaded(found.config, params, has_vae, tokenizer, found.template, found.sampling)
  return loaded, kept[0] if kept else None


def _write_jflow(output: pathlib.Path, loaded: Loaded, folder: str, kept: pathlib.Path | None) -> None:
  from orbax.checkpoint import v1 as ocp

  from jflow.interop.native import save_params

  config = {"model": loaded.config.to_dict(), "data": {"template": loaded.template}, "has_vae": loaded.has_vae}
  config |= {"sampling": dict(loaded.sampling)} if loaded.sampling else {}
  # By default Orbax copies every host array before it writes, and compresses all of them at once: either would hold the
  # weights in memory twice.
  context = ocp.Context()
  context.memory.deepcopy_host_arrays = context.array.saving.use_compression = False
  with context:
    save_params(output, transfer.nest(loaded.params), config, loaded.tokenizer)
  found = [name for name in published.SIDECARS if kept is not None and (kept / name).is_file()]
  for name in found:
    (output / folder).mkdir(exist_ok=True)
    shutil.copyfile(kept / name, output / folder / name)


def _say_what_is_left_out(loaded: Loaded, to: str) -> None:
  say = lambda text: print(f"jflow: {text}", file=sys.stderr)
  if loaded.tokenizer is None:
    say("no tokenizer.json beside the weights: the result has none, add one before use")
  if not loaded.has_vae:
    say("no VAE (neither vae/ in the directory nor --vae=DIR): the result can answer but not generate images")
  if to == "jflow":
    return
  layout = layouts.of(loaded.config, to)
  if left_out := published.left_out(layout, loaded):
    say(f"left out, since {layout.title}'s {to} layout has no place for it: {', '.join(left_out)}")
  if layout.vae_apart and loaded.config.autoencoder.kind != "autoencoder_kl":
    say("left out: the VAE, a linear codec that the PyTorch code does not know")
  if loaded.sampling:
    told = ", ".join(f"{name}={value}" for name, value in loaded.sampling.items())
    say(f"left out: the sampling settings of this model ({told}), for which that layout has no place")
  if loaded.config.understanding_encoder.gelu != "erf":
    say("the PyTorch code computes SigLIP with the exact GELU, this model with its tanh form: results differ")


def _check_flags(args: Conversion) -> None:
  """Refuses flags without effect, numbers out of range, and an output directory that cannot be created.

  Raises:
    UserError: the flag is named.
  """
  parts = args.source == "huggingface-parts"
  for flag in ("input",) if parts else ("llm", "siglip", "tokenizer"):
    if getattr(args, flag) is not None:
      raise UserError(f"--{flag}={getattr(args, flag)} is not read with --from={args.source}: leave it out")
  if args.adapter:
    for flag in ("vae", "dtype"):
      if getattr(args, flag) is not None:
        raise UserError(f"--{flag}={getattr(args, flag)} is not read with --adapter: leave it out")
  if args.shard_bytes < 1:
    raise UserError(f"--shard_bytes={args.shard_bytes} must be positive")
  checks.seed(args.seed)
  folder = args.output.absolute().parent
  while not folder.exists():
    folder = folder.parent
  try:
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise UserError(f"--output={args.output}: directory {folder} cannot be written: {error.strerror}") from None


def _with_layouts(args: Conversion) -> Conversion:
  """The conversion with `source` and `to` set, and a remote input fetched.

  Raises:
    UserError: the input is missing, or not of the layout named.
  """
  source, found = args.source or ("huggingface-parts" if args.llm else None), args.input
  if source != "huggingface-parts":
    found = None if found is None else remote.local(found)
    if found is None or not found.is_dir():
      raise UserError("give --input=DIR" if found is None else f"input {found} is not a directory")
    layout = layouts.found(found)
    looks = "jflow" if layout is None else layout.name
    if source not in (None, "jflow", looks) and looks == "jflow":
      raise UserError(f"{found / 'config.json'} is missing or not of the {source} layout")
    if source not in (None, looks):
      raise UserError(f"{found} is of the {looks} layout: use --from={looks}")
    source = looks
  if args.adapter and (source != "jflow" or args.to == "official"):
    flag = f"--to={args.to}" if source == "jflow" else f"--from={source}"
    raise UserError(f"--adapter is not for {flag}: it writes the adapter of a run of jflow, --to=jflow or transformers")
  to = args.to or ("official" if source == "jflow" and not args.adapter else "jflow")
  return dataclasses.replace(args, source=source, to=to, input=found)


def convert(args: Conversion) -> None:
  """Reads, converts and writes; leaves nothing behind when it fails.

  Raises:
    UserError: an input is missing, damaged or contradictory.
    Stopped: the output cannot be written.
  """
  need_text_name("--output", args.output)
  if args.output.exists():
    raise UserError(f"output {args.output} exists: name a directory that does not")
  args = _with_layouts(args)
  _check_flags(args)
  if args.adapter:
    return _publish(args.output, lambda part: _write_adapter(args, part))
  loaded, kept = _read(args)
  dtype = _DTYPES.get(args.dtype)
  if args.source == args.to == "jflow" and dtype is not None:
    for path, x in loaded.params.items():  # in place, so that each one's memory is free before the next
      loaded.params[path] = x.astype(dtype, copy=False)
  _say_what_is_left_out(loaded, args.to)

  def write(part: pathlib.Path) -> None:
    if args.to == "jflow":
      _write_jflow(part, loaded, kept.name if kept and args.source == "jflow" else str(args.source), kept)
      return
    beside = kept if args.source in ("jflow", args.to) else None  # else of another layout
    published.save(layouts.of(loaded.config, args.to), part, loaded, beside, dtype, args.shard_bytes)

  _publish(args.output, write)


def _write_adapter(args: Conversion, part: pathlib.Path) -> None:
  from jflow.interop import adapters  # builds the model, which the directions that copy tensors do not need

  part.mkdir(parents=True)
  adapters.export(args.input, args.weights, args.to, part)


def _publish(output: pathlib.Path, write: Callable[[pathlib.Path], None]) -> None:
  """Writes a directory beside its place and moves it there; leaves nothing behind when it fails.

  Raises:
    Stopped: it cannot be written.
  """
  part = output.with_name(output.name + ".converting")
  shutil.rmtree(part, ignore_errors=True)
  try:
    write(part)
    files.publish(part, output)
  except OSError as error:
    raise Stopped(f"{output} cannot be written: {error.strerror or error}") from None
  finally:
    shutil.rmtree(part, ignore_errors=True)
