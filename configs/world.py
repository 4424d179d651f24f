"""The sizes that learn the built-in world offline: their changes to the paper's fields in configs/base.py.

  tiny    trains in seconds: for trying things out
  shapes  learns the world in minutes on two cores
  mid     for `bench` on a CPU

`jflow/world/README.md` says what the world is.
"""

import pathlib

from ml_collections import ConfigDict

from configs import models

TOKENIZER = str(pathlib.Path(__file__).parent / "tokenizer")
SOURCE = (("shapes", 1.0),)  # records that are drawn as they are asked for


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
  """The stages set steps and rates (`at_stage`): small models take a higher rate than table 1's."""
  _small(c)
  c.model = models.shapes()
  c.train.batch_size, c.data.row_tokens, c.data.row_images = 8, 256, 3
  c.optimizer.warmup_steps = 30
  c.optimizer.beta2 = 0.99  # gradients of 8 rows are noisier than those of 512
  # From one stage 0, 500 steps of painting: flow loss 0.70, with AdamW 0.76, which gets there after some 720.
  c.optimizer.muon = ("language_model/layers", "generation_(encoder|decoder)/blocks_.*")
  # Which of the eight shapes a noisy picture shows is settled early: by Bayes' rule over 40,000 pictures of one red
  # shape the right one has probability 0.28 at time 0.11, 0.75 at 0.20 and 0.97 at 0.28. The standard distribution
  # has a sixth of its times below 0.28, this one nearly three quarters.
  c.objective.time_mean, c.objective.time_std = -1.5, 0.9
  c.data.shapes.tags = dict(
    single_object=0.15, colors=0.4, two_object=0.1, counting=0.1, position=0.1, color_attr=0.1, several=0.05
  )
  c.data.shapes.named_colors = 0.5  # "a red ring left of a blue star": colors show early which word is which object
  c.data.shapes.long_captions = 0.75  # a caption that says where things are teaches in fewer steps


SIZES = {"tiny": tiny, "shapes": shapes, "mid": mid}


def _small(c: ConfigDict) -> None:
  """A model for CPUs that has a tokenizer and data at hand."""
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
  """Returns the config of a stage; size `shapes` has its own steps and rates, all others keep the stage file's."""
  if c.size == "shapes":
    c.train.steps, c.optimizer.learning_rate = ((300, 2e-3), (150, 3e-3), (1050, 3e-3), (300, 2e-3))[stage]
    if stage == 0:
      c.train.fit_labels = 40_000
    if stage == 2:
      c.data.mixture = ((0, (30, 50, 20)), (200, (14, 80, 6)))
    if stage == 3:
      c.optimizer.cooldown_steps = 300
  return c


def at_ablation(c: ConfigDict) -> ConfigDict:
  """Returns the config of an ablation; size `shapes` has a rate, a cool-down and a mixture of scenes of its own."""
  if c.size == "shapes":
    c.optimizer.learning_rate, c.train.ema = 3e-3, 0.998
    c.optimizer.cooldown_start = c.train.steps * 7 // 10
    c.optimizer.cooldown_steps = c.train.steps - c.optimizer.cooldown_start
    c.checkpoint.interval, c.data.shapes.size = 500, 50_000
    # More of the harder prompts than above, and as many short captions, which prompts are, as long ones.
    c.data.shapes.long_captions = 0.5
    c.data.shapes.tags = dict(
      single_object=0.12, colors=0.25, two_object=0.13, counting=0.13, position=0.17, color_attr=0.15, several=0.05
    )
  return c
