"""The stages of Janus and Janus-Pro: the numbers of the papers' tables, and the sizes of the published models."""

import math

import jax
import pytest

from jflow import sharding
from jflow.models.build import initial_params, parameter_shapes
from jflow.training import config_files, optim, setup

# (stage, size): learning rate, warm-up, steps, rows, weight decay, reading : text : writing.
TABLE = {
  (1, "1b"): (1e-3, 300, 10_000, 256, 0.0, (1, 0, 1)),
  (2, "1b"): (1e-4, 5000, 180_000, 512, 0.0, (2, 3, 5)),
  (3, "1b"): (2e-5, 0, 24_000, 256, 0.1, (7, 3, 10)),
  (1, "pro-1b"): (1e-3, 600, 20_000, 256, 0.0, (1, 0, 3)),
  (2, "pro-1b"): (1e-4, 5000, 270_000, 512, 0.0, (2, 3, 5)),
  (3, "pro-1b"): (4e-5, 0, 80_000, 128, 0.0, (5, 1, 4)),
  (1, "pro-7b"): (1e-3, 600, 20_000, 256, 0.0, (1, 0, 3)),
  (2, "pro-7b"): (1e-4, 5000, 270_000, 512, 0.0, (2, 3, 5)),
  (3, "pro-7b"): (4e-5, 0, 40_000, 128, 0.0, (5, 1, 4)),
}
ALIGNERS = {"understanding_projector", "generation_projector", "generation_head", "generation_embed"}
TRAINED = {1: ALIGNERS, 2: ALIGNERS | {"language_model"}, 3: ALIGNERS | {"language_model", "understanding_encoder"}}


@pytest.mark.parametrize("stage, size", TABLE, ids=lambda value: str(value))
def test_a_stage_has_the_numbers_of_its_table(stage, size):
  config = config_files.load(f"janus/stage{stage}:{size}", ["--config.data.tokenizer=somewhere"])
  rate, warmup, steps, rows, decay, (reading, text, writing) = TABLE[stage, size]
  c = config.optimizer
  assert (c.learning_rate, c.warmup_steps, c.weight_decay) == (rate, warmup, decay)
  assert (c.beta1, c.beta2, c.clip_norm) == (0.9, 0.95, 1.0)
  assert (config.train.steps, config.train.batch_size, config.data.row_tokens) == (steps, rows, 4096)
  assert config.data.mixture == ((0, (reading, writing, text)),)  # its order is understanding, generation, text
  assert config.data.caption_prompt == "Describe the image in detail."
  assert config.data.template == ("plain" if stage < 3 else "chat" if size == "1b" else "pro")
  assert config.objective.weights == {"text": 1.0, "codes": 1.0}
  setup.check(config)
  last = optim.schedule(c)(steps - 1) / rate
  assert last < 1e-3 if (stage, size) == (1, "1b") else last == 1.0  # a cosine in Janus's first stage alone


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_trains_its_parts(stage):
  config = config_files.load(f"janus/stage{stage}:tiny")
  setup.check(config)
  model = setup.build(config, jax.devices()[0])
  shapes = sharding.unbox(jax.eval_shape(lambda: initial_params(model, 0)))
  trained, frozen = optim.partition(shapes, config.optimizer.trained, config.optimizer.frozen)
  assert set(trained) == TRAINED[stage] and "vq" in frozen
  assert set(frozen["understanding_encoder"]) == ({"head"} if stage == 3 else {*shapes["understanding_encoder"]})


@pytest.mark.parametrize("size", ["1b", "pro-1b", "pro-7b", "tiny"])
def test_adapters_fit_their_matrices(size):
  config = config_files.load(f"janus/tune:{size}", ["--config.data.tokenizer=somewhere"])
  setup.check(config)
  model = setup.build(config, jax.devices()[0])
  shapes = jax.eval_shape(lambda: sharding.unbox(setup.initial_params(config, model)))
  trained, _ = optim.partition(shapes, config.optimizer.trained, config.optimizer.frozen)
  assert set(trained) == {"language_model", "generation_projector", "generation_head"}


@pytest.mark.parametrize("size, count", [("1b", 2_089_232_011), ("pro-1b", 2_089_232_011), ("pro-7b", 7_420_368_523)])
def test_the_published_models_have_so_many_parameters(size, count):
  model = config_files.load(f"janus/stage1:{size}").model
  assert sum(math.prod(shape) for shape in parameter_shapes(model).values()) == count
