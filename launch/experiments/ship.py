"""Packs a trained model of the built-in world as one that ships with jflow, with its card.

  python launch/experiments/ship.py runs/world/rewarded jflow/world/model
  python -m jflow evaluate --benchmark=shapes --checkpoint=jflow/world/model --output=scores/world
  python launch/experiments/ship.py --card jflow/world/model --scores=scores/world/report.json --recipe="the commands"

The first command writes the weights, the last one the card (README.md) from scores of just these weights. A model that
writes codes goes to jflow/world/model_codes in the same way.
"""

import argparse
import json
import pathlib
import sys

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jflow.errors import UserError
from jflow.evaluation import report
from jflow.interop import checkpoints, packed

NAMES = {"flow": ("world", "JanusFlow"), "codes": ("world-codes", "Janus")}  # way to write -> checkpoint, family
SHOWN = ("single_object", "colors", "counting", "position", "two_object", "color_attr", "overall")


def pack(source: str, folder: pathlib.Path) -> None:
  """Writes the averaged weights, or the last ones of a run without an average, in bfloat16, config and tokenizer."""
  found = checkpoints.describe(source, tokenizer=True)
  params = flatten_dict(found.read_params(), sep="/")
  folder.mkdir(parents=True, exist_ok=True)
  dtype = np.dtype(ml_dtypes.bfloat16)
  packed.save(folder, found.config, found.template, params, found.tokenizer, found.has_vae, dtype, found.sampling)


def card(folder: pathlib.Path, scores: pathlib.Path, recipe: str) -> str:
  """The card of a packed model.

  Raises:
    UserError: the scores are of other weights.
  """
  told = json.loads(scores.read_text(encoding="utf-8"))
  settings, found = told["settings"], told["scores"]
  if settings["fingerprint"] != report.fingerprint(folder, "ema"):
    raise UserError(f"--scores={scores} must be scores of {folder}: they are of other weights")
  rows = []
  for kind, names in (("pictures", SHOWN), ("questions", ("overall",))):
    for name in names:
      seen, unseen = (found.get(f"{split} {kind}: {name}") for split in ("seen", "held-out"))
      cells = (f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" if x else "" for x in (seen, unseen))
      rows.append(f"| {kind}: {name} | {' | '.join(cells)} |")
  name, family = NAMES[checkpoints.read_config(folder).generation.kind]
  chosen = {key: settings[key] for key in ("steps", "guidance", "temperature") if settings.get(key) is not None}
  sampling = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
  return f"""# {name}

The small {family} of jflow's built-in world: lone and several colored shapes on gray, 48 x 48 pixels. It paints them from
prompts such as "a picture of a red circle left of a star" and answers questions about them; it knows nothing else.

- **Use**: `python -m jflow generate --checkpoint={name} --prompt="a picture of a pink ring" --output=ring`
- **Recipe**: {recipe}
- **Commit of the scores**: {told["commit"]}, {told["date"][:10]}; seed {settings["seed"]}, {sampling}.
- **Weights**: bfloat16, `model.safetensors`; `config.json` and the tokenizer beside it. License: that of jflow.

| strict, with 95 % intervals | seen combinations | held-out combinations |
| --- | ---: | ---: |
{chr(10).join(rows)}
"""


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("source", nargs="?", help="the checkpoint to pack")
  parser.add_argument("folder", type=pathlib.Path, help="of the packed model")
  parser.add_argument("--card", action="store_true", help="write the card of what is packed")
  parser.add_argument("--scores", type=pathlib.Path, help="report.json of the evaluation of the packed model")
  parser.add_argument("--recipe", default="", help="the commands that made it, for the card")
  args = parser.parse_args()
  if args.card and args.scores is None:
    parser.error("--card needs --scores")
  try:
    if args.source:
      pack(args.source, args.folder)
    if args.card:
      (args.folder / "README.md").write_text(card(args.folder, args.scores, args.recipe), encoding="utf-8")
  except UserError as error:
    print(f"ship: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
