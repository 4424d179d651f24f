"""Stage 0, only for the built-in world: makes the stand-ins for what the paper takes pretrained.

The small LLM learns text, the small SigLIP the sigmoid loss between pictures and captions (the caption's
embedding is the LLM's last hidden state, through a head that later stages drop) and, beside it, what the LLM needs to
describe pictures and to answer: a loss on captions is how SigLIP's successors are trained, and in so few steps the
sigmoid loss alone leaves features that are nearly the same for all pictures. The codec in the VAE's place is fitted in
closed form before the first step.

  python -m jflow train --config=configs/stage0.py:shapes --workdir=runs/stage0
"""

from configs import base


def get_config(size: str = "shapes"):
  c = base.base(size)
  c.model.contrastive = True
  c.model.alignment_width = 0
  c.objective.weights = dict(text=1.0, flow=0.0, alignment=0.0, contrastive=0.2)
  c.data.mixture = ((0, (65, 25, 10)),)
  c.data.prompt_drop = 0.0
  reader = ("understanding_projector", "understanding_start")
  c.optimizer.trained = ("language_model", "understanding_encoder", "contrastive_head") + reader
  c.optimizer.frozen = tuple(p for p in base.NEW_PARTS if p not in reader + ("alignment_head",)) + ("vae",)
  if c.size == "shapes":
    c.train.steps, c.optimizer.learning_rate = 350, 2e-3
    c.train.batch_size = 16  # a pair is told from the others of its batch
  return c
