"""Tuning of a trained model on one's own data, by low-rank adapters (LoRA) beside frozen weights. Not in the paper.

  jflow prepare --format=imagefolder --task=generation --input=my_pictures --output=data/mine
  jflow train --config=tune --workdir=runs/tuned --config.train.init_from=runs/janusflow \\
    "--config.data.sources.generation=(('data/mine',1.0),)"
  jflow evaluate --benchmark=records --checkpoint=runs/tuned --data=data/mine --split=held-out \\
    --output=scores/mine
  jflow train --config=tune:tiny --workdir=runs/tiny_tune                   # a minute or two, built-in data

Data to paint, to read (`data.sources.understanding`) and texts, each alone or together: a batch holds as many rows of
each as there are. One record in twenty is held out; their loss is taken every 50 steps, and after three without a lower
one the run ends. The best step is what all commands load; they merge the adapters.

  tune, tune:384, tune:256     an adapter for every matrix in the blocks of the LLM, g_enc and g_dec
  tune:heads, tune:384-heads   the aligners, g_enc and g_dec whole, the LLM and SigLIP frozen
  tune:full, tune:384-full     all but the VAE, as stage 3

Steps: ten passes over the data, at most; 5,000 pictures are 800 rows, 100 steps a pass. Compiled for one H100 a step of
`tune` takes 5.7 GiB and about a second, so ten passes a quarter of an hour; configs/README.md has what fits
GPUs of 24 to 141 GB. Nobody has run the published size.
"""

from ml_collections import ConfigDict

from configs import base

BLOCKS = ("language_model/layers", "generation_(encoder|decoder)/blocks_.*")
HEADS = tuple(part for part in base.NEW_PARTS if part != "alignment_head")


def split(size: str) -> tuple[str, str]:
  """Returns the size of the model, and what is trained: "adapters", "heads" or "full"."""
  model, _, what = size.rpartition("-")
  return (model, what) if what in ("heads", "full") else (size, "adapters")


def on_own_data(c: ConfigDict, published: bool) -> ConfigDict:
  """Returns the config with what a few thousand records need; `published`: of a published model."""
  c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.weight_decay = 2e-4, 20, 0.0
  c.optimizer.cooldown_steps, c.optimizer.muon, c.optimizer.rates = 0, (), ()
  c.train.ema = 0.0  # a run of few steps has nothing to average
  c.train.batch_size = 8
  c.data.crop = "center"  # of few pictures, a random square often shows half of what the caption says
  if published:
    c.data.row_tokens = 0  # as long as the checkpoint's context, which may be a small one's
    c.data.row_images = c.data.row_images if c.size == "256" else 0
    c.train.steps, c.train.epochs = 0, 10.0
    c.train.accumulation = 8  # a row at a time: what a small GPU holds
    c.train.validation_every, c.train.early_stop = 50, 3
    c.data.validation = 0.05
    c.data.mixture = ()
    c.lora.frozen_dtype = "bfloat16"  # as published
    c.checkpoint.interval, c.checkpoint.keep = 50, 1
    c.log.sample_every = 100
  else:
    c.train.steps, c.train.epochs = 20, 0.0
    c.data.mixture = ((0, (30, 70, 0)),)
  return c


def choose(
  c: ConfigDict, what: str, blocks: tuple[str, ...], heads: tuple[str, ...], never: tuple[str, ...]
) -> ConfigDict:
  """Returns the config that trains adapters of `blocks`, the parts `heads` whole, or all parts but `never`."""
  if what == "adapters":
    c.lora.rank, c.lora.alpha, c.lora.patterns = 16, 32.0, blocks
    c.optimizer.trained, c.optimizer.frozen = (), (".*",)
  elif what == "heads":
    c.optimizer.trained, c.optimizer.frozen = heads, ("language_model", "understanding_encoder", never[-1])
  else:
    c.optimizer.trained, c.optimizer.frozen = (*heads, "language_model", *base.SIGLIP), never
    c.optimizer.learning_rate = 2e-5  # of stage 3
  return c


def get_config(size: str = ""):
  size, what = split(size)
  c = base.base(size)
  c.model.objectives, c.objective.weights = {}, dict(text=1.0, flow=1.0)
  c.train.init_dropped = ("alignment_head",)  # REPA is for training from scratch
  c.data.template = "chat"
  return choose(on_own_data(c, c.size in base.PAPER), what, BLOCKS, HEADS, base.NEVER)
