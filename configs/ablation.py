"""The ablations of the paper's table 6, one letter each, on the built-in world or at 256 x 256 (paper section 4.5).

  A  without representation alignment (REPA)
  B  one VAE + ConvNeXt encoder for understanding and generation
  C  a separate VAE + ConvNeXt encoder for understanding, with equal parameters at the start
  D  understanding only: the steps of F that a unified run spends on understanding and text (13,000 of 50,000)
  E  generation only: the steps of F that it spends on generation (37,000 of 50,000)
  F  the final model

The part behind the colon is LETTER-SIZE, or LETTER-SIZE-STEPS where STEPS is the budget of F, of which D and E take
their share. In its first fifth understanding : generation : text = 30 : 50 : 20, then 14 : 80 : 6.

  python -m jflow train --config=configs/ablation.py:F-shapes-5000 --workdir=runs/ablation-F \\
    --config.train.init_from=runs/stage1
  python -m jflow evaluate --benchmark=shapes --checkpoint=runs/ablation-F --guidance=7.5 --output=scores/ablation-F

Differs from the paper: its table leaves open whether C trains the VAE of its understanding encoder; here the VAE is
always frozen. C's understanding encoder starts fresh where `train.init_from` names a stage 1, which has no such part.
"""

from configs import base, world

LETTERS = "ABCDEF"
BUDGETS = {"384": 50_000, "256": 50_000, "shapes": 4000, "world": 6000, "quick": 1500, "tiny": 20}  # steps of F
FIRST, THEN = (30, 50, 20), (14, 80, 6)  # understanding : generation : text
_READER = {"B": "shared", "C": "separate"}


def get_config(size: str = ""):
  letter, _, rest = size.partition("-")
  name, _, budget = rest.partition("-")
  if letter not in tuple(LETTERS) or not name or not (budget.isdigit() and int(budget) or not budget):
    raise ValueError(f"{size!r} must be LETTER-SIZE or LETTER-SIZE-STEPS with a letter of {LETTERS}, as in F-shapes")
  c = base.base(name)
  if not budget and name not in BUDGETS:
    raise ValueError(f"{size!r} must name the steps, as in {size}-4000: size {name} has no budget of its own")
  steps = int(budget) if budget else BUDGETS[name]
  turn = steps // 5
  reading = lambda first, then: first * turn + then * (steps - turn)  # over rows in 100, in all

  c.train.steps, c.data.mixture = steps, ((0, FIRST), (turn, THEN))
  if letter == "D":
    c.train.steps = reading(FIRST[0] + FIRST[2], THEN[0] + THEN[2]) // 100
    first = max(1, (FIRST[0] + FIRST[2]) * turn // 100)
    c.data.mixture = ((0, (FIRST[0], 0, FIRST[2])), (first, (THEN[0], 0, THEN[2])))
  if letter == "E":
    c.train.steps, c.data.mixture = reading(FIRST[1], THEN[1]) // 100, ((0, (0, 1, 0)),)

  c.train.init_fresh = ("alignment_head",)
  trained = base.NEW_PARTS + ("language_model",)
  if letter in "AD":  # D generates nothing, so nothing is aligned
    c.model.objectives, c.objective.weights.alignment = {}, 0.0
    c.train.init_fresh, c.train.init_dropped = (), ("alignment_head",)
    trained = tuple(part for part in trained if part != "alignment_head")
  if letter in _READER:
    c.model.reader.kind = _READER[letter]
    c.train.init_dropped += ("understanding_projector",)
    trained = tuple(part for part in trained if part != "understanding_projector")
  if letter == "C":
    c.train.init_fresh += ("latent_encoder", "latent_projector")
    trained += ("latent_encoder", "latent_projector")
    if c.optimizer.muon:
      c.optimizer.muon += ("latent_encoder/blocks_.*",)
  c.optimizer.trained, c.optimizer.frozen = trained, base.SIGLIP + base.NEVER
  return world.at_ablation(c)
