"""The sizes for the built-in world: their changes to the paper's fields in configs/base.py.

  tiny    trains in a minute or two, most of it compiling: for trying things out
  quick   learns lone large objects near the middle, and their questions, in minutes on two cores
  shapes  learns the whole world
  world   every kind of scene and question: the models that ship, in hours of one core (launch/experiments/world.sh)
  mid     for `bench` on a CPU

`jflow/world/README.md` describes the world.
"""

import pathlib

from ml_collections import ConfigDict

from configs import models

TOKENIZER = str(pathlib.Path(__file__).parent / "tokenizer")
QUICK_SPREAD = 0.12  # data.shapes.spread of size `quick`
SOURCE = (("shapes", 1.0),)  # records that are rendered on demand


def tiny(c: ConfigDict) -> None:
  _small(c)
  c.model = models.tiny()
  c.train.batch_size, c.data.row_tokens, c.data.row_images = 8, 128, 4
  c.train.steps = 20
  c.data.shapes.size = 2000


def mid(c: ConfigDict) -> None:
  _small(c)
  c.model = models.mid()
  c.train.batch_size, c.data.row_tokens, c.data.row_images = 8, 1024, 6
  c.train.steps = 20


def shapes(c: ConfigDict) -> None:
  """Sets the fields of size `shapes`, except steps and rates, which depend on the stage (`at_stage`)."""
  _small(c)
  c.model = models.shapes()
  c.train.batch_size, c.data.row_tokens, c.data.row_images = 8, 256, 3
  c.optimizer.warmup_steps = 30
  c.optimizer.beta2 = 0.99  # gradients of 8 rows are noisier than those of 512
  c.optimizer.muon = ("language_model/layers", "generation_(encoder|decoder)/blocks_.*")
  # The shape in a noisy picture is determined early: by Bayes' rule over 40,000 pictures of one red shape, the right
  # one of eight has probability 0.28 at time 0.11, 0.75 at 0.20 and 0.97 at 0.28. The standard distribution has a sixth
  # of its times below 0.28, this one nearly three quarters.
  c.objective.draws = dict(time_mean=-1.5, time_std=0.9)
  c.data.shapes.tags = dict(
    single_object=0.15, colors=0.4, two_object=0.1, counting=0.1, position=0.1, color_attr=0.1, several=0.05
  )
  c.data.shapes.named_colors = 0.5  # colors, learned early, identify the objects of a sentence
  c.data.shapes.long_captions = 0.75  # captions with places need fewer steps


def world(c: ConfigDict) -> None:
  """Sets the fields of size `world`, except steps and rates, which depend on the stage (`at_stage`)."""
  shapes(c)
  c.model = models.quick()
  c.train.batch_size, c.train.ema = 16, 0.998
  c.data.row_tokens, c.data.row_images = 192, 6
  c.data.shapes.size = 120_000
  c.data.shapes.tags = dict(
    single_object=0.1, colors=0.12, two_object=0.28, counting=0.16, position=0.14, color_attr=0.15, several=0.05
  )
  # In random order the places of two objects without colors stay open, and a sampler often paints one of them twice.
  c.data.shapes.in_order = 0.75
  c.data.shapes.named_colors, c.data.shapes.long_captions = 0.4, 0.3
  c.data.shapes.asked = (("place", 5.0), ("relation", 6.0), ("count", 4.0), ("choice", 2.0))
  c.sampling = dict(guidance=3.0)
  c.checkpoint.interval = 250


def quick(c: ConfigDict) -> None:
  """Sets the fields of size `quick`, except steps and rates, which depend on the stage (`at_stage`).

  Position limits how fast shapes are learned: near the middle 10,000 pictures show them, anywhere some 100,000.
  """
  shapes(c)
  c.model = models.quick()
  c.data.row_tokens, c.data.row_images = 152, 6
  c.data.shapes.tags = dict(colors=1.0)
  c.data.shapes.named_colors, c.data.shapes.long_captions = 0.0, 0.0
  c.data.shapes.large, c.data.shapes.spread = 1.0, QUICK_SPREAD
  c.data.shapes.asked = (("choice", 0.0),)
  c.checkpoint.interval = 1000


