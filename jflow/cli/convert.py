"""The command `convert`: converts checkpoints from and to the published layouts."""

import argparse

from jflow.cli.arguments import SEED, Parser, path, whole

_ABOUT = """\
Converts weights from and to the published PyTorch layouts.

--from=official           JanusFlow, Janus or Janus-Pro as published, to a jflow checkpoint (or, with --to=official,
                          to other shards or another type)
--from=transformers       Janus or Janus-Pro in the layout of Hugging Face's transformers (model_type janus)
--from=jflow              a jflow checkpoint, to a directory that the PyTorch code loads unchanged
  --adapter               the adapter of a run with lora.rank alone, in place of the merged model: a few MB for
                          `--checkpoint=BASE --adapter=DIR`, or with --to=transformers in PEFT's format
--from=huggingface-parts  an LLM, a SigLIP and a VAE, to the starting point of stage 1

examples:
  python -m jflow convert --from=official --input=JanusFlow-1.3B --vae=sdxl-vae --output=runs/janusflow
  python -m jflow convert --from=jflow --to=official --input=runs/stage3 --output=for-pytorch
  python -m jflow convert --from=transformers --to=official --input=Janus-Pro-1B --output=for-the-release
  python -m jflow convert --adapter --input=runs/tuned --output=my-adapter
  python -m jflow convert --from=huggingface-parts --llm=deepseek-llm --siglip=siglip-large-patch16-384 \\
    --vae=sdxl-vae --output=runs/parts
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `convert`."""
  p = Parser(prog="python -m jflow convert", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
  layouts = ("official", "transformers", "jflow")
  p.add_argument(
    "--from",
    dest="source",
    choices=(*layouts, "huggingface-parts"),
    help="layout of --input (default: what it looks like)",
  )
  p.add_argument("--to", choices=layouts, help="layout of --output (default: jflow; of a jflow one: official)")
  p.add_argument("--input", type=path, help="checkpoint directory; not for --from=huggingface-parts")
  p.add_argument("--adapter", action="store_true", help="write the adapter of a run alone (default: merged weights)")
  p.add_argument("--output", type=path, required=True, help="directory to create")
  p.add_argument("--llm", type=path, help="huggingface-parts: directory of a LlamaForCausalLM")
  p.add_argument("--siglip", type=path, help="huggingface-parts: directory of a Siglip(Vision)Model")
  p.add_argument("--vae", type=path, help="directory of a diffusers AutoencoderKL (sdxl-vae)")
  p.add_argument("--tokenizer", type=path, help="huggingface-parts: default the LLM's directory")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of the weights (default: as they are)")
  p.add_argument("--weights", choices=("ema", "raw"), default="ema", help="of a jflow checkpoint (default: ema)")
  p.add_argument("--seed", type=whole(most=SEED), default=0, help="of the fresh parts of huggingface-parts")
  p.add_argument(
    "--shard_bytes",
    type=whole(most=2**62),
    default=4 * 2**30,
    help="largest file of a published layout (default: 4 GiB)",
  )
  return p


def main(argv: list[str]) -> int:
  """Converts a checkpoint and prints the new directory."""
  args = parser().parse_args(argv)
  from jflow.interop.convert import Conversion, convert

  convert(Conversion(**vars(args)))
  print(args.output)
  return 0
