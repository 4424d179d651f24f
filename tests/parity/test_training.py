"""Twenty steps of training against plain PyTorch: the same weights, batches and draws, for both ways to write
images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from ml_dtypes import bfloat16

torch = pytest.importorskip("torch", reason="PyTorch is not installed: JFLOW_PARITY=1 bash launch/test.sh installs it")

import torch_training

from jflow.batch import READ, TASKS, WRITE
from jflow.generation.base import family
from jflow.training import optim, setup
from jflow.training.step import draw, make_loss

STEPS = 20


def configuration(kind: str):
  """A run that trains everything except the autoencoder, on reading, writing and text, with dropped prompts."""
  config = tiny.configuration() if kind == "flow" else tiny.janus()
  part = family(config.model.generation).stored.part
  trained = (*config.optimizer.trained, "understanding_encoder/(?!head).*")
  return config.replace(
    train=dict(batch_size=3, steps=STEPS),
    optimizer=dict(
      learning_rate=2e-3,
      warmup_steps=4,
      weight_decay=0.1,
      trained=trained,
      frozen=("understanding_encoder/head", part),
    ),
    data=dict(
      sources=dict.fromkeys(TASKS, (("shapes", 1.0),)),
      mixture=((0, (1, 1, 1)),),
      prompt_drop=0.3,
      shapes=dict(size=60),
      plan_cache="",
    ),
  )


def inputs(config, model, data, number: int):
  """The batch of a step, with random outputs of the frozen encoder, and its draws."""
  batch, kind = data.batch(number), family(config.model.generation).stored
  rng = np.random.default_rng(number)
  shape = (*batch.image_kind.shape, *kind.shape(config.model))
  if kind.name == "codes":
    stored = rng.integers(0, config.model.autoencoder.codebook_size, shape).astype(np.uint16)
  else:
    mean, log_variance = np.split(rng.standard_normal(shape), 2, axis=-1)
    stored = np.concatenate([mean, log_variance - 3], axis=-1).astype(bfloat16)
  batch = batch._replace(stored=stored)
  key = jax.random.fold_in(jax.random.key(config.train.seed), number)
  return batch, draw(model, key, batch, config.objective)


def plain(batch, draws) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  f32 = lambda x: np.asarray(x, np.float32) if np.asarray(x).dtype == bfloat16 else np.asarray(x)
  batch = {name: f32(x) for name, x in batch._asdict().items()}
  return batch | {"stored": batch["stored"].astype(np.int32) if draws is None else batch["stored"]}, (
    {} if draws is None else {name: np.asarray(x) for name, x in draws._asdict().items()}
  )


def relative(ours, theirs) -> float:
  ours, theirs = (np.concatenate([np.ravel(x) for x in side]).astype(np.float64) for side in (ours, theirs))
  return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("kind", ["flow", "codes"])
def test_twenty_steps_are_those_of_pytorch(kind):
  config = configuration(kind)
  setup.check(config)
  model, data = setup.build(config, jax.devices()[0]), setup.open_data(config)
  state, step = tiny.training(config)
  flat = {path: np.asarray(x) for path, x in flatten_dict(tiny.params(config.model), sep="/").items()}
  trained = set(flatten_dict(state.trained, sep="/"))
  reference = torch_training.Model(config.model.to_dict(), flat, trained)
  trainer = torch_training.Trainer(reference, dataclasses.asdict(config.optimizer), config.objective.weights)

  first = jax.jit(jax.value_and_grad(make_loss(model, config.objective), has_aux=True))
  key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
  _, gradient = first(optim.merge(state.trained, state.frozen), inputs(config, model, data, 0)[0], key)
  norms = {part: float(jnp.sqrt(sum(jnp.sum(x**2) for x in leaves))) for part, leaves in _parts(gradient).items()}
  seen = set()
  for number in range(STEPS):
    batch, draws = inputs(config, model, data, number)
    seen |= {int(x) for x in np.unique(batch.image_kind)}
    state, metrics = step(state, batch)
    losses = trainer.step(*plain(batch, draws))
    assert set(losses) == set(config.objective.weights)
    for name, value in losses.items():
      assert float(metrics[f"loss_{name}"]) == pytest.approx(value, rel=1e-4, abs=1e-5), (number, name)
    if number == 0:
      for part, norm in trainer.norms.items():
        assert norms[part] == pytest.approx(norm, rel=1e-3), part
  assert {READ, WRITE} <= seen
  ours, theirs = flatten_dict(state.trained, sep="/"), reference.trained
  for part in {path.split("/")[0] for path in trained}:
    paths = [path for path in trained if path.split("/")[0] == part]
    last = [theirs[path].detach().numpy() for path in paths]
    moved = relative([flat[path] for path in paths], last)
    assert relative([np.asarray(ours[path]) for path in paths], last) < min(1e-3, 0.1 * moved), part


def _parts(tree) -> dict[str, list[jax.Array]]:
  return {part: jax.tree.leaves(leaves) for part, leaves in tree.items()}
