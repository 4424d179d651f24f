"""The command `parity`: compares jflow with golden outputs of the PyTorch code."""

import argparse
import math

from jflow.cli.arguments import Parser, number, path
from jflow.cli.flags import add_json, check_json
from jflow.errors import UserError

_ABOUT = """\
Compares a checkpoint, or the processor, with golden outputs of the PyTorch code.

  --checkpoint=DIR --golden=FILE.npz   the model: SigLIP, LLM, what writes images, greedy decoding, sampler, gradients
  --processor=DIR                      tokens and pixels: the tokenizer, chat template and image processor

Computed in float32. Each array gets a line with its relative L2 error; the first component that diverges is
named, in the order in which the components feed one another.

A golden file is an .npz of what the reference computes in float32, PyTorch layouts (B rows, S tokens, N pictures):
  und/pixels [.., 3, H, W], und/input_ids, und/attention_mask [B, S]; und/special_ids, the ids of <begin_of_image> and
    <image_placeholder> (without it: the fourth and third from the end of the vocabulary)
    -> und/features (SigLIP), und/inputs_embeds, und/logits, und/greedy_tokens (generate(do_sample=False))
  text/input_ids [B, S]
    -> text/logits
  gen/prompt_ids [S] with BOS and without the closing tag, gen/z0 [N, C, h, w], gen/t [N] in [0, 1], gen/steps,
  gen/cfg_weight
    -> gen/t_emb, gen/z_emb, gen/hidden, gen/velocity_cond, gen/velocity_uncond (at gen/t); gen/trajectory, gen/z1 (Euler
    steps whose t and dt are not rounded to bfloat16)
  train/x, latents like gen/z0
    -> train/flow_loss, the mean of (velocity - (x - z0))^2 at gen/t, and train/flow_grad_norm/PART
  und/... -> train/text_loss, the mean over all ids after the last <end_of_image> of each row, train/text_grad_norm/PART
and of Janus, N codes of a picture:
  vq/pixels [B, 3, H, W] in [-1, 1], vq/codes [B, N], vq/margin (cosine of the nearest row minus that of the second)
    -> vq/encoder_output, vq/latents, vq/codes; of vq/codes: vq/quantised, vq/decoded
  paint/prompt_ids [S] with BOS and <begin_of_image>, paint/codes [B, N], paint/cfg_weight (5)
    -> paint/gen_embeds, paint/aligned, paint/hidden_cond, paint/logits_cond, _uncond, _guided, paint/cross_entropy,
    train/image_loss (its mean), train/image_grad_norm/PART
  paint/greedy_prompt_ids, paint/short_greedy_prompt_ids [S]
    -> paint/greedy_codes, _logits and the same of the short one, both in one batch; paint/image, paint/image_uint8
Any outputs may be left out. NAME_last4, NAME_first8 and NAME_mean stand for the last tokens of an array, the first, and
the mean over them, which keeps the file of a large model small; vq/decoded_crop for rows 100 to 163 and columns 200 to
263, _pooled for means over 8 x 8 pixels. PART is the published name of a part, as gen_head. Codes and answers must be
equal where their margin is above 0.001, up to one below it that differs, and some must be left; maps of the VQ may
differ by twice the tolerance. und/greedy_margin, paint/greedy_margin and paint/short_greedy_margin, the logit of the best
minus that of the second, stand for ours.

examples, with what ships in tests/ (the first command writes the small checkpoint that the golden file belongs to):
  python tests/official_checkpoint.py tiny-official
  python -m jflow parity --checkpoint=tiny-official --golden=tests/golden/tiny/golden.npz
  python -m jflow parity --processor=tests/golden/processor
  python tests/janus_checkpoint.py transformers tiny-janus
  python -m jflow parity --checkpoint=tiny-janus --golden=tests/golden/janus_tiny/golden.npz
"""


def parser() -> argparse.ArgumentParser:
  """The flags of `parity`."""
  p = Parser(prog="python -m jflow parity", description=_ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--checkpoint", help="checkpoint directory of any layout, or a name on the hub")
  p.add_argument("--golden", type=path, help="golden outputs of the PyTorch code, npz")
  p.add_argument("--processor", type=path, help="directory with a tokenizer, images, cases.json, golden.npz")
  p.add_argument(
    "--tolerance",
    type=number(),
    help="largest relative L2 error (default: 1e-5; processor: 1e-6)",
  )
  add_json(p, "the result")
  return p


def main(argv: list[str]) -> int:
  """Compares and prints a line per array; returns 1 if one differs by more than the tolerance."""
  args = parser().parse_args(argv)
  if args.processor is not None and (args.checkpoint or args.golden):
    raise UserError("give --processor, or --checkpoint and --golden")
  if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
    raise UserError(f"--tolerance={args.tolerance} must be a finite number that is not negative")
  check_json(args)
  from jflow.interop.comparison import report

  if args.processor is not None:
    from jflow.interop.processor_parity import compare_processor

    tolerance = 1e-6 if args.tolerance is None else args.tolerance
    lines = list(compare_processor(args.processor, tolerance))
  elif args.checkpoint and args.golden:
    from jflow import compilation
    from jflow.interop.parity import TOLERANCE, compare_model

    compilation.use_cache()
    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    lines = compare_model(args.checkpoint, args.golden, tolerance)
  else:
    raise UserError("give --checkpoint=DIR and --golden=FILE.npz, or --processor=DIR")
  return report(lines, tolerance, args.json)
