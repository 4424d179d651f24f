"""Tuning of a trained model on one's own data, by low-rank adapters (LoRA) beside frozen weights. Not in the paper.

  jflow train --config=tune --workdir=runs/tuned --config.train.init_from=runs/janusflow \\
    "--config.data.sources.generation=(('data/mine',1.0),)" --config.data.mixture="((0,(0,1,0)),)"
  jflow train --config=tune:tiny --workdir=runs/tiny_tune                   # seconds, built-in data

Every matrix of the LLM's blocks, g_enc and g_dec gets an adapter; with `--config.lora.rank=0` and one's own
`optimizer.trained` whole parts are trained instead. Checkpoints hold base and adapters; `generate`, `understand`, `serve`
and `convert` merge them. `data.mixture` gives the share of rows understanding : generation : text.
Time and memory: `jflow compile --config=tune --topology=h100:1x1` says what a step needs; nobody has run this size.
"""

from ml_collections import ConfigDict

from configs import base

BLOCKS = ("language_model/layers", "generation_(encoder|decoder)/blocks_.*")


def by_adapters(c: ConfigDict, patterns: tuple[str, ...], published: bool) -> ConfigDict:
  """Returns the config of a run of adapters on the matrices that patterns name; `published`: of a published model."""
  c.lora.rank, c.lora.alpha, c.lora.patterns = 16, 32.0, patterns
  c.optimizer.trained, c.optimizer.frozen = (), (".*",)
  c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.weight_decay = 2e-4, 20, 0.0
  c.optimizer.muon = ()
  c.train.ema = 0.0  # a run of few steps has nothing to average
  c.train.steps = 500 if published else 20
  c.train.batch_size = 8
  c.data.crop = "center"  # of few pictures, a random square often shows half of what the caption says
  c.data.mixture = ((0, (30, 70, 0)),)
  if published:
    c.lora.frozen_dtype = "bfloat16"  # as published
    c.checkpoint.interval = 100
    c.log.sample_every = 100
  return c


def get_config(size: str = ""):
  c = base.base(size)
  c.model.objectives, c.objective.weights = {}, dict(text=1.0, flow=1.0)
  c.train.init_dropped = ("alignment_head",)  # REPA is for training from scratch
  c.data.template = "chat"
  return by_adapters(c, BLOCKS, published=c.size in base.PAPER)
