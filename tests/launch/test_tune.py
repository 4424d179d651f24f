"""The configs for tuning: what they train, and how they follow the data."""

import jax
import pytest
from flax.traverse_util import flatten_dict

from jflow import sharding
from jflow.models import lora
from jflow.training import config_files, optim, setup

SIZES = ("tune", "tune:256", "janus/tune", "janus/tune:pro-7b")
VARIANTS = {"tune:tiny": "vae", "janus/tune:tiny": "vq"}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("what", ["", "heads", "full"])
def test_a_published_size_follows_its_data_and_holds_some_out(name, what):
  named = name + (f"-{what}" if ":" in name else f":{what}") * bool(what)
  config = config_files.load(named, ["--config.train.init_from=somewhere"])
  setup.check(config)
  assert config.train.steps == 0 < config.train.epochs and config.data.mixture == ()
  assert config.data.validation and config.train.validation_every and config.train.early_stop
  assert config.lora.frozen_dtype == "bfloat16" and config.train.ema == 0.0
  assert bool(config.lora.rank) == (what == "")


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_adapters_heads_or_all_but_the_autoencoder(name):
  found = {}
  for what in ("", "-heads", "-full"):
    config = config_files.load(name + what)
    setup.check(config)
    shapes = jax.eval_shape(lambda c=config: setup.initial_params(c, setup.build(c, jax.devices()[0])))
    trained, frozen = optim.partition(sharding.unbox(shapes), config.optimizer.trained, config.optimizer.frozen)
    found[what] = set(trained)
    assert VARIANTS[name] in frozen
    assert (what == "") == any(map(lora.is_adapter, flatten_dict(trained, sep="/")))
  assert "language_model" in found["-full"] - found["-heads"] and found["-heads"] < found["-full"]