SIZES = {"tiny": tiny, "quick": quick, "shapes": shapes, "world": world, "mid": mid}


def _small(c: ConfigDict) -> None:
  """Sets the fields of sizes for CPUs, with the tokenizer and data that ship with jflow."""
  c.optimizer.warmup_steps = 10
  c.data.tokenizer = TOKENIZER
  c.data.sources = dict(understanding=SOURCE, generation=SOURCE, text=SOURCE)
  c.compute.dtype, c.compute.remat = "float32", "none"
  c.checkpoint.interval = 100
  c.log.sample_prompts = (
    "a picture of a red circle",
    "a picture of a blue star",
    "a green square left of a heart",
  )


def at_stage(c: ConfigDict, stage: int) -> ConfigDict:
  """Returns the config of a stage; `quick`, `shapes` and `world` have their own steps and rates."""
  if c.size == "quick":
    c.train.steps, c.optimizer.learning_rate = ((900, 2e-3), (150, 3e-3), (2000, 3e-3), (1000, 3e-3))[stage]
    if stage == 0:
      c.world.fit_labels = 40_000
    if stage == 1:
      c.data.shapes.spread = QUICK_SPREAD / 2
    if stage == 2:
      c.data.mixture = ((0, (30, 50, 20)), (100, (14, 80, 6)))
    if stage == 3:
      c.optimizer.cooldown_steps = c.train.steps
      c.optimizer.rates = (("understanding_encoder", 0.02),)  # as below
      c.data.row_tokens = 200  # as many pictures beside "User:" and "Assistant:"
  if c.size == "shapes":
    c.train.steps, c.optimizer.learning_rate = ((300, 2e-3), (150, 3e-3), (1050, 3e-3), (300, 2e-3))[stage]
    if stage == 0:
      c.world.fit_labels = 40_000
    if stage == 2:
      c.data.mixture = ((0, (30, 50, 20)), (200, (14, 80, 6)))
    if stage == 3:
      c.optimizer.cooldown_steps = 300
  if c.size == "world":
    c.train.steps, c.optimizer.learning_rate = ((900, 2e-3), (300, 3e-3), (30_000, 3e-3), (6000, 3e-3))[stage]
    if stage < 2:
      c.data.shapes.size = 40_000
    if stage == 0:
      c.world.fit_labels = 160_000
    if stage == 2:
      c.data.mixture = ((0, (38, 58, 4)),)
    if stage == 3:
      c.optimizer.cooldown_steps = c.train.steps
      # At the shared rate, high for a small model, SigLIP loses the shapes that it was fitted to.
      c.optimizer.rates = (("understanding_encoder", 0.03),)
      c.data.shapes.named_colors, c.data.shapes.long_captions = 0.1, 0.15  # most captions as short as a prompt
  return c


def at_ablation(c: ConfigDict) -> ConfigDict:
  """Returns the config of an ablation: `quick`, `shapes` and `world` cool down, the last two on scenes of their own."""
  if c.size in ("quick", "shapes", "world"):
    c.optimizer.learning_rate = 3e-3
    c.optimizer.cooldown_start = c.train.steps * 7 // 10
    c.optimizer.cooldown_steps = c.train.steps - c.optimizer.cooldown_start
    c.checkpoint.interval = 500
  if c.size in ("shapes", "world"):
    c.train.ema, c.data.shapes.size = 0.998, 50_000
    # Fewer of the kinds that are learned last than size `world` has: a short run shows which letter learns.
    c.data.shapes.long_captions = 0.5 if c.size == "shapes" else 0.3
    c.data.shapes.tags = dict(
      single_object=0.12, colors=0.25, two_object=0.13, counting=0.13, position=0.17, color_attr=0.15, several=0.05
    )
  return c
