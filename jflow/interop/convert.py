"""Conversion of checkpoints from and to the published PyTorch layout."""

import dataclasses
import pathlib
import shutil
import sys
import tempfile

import ml_dtypes
import numpy as np

from jflow import checks, files
from jflow.errors import Stopped, UserError, need_text_name
from jflow.interop import official, remote, transfer
from jflow.interop.official import Loaded
from jflow.interop.official_config import config_to_official

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_KEPT = "official"  # folder of a jflow checkpoint with the processor files of the official one it was converted from


@dataclasses.dataclass(frozen=True)
class Conversion:
  """The flags of `convert`; None takes the default that `convert --help` names."""

  output: pathlib.Path  # directory to create
  input: pathlib.Path | None = None
  source: str | None = None  # "official", "jflow" or "huggingface-parts"
  to: str | None = None  # "official" or "jflow"
  llm: pathlib.Path | None = None  # these four: of huggingface-parts
  siglip: pathlib.Path | None = None
  vae: pathlib.Path | None = None
  tokenizer: pathlib.Path | None = None
  dtype: str | None = None  # "float32" or "bfloat16"
  weights: str = "ema"  # or "raw", of a jflow checkpoint
  seed: int = 0  # of the fresh parts of huggingface-parts
  shard_bytes: int = 4 * 2**30  # largest official file


def _read(args: Conversion) -> tuple[Loaded, str, pathlib.Path | None]:
  """The model, its template, and the directory of the official processor's files, if any."""
  dtype = _DTYPES.get(args.dtype)
  if args.source == "huggingface-parts":
    from jflow.interop import parts  # initialises with jax, which the other directions do not need

    missing = [f"--{name}" for name in ("llm", "siglip", "vae") if getattr(args, name) is None]
    if missing:
      raise UserError(f"--from=huggingface-parts needs {', '.join(missing)}")
    loaded = parts.load(args.llm, args.siglip, args.vae, args.tokenizer, dtype, args.seed)
    return loaded, "plain", None
  if args.source == "official":
    return official.load(args.input, args.vae, dtype), "chat", args.input
  from jflow.interop.checkpoints import describe

  found = describe(args.input, vae=args.vae, weights=args.weights)
  if args.to == "official":
    config_to_official(found.config, "float32")  # refuses what that layout cannot hold
  tokenizer = official.load_tokenizer(found.directory, found.config.language_model.vocab_size)
  params = transfer.flatten(found.read_params())
  has_vae = found.config.autoencoder is None or any(path.startswith("vae/") for path in params)
  kept = found.directory.parent / _KEPT
  return Loaded(found.config, params, has_vae, tokenizer), found.template, kept if kept.is_dir() else None


def _write_jflow(output: pathlib.Path, loaded: Loaded, template: str, kept: pathlib.Path | None) -> None:
  from orbax.checkpoint import v1 as ocp

  from jflow.interop.native import save_params

  config = {"model": loaded.config.to_dict(), "data": {"template": template}, "has_vae": loaded.has_vae}
  # By default Orbax copies every host array before it writes, and compresses all of them at once: either would hold the
  # weights in memory twice.
  context = ocp.Context()
  context.memory.deepcopy_host_arrays = context.array.saving.use_compression = False
  with context:
    save_params(output, transfer.nest(loaded.params), config, loaded.tokenizer)
  found = [name for name in official.SIDECARS if kept is not None and (kept / name).is_file()]
  for name in found:
    (output / _KEPT).mkdir(exist_ok=True)
    shutil.copyfile(kept / name, output / _KEPT / name)


def _say_what_is_left_out(loaded: Loaded, to: str) -> None:
  say = lambda text: print(f"jflow: {text}", file=sys.stderr)
  if loaded.tokenizer is None:
    say("no tokenizer.json beside the weights: the result has none, add one before use")
  if not loaded.has_vae:
    say("no VAE (neither vae/ in the directory nor --vae=DIR): the result can answer but not generate images")
  if to == "official":
    if any(p.startswith("alignment_head/") for p in loaded.params):
      say("left out, since it serves training only: alignment_head")
    if loaded.config.autoencoder.kind != "autoencoder_kl":
      say("left out: the VAE, a linear codec that the PyTorch code does not know")
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
    looks = "official" if official.is_official(found) else "jflow"
    if source == "official" and looks == "jflow":
      raise UserError(f"{found / 'config.json'} is missing or not of the published layout (language_config)")
    if source == "jflow" and looks == "official":
      raise UserError(f"{found} is an official checkpoint: use --from=official")
    source = looks
  to = args.to or ("official" if source == "jflow" else "jflow")
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
  loaded, template, kept = _read(args)
  dtype = _DTYPES.get(args.dtype)
  if args.source == args.to == "jflow" and dtype is not None:
    for path, x in loaded.params.items():  # in place, so that each one's memory is free before the next
      loaded.params[path] = x.astype(dtype, copy=False)
  _say_what_is_left_out(loaded, args.to)
  part = args.output.with_name(args.output.name + ".converting")
  shutil.rmtree(part, ignore_errors=True)
  try:
    if args.to == "official":
      official.save(part, loaded.config, loaded.params, loaded.tokenizer, kept, dtype, args.shard_bytes)
    else:
      _write_jflow(part, loaded, template, kept)
    files.publish(part, args.output)
  except OSError as error:
    raise Stopped(f"{args.output} cannot be written: {error.strerror or error}") from None
  finally:
    shutil.rmtree(part, ignore_errors=True)
