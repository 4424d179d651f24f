"""Laws of the checks before a run: every mistake in a config is one line that names its field."""

import pytest
import tiny

from configs import stage0, stage1, stage2, stage3
from jflow.errors import UserError
from jflow.training import setup


@pytest.mark.parametrize("size", ["tiny", "shapes", "384", "256"])
@pytest.mark.parametrize("stage", [stage0, stage1, stage2, stage3], ids=lambda stage: stage.__name__[-6:])
def test_the_stages_pass(stage, size):
  config = stage.get_config(size)
  config.train.steps = config.train.steps or 1  # stage 0 has no length beyond the built-in world
  config.data.tokenizer = str(tiny.TOKENIZER)
  assert setup.check(config.to_dict()).image_size in (32, 64, 384, 256)


@pytest.mark.parametrize("field, value", [
  ("train.steps", 0),
  ("train.batch_size", -4),
  ("train.accumulation", 0),
  ("train.accumulation", 3),
  ("train.seed", -1),
  ("train.ema", 1.0),
  ("train.max_skipped", 0),
  ("train.init_weights", "best"),
  ("optimizer.learning_rate", 0.0),
  ("optimizer.learning_rate", float("nan")),
  ("optimizer.clip_norm", 0.0),
  ("optimizer.epsilon", 0.0),
  ("optimizer.warmup_steps", -1),
  ("optimizer.weight_decay", -0.1),
  ("optimizer.beta2", 1.0),
  ("objective.time_std", 0.0),
  ("objective.weights", dict(text=0.0, flow=0.0, alignment=0.0, contrastive=0.0)),
  ("objective.weights", dict(text=1.0, flow=1.0, alignment=0.0, contrastive=0.0, repa=1.0)),
  ("objective.weights.flow", -1.0),
  ("objective.weights.contrastive", 1.0),
  ("data.template", "poem"),
  ("data.row_tokens", 129),
  ("data.row_images", 0),
  ("data.tokenizer", ""),
  ("compute.dtype", "float16"),
  ("compute.remat", "some"),
  ("compute.unroll", 0),
  ("mesh.data", 0),
  ("checkpoint.interval", 0),
  ("checkpoint.keep", 0),
])  # fmt: skip
def test_a_bad_value_is_one_line_that_names_its_field(field, value):
  config = tiny.configuration()
  setup.check(config)
  *sections, name = field.split(".")
  section = config
  for part in sections:
    section = section[part]
  section[name] = value
  with pytest.raises(UserError) as error:
    setup.check(config)
  assert f"config.{field}={value!r}" in str(error.value) and "\n" not in str(error.value)


def test_rows_must_fill_the_mesh():
  with pytest.raises(UserError, match="train.batch_size=4 / accumulation = 2 rows must be a multiple .* = 4"):
    setup.check(tiny.configuration(train=dict(accumulation=2), mesh=dict(data=2, fsdp=2)))


def test_losses_need_their_heads_and_pairs_their_batch():
  with pytest.raises(UserError, match="objective.weights.alignment=1.0 needs model.alignment_width"):
    setup.check(tiny.configuration(model=dict(alignment_width=0)))
  weights = dict(text=1.0, flow=0.0, alignment=0.0, contrastive=1.0)
  contrastive = dict(model=dict(contrastive=True), objective=dict(weights=weights))
  setup.check(tiny.configuration(**contrastive))
  with pytest.raises(UserError, match="train.accumulation=2 must be 1"):
    setup.check(tiny.configuration(**contrastive, train=dict(accumulation=2)))
