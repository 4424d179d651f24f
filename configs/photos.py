"""Overfitting of real photographs: a small model memorizes a dozen of them, from files in the LLaVA layout.

`python launch/experiments/photos.py FOLDER` writes photographs that ship with scikit-image and scikit-learn, imports
them with `prepare`, trains with this config (a few minutes on 2 cores), generates each from its caption and asks its
questions. The parts that are pretrained in the paper start fresh, so everything except the codec is trained.
"""

from configs import base


def get_config(size: str = "shapes"):
  c = base.base(size)
  if c.size == "shapes":  # photographs have more detail than the built-in world, and it is settled late
    c.objective.draws = dict(time_mean=0.0, time_std=1.0)
    c.optimizer.muon = ()  # what launch/experiments/README.md reports of this run is AdamW's
    c.model.understanding_encoder.update(image_size=64, patch_size=8)
    c.model.autoencoder.update(patch_size=4, window=4, latent_channels=8)
    c.model.generation.patch_size = 2
  c.data.sources = dict(understanding=(), generation=(), text=())  # named on the command line
  c.data.mixture = ((0, (25, 75, 0)),)
  c.data.template = "chat"
  c.data.first_sentence = 0.0
  c.train.steps, c.train.batch_size = 1000, 8
  c.world.fit_images = 100
  c.optimizer.learning_rate = 2e-3
  c.optimizer.trained = base.NEW_PARTS + ("language_model",) + base.SIGLIP
  c.optimizer.frozen = base.NEVER
  return c
