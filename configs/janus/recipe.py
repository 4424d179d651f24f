"""The three stages of Janus (arXiv 2410.13848) and Janus-Pro (arXiv 2501.17811): sizes, parts, steps and rates.

  1b       Janus-1.3B
  pro-1b   Janus-Pro-1B, the same sizes with other steps, ratios and prompt words
  pro-7b   Janus-Pro-7B
  tiny     Janus's stages on the built-in world: configs/world.py
  quick    learn the built-in world, by the steps, rates and ratios of JanusFlow's sizes of the same names, so that the two
  shapes   ways to write can be compared
  world    the model of codes that ships: the same in fewer steps (launch/experiments/world.sh --codes)
  mid      for `bench` on a CPU

Sources: table 1 and section 3 of both papers; section 2.2 of the second for steps and ratios. No EMA is mentioned.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base, models, world

# Parts of the parameters: the aligners, gen_embed and gen_head. Whether gen_embed is trained is not published.
NEW_PARTS = ("understanding_projector", "generation_embed", "generation_projector", "generation_head")
# What JanusFlow has in their place, as in the parts of `convert --from=huggingface-parts`; the VQ comes from elsewhere.
JANUSFLOW = (
  "understanding_start",
  "understanding_projector",
  "generation_encoder",
  "generation_decoder",
  "generation_projector",
  "generation_output_norm",
  "generation_output_projector",
  "alignment_head",
  "vae",
)
NEVER = ("understanding_encoder/head", "vq")  # the unused pooling head; the VQ is frozen in all stages


@dataclasses.dataclass(frozen=True)
class Stage:
  """The values that a stage of a recipe sets."""

  steps: int
  rows: int  # of 4,096 tokens per step
  learning_rate: float
  warmup: int
  understanding: int  # the ratio of rows; the papers' order is understanding : text : generation
  generation: int
  text: int
  weight_decay: float = 0.0
  cosine: bool = False


JANUS = (
  Stage(10_000, 256, 1e-3, 300, understanding=1, generation=1, text=0, cosine=True),
  Stage(180_000, 512, 1e-4, 5000, understanding=2, generation=5, text=3),
  Stage(24_000, 256, 2e-5, 0, understanding=7, generation=10, text=3, weight_decay=0.1),
)
PRO_1B = (
  Stage(20_000, 256, 1e-3, 600, understanding=1, generation=3, text=0),
  Stage(270_000, 512, 1e-4, 5000, understanding=2, generation=5, text=3),  # the table says 360,000, the text stops here
  Stage(80_000, 128, 4e-5, 0, understanding=5, generation=4, text=1),
)
PRO_7B = (*PRO_1B[:2], dataclasses.replace(PRO_1B[2], steps=40_000))


def _1b(c: ConfigDict) -> None:
  c.model = models.janus_1b()


def _7b(c: ConfigDict) -> None:
  c.model = models.janus_pro_7b()


def _tiny(c: ConfigDict) -> None:
  world.tiny(c)
  c.model = models.janus_tiny()


def _quick(c: ConfigDict) -> None:
  world.quick(c)
  _codes(c, models.janus_quick(), fit_images=6000)


def _shapes(c: ConfigDict) -> None:
  world.shapes(c)
  _codes(c, models.janus_shapes(), fit_images=1500)


def _world(c: ConfigDict) -> None:
  world.world(c)
  _codes(c, models.janus_world(), fit_images=4000)
  c.data.row_tokens, c.data.row_images = 256, 3  # four times as many codes as flow has latents


def _codes(c: ConfigDict, model: dict, fit_images: int) -> None:
  """Codes of patches for the world's latents."""
  c.model = model
  c.world.fit_images = fit_images  # the codebook is for patches with an edge, a quarter of all
  c.optimizer.muon = ("language_model/layers",)
  c.sampling = dict(guidance=2.0, temperature=0.6)  # 5 and 1, the paper's, spoil pictures of few codes


def _mid(c: ConfigDict) -> None:
  world.mid(c)
  c.model = models.janus_mid()


PAPER_SIZES = {"1b": _1b, "pro-1b": _1b, "pro-7b": _7b}
WORLD_SIZES = {"quick": _quick, "shapes": _shapes, "world": _world}  # with a stage 0
SIZES = PAPER_SIZES | WORLD_SIZES | {"tiny": _tiny, "mid": _mid}
PAPER = {"1b": JANUS, "pro-1b": PRO_1B, "pro-7b": PRO_7B}


def at_stage(size: str, number: int) -> ConfigDict:
  """Returns the config of stage `number` at a size: 1 to 3, or 0, which replaces what is pretrained in the papers."""
  c = base.base(size or "1b", SIZES)
  stage = PAPER.get(c.size, JANUS)[max(0, number - 1)]
  c.objective.weights, c.objective.draws = dict(text=1.0, codes=1.0), {}  # no weights between the losses
  c.data.template = "plain" if number < 3 else "pro" if c.size.startswith("pro-") else "chat"
  c.optimizer.trained = NEW_PARTS + (("language_model",) if number > 1 else ()) + (base.SIGLIP if number > 2 else ())
  c.optimizer.frozen = NEVER + (() if number > 1 else ("language_model",)) + (() if number > 2 else base.SIGLIP)
  c.optimizer.learning_rate, c.optimizer.weight_decay = stage.learning_rate, stage.weight_decay
  if c.size in WORLD_SIZES:
    c.optimizer.weight_decay = 0.0
    if number == 3:
      c.data.mixture = ((0, (21, 70, 9)),)
    if number == 0:
      c.objective.weights.codes, c.data.mixture = 0.0, ((0, (80, 0, 20)),)
      c.optimizer.trained = ("language_model", "understanding_projector")
      c.optimizer.frozen = (*NEW_PARTS[1:], *NEVER, *base.SIGLIP)
    world.at_stage(c, number)
    if c.size == "world" and number == 2:  # fewer than flow's: a picture is four times as many codes as latents
      c.train.steps = 8000
    if c.size == "world" and number == 3:
      c.train.steps = c.optimizer.cooldown_steps = 3000
    return c
  c.train.ema = 0.0
  if number == 1:
    c.train.init_dropped, c.train.init_fresh = JANUSFLOW, NEW_PARTS
  c.data.caption_prompt = "Describe the image in detail."
  if c.size in PAPER:
    c.train.steps, c.train.batch_size, c.optimizer.warmup_steps = stage.steps, stage.rows, stage.warmup
  else:
    world.at_stage(c, number)
  c.data.mixture = ((0, (stage.understanding, stage.generation, stage.text)),)
  if stage.cosine:  # what it falls to is not published
    c.optimizer.cooldown_shape = "cosine"
    c.optimizer.cooldown_start = c.optimizer.warmup_steps
    c.optimizer.cooldown_steps = c.train.steps - c.optimizer.warmup_steps
  return c
