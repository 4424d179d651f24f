"""python -m jflow convert: weights from and to the published PyTorch layout.

--from=official           JanusFlow-1.3B as published, to a jflow checkpoint (or, with --to=official, to other
                          shards or another type)
--from=jflow              a jflow checkpoint, to a directory that the PyTorch code loads unchanged
--from=huggingface-parts  an LLM, a SigLIP and a VAE, to the starting point of stage 1

examples:
  python -m jflow convert --from=official --input=JanusFlow-1.3B --vae=sdxl-vae --output=runs/janusflow
  python -m jflow convert --from=jflow --to=official --input=runs/stage3 --output=for-pytorch
  python -m jflow convert --from=huggingface-parts --llm=deepseek-llm --siglip=siglip-large-patch16-384 \\
    --vae=sdxl-vae --output=runs/parts
"""

import argparse
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jflow import files
from jflow.cli.arguments import SEED, Parser, whole
from jflow.errors import Stopped, UserError, need_text_name
from jflow.inference import checks
from jflow.interop import official, remote, transfer
from jflow.interop.official import Loaded
from jflow.interop.official_config import config_to_official

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_KEPT = "official"  # folder of a jflow checkpoint with the processor's files of the official one it came from
_IN_FLIGHT = 2**29  # bytes that a writing checkpoint may hold beside the parameters


def _parser() -> argparse.ArgumentParser:
  p = Parser(prog="python -m jflow convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  kinds = ("official", "huggingface-parts", "jflow")
  p.add_argument("--from", dest="source", choices=kinds, help="layout of --input (default: what it looks like)")
  p.add_argument("--to", choices=("official", "jflow"), help="layout of --output (default: the other one)")
  p.add_argument("--input", type=pathlib.Path, help="checkpoint directory; not for --from=huggingface-parts")
  p.add_argument("--output", type=pathlib.Path, required=True, help="directory to create")
  p.add_argument("--llm", type=pathlib.Path, help="huggingface-parts: directory of a LlamaForCausalLM")
  p.add_argument("--siglip", type=pathlib.Path, help="huggingface-parts: directory of a Siglip(Vision)Model")
  p.add_argument("--vae", type=pathlib.Path, help="directory of a diffusers AutoencoderKL (sdxl-vae)")
  p.add_argument("--tokenizer", type=pathlib.Path, help="huggingface-parts: default the LLM's directory")
  p.add_argument("--dtype", choices=tuple(_DTYPES), help="type of the weights (default: as they are)")
  p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a jflow checkpoint (default: ema)")
  p.add_argument("--seed", type=whole(most=SEED), default=0, help="of the fresh parts of huggingface-parts")
  p.add_argument(
    "--shard_bytes",
    type=whole(most=2**62),
    default=4 * 2**30,
    help="largest official file (default: 4 GiB)",
  )
  return p


def _read(args: argparse.Namespace) -> tuple[Loaded, str, pathlib.Path | None]:
  """Returns the model, its template, and the directory of the official processor's files, if any."""
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
    config_to_official(found.config, "float32")  # refuses what that layout has no place for
  tokenizer = official.load_tokenizer(found.directory, found.config.language_model.vocabulary_size)
  params = transfer.flatten(found.read_params())
  has_vae = any(path.startswith("vae/") for path in params)
  kept = found.directory.parent / _KEPT
  return Loaded(found.config, params, has_vae, tokenizer), found.template, kept if kept.is_dir() else None


def _write_jflow(output: pathlib.Path, loaded: Loaded, template: str, kept: pathlib.Path | None) -> None:
  from orbax.checkpoint import v1 as ocp

  from jflow.training.checkpoint import save_params

  config = {"model": loaded.config.to_dict(), "data": {"template": template}, "has_vae": loaded.has_vae}
  # Orbax copies every host array before it writes, unless told that nobody changes them meanwhile.
  context = ocp.Context()
  context.memory.deepcopy_host_arrays, context.memory.write_concurrent_bytes = False, _IN_FLIGHT
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
    say("no VAE (neither vae/ in the directory nor --vae=DIR): the result answers but does not paint")
  if to == "official":
    if any(p.startswith("alignment_head/") for p in loaded.params):
      say("left out, since it serves training only: alignment_head")
    if loaded.config.autoencoder.kind != "autoencoder_kl":
      say("left out: the VAE, a linear codec that the PyTorch code does not know")
    if loaded.config.understanding_encoder.gelu != "erf":
      say("the PyTorch code computes SigLIP with the exact GELU, this model with its tanh form: results differ")


def _check_flags(args: argparse.Namespace) -> None:
  """Refuses flags that would do nothing, numbers out of range, and an output that cannot be made.

  Raises:
    UserError: naming the flag.
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


def convert(args: argparse.Namespace) -> None:
  """Reads, converts and writes; nothing is left behind when it fails.

  Raises:
    UserError: what is missing, damaged or contradictory, in one line.
    Stopped: the output cannot be written.
  """
  need_text_name("--output", args.output)
  if args.output.exists():
    raise UserError(f"output {args.output} exists: name a directory that does not")
  if args.source is None:
    args.source = "huggingface-parts" if args.llm else None
  if args.source != "huggingface-parts":
    if args.input is not None and remote.is_remote(args.input):
      args.input = remote.fetch(args.input)
    if args.input is None or not args.input.is_dir():
      raise UserError("give --input=DIR" if args.input is None else f"input {args.input} is not a directory")
    looks = "official" if official.is_official(args.input) else "jflow"
    if args.source == "official" and looks == "jflow":
      raise UserError(f"{args.input / 'config.json'} is missing or not of the published layout (language_config)")
    if args.source == "jflow" and looks == "official":
      raise UserError(f"{args.input} is an official checkpoint: use --from=official")
    args.source = looks
  to = args.to = args.to or ("official" if args.source == "jflow" else "jflow")
  _check_flags(args)
  loaded, template, kept = _read(args)
  dtype = _DTYPES.get(args.dtype)
  if args.source == "jflow" and to == "jflow" and dtype is not None:
    loaded = loaded._replace(params={path: x.astype(dtype) for path, x in loaded.params.items()})
  _say_what_is_left_out(loaded, to)
  part = args.output.with_name(args.output.name + ".converting")
  shutil.rmtree(part, ignore_errors=True)
  try:
    if to == "official":
      official.save(part, loaded.config, loaded.params, loaded.tokenizer, kept, dtype, args.shard_bytes)
    else:
      _write_jflow(part, loaded, template, kept)
    files.publish(part, args.output)
  except OSError as error:
    raise Stopped(f"{args.output} cannot be written: {error.strerror or error}") from None
  finally:
    shutil.rmtree(part, ignore_errors=True)
  print(args.output)


def main(argv: Sequence[str]) -> int:
  """The command `convert`."""
  convert(_parser().parse_args(argv))
  return 0
