"""Stage 0, only for the built-in world: replaces the pretrained parts of the paper.

Before the first step a codec in place of the VAE is fitted in closed form, and a small SigLIP to labels of its patches'
contents and positions (jflow/world/siglip_fit.py). Then the small LLM is trained on text and, with the linear aligner,
on captions and questions.

  jflow train --config=stage0:shapes --workdir=runs/stage0

Time: two cores take some 14 minutes for the stages 0 to 3 at :shapes, 1,200 CPU seconds at
:quick.
Result: a checkpoint for stage 1; it cannot generate images yet.
"""

from configs import base, world


def get_config(size: str = "shapes"):
  c = base.base(size)
  c.model.objectives = {}
  c.objective.weights = dict(text=1.0, flow=0.0, alignment=0.0)
  c.data.mixture = ((0, (80, 0, 20)),)
  reader = ("understanding_projector", "understanding_start")
  c.optimizer.trained = ("language_model",) + reader
  c.optimizer.frozen = (
    tuple(p for p in base.NEW_PARTS if p not in reader + ("alignment_head",)) + base.SIGLIP + base.NEVER
  )
  c.world.fit_labels = 320
  return world.at_stage(c, 0)
