"""Laws of GRPO on codes: log-probabilities are those of training, and the policy goes where the reward is."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jflow.batch import WRITE, RowShape, empty
from jflow.rl import run
from jflow.rl.prompts import Asked
from jflow.training import optim
from jflow.training.state import TrainState

IDS = types.SimpleNamespace(image_start=5, pad=6)
GROUP, IMAGES, P = 4, 8, tiny.JANUS.patches


def configuration(updates=1, **explore):
  return tiny.janus(
    train=dict(batch_size=IMAGES, ema=0.0),
    optimizer=dict(
      trained=("language_model", "generation_.*"), frozen=("understanding_.*", "vq"), learning_rate=1e-2, warmup_steps=1
    ),
    rl=dict(
      method="grpo",
      prompts="shapes",
      group=GROUP,
      rewards=(("arm", 1.0),),
      clip=0.2,
      kl=0.01,
      updates=updates,
      explore=dict(guidance=1.0, temperature=1.0) | explore,
    ),
  )


def asked():
  tokens = np.random.default_rng(0).integers(10, tiny.VOCABULARY, (2, 8)).repeat(GROUP, 0).astype(np.int32)
  return Asked(tokens, np.array([6, 8], np.int32).repeat(GROUP), np.arange(2, dtype=np.int32).repeat(GROUP))


@functools.cache
def started(updates=1):
  """(policy, state of step 0, sample, update)."""
  config = configuration(updates)
  policy, optimizer = run.make_policy(config, tiny.model(tiny.JANUS), IDS), optim.make_optimizer(config.optimizer)
  parts = optim.partition(tiny.params(tiny.JANUS), config.optimizer.trained, config.optimizer.frozen)
  state = TrainState.create(*parts, optimizer, referred=True)
  sample, update = run.make_sample(config, policy), run.make_update(config, policy, optimizer, ["arm"])
  return policy, state, jax.jit(sample), jax.jit(update)


def packed(codes):
  """One row for each picture, as training packs it."""
  some = asked()
  shape = RowShape(8 + 1 + P, 1, P, tiny.JANUS.image_size, "codes", P, (P,), "uint16")
  batch = empty(IMAGES, shape)
  for row, length in enumerate(some.lengths):
    stop = length + 1 + P
    batch.tokens[row, :length], batch.tokens[row, length] = some.tokens[row, :length], IDS.image_start
    batch.positions[row, :stop], batch.segment_ids[row, :stop] = np.arange(stop), 1
    batch.image_index[row, length + 1 : stop] = np.arange(P)
    batch.image_start[row, 0], batch.image_kind[row, 0], batch.stored[row, 0] = length + 1, WRITE, codes[row]
  return batch


def test_what_was_drawn_has_the_log_probability_of_supervised_training():
  _, state, sample, _ = started()
  drawn, _, _ = sample(state.trained, state.frozen, state.step, asked())
  loss = jax.jit(lambda p, b: tiny.model(tiny.JANUS).apply({"params": p}, b, None, ("codes",), method="losses"))
  want = float(loss(tiny.params(tiny.JANUS), packed(np.asarray(drawn.codes)))["codes"])
  assert -float(jnp.sum(jnp.mean(drawn.log_probability, 1))) == pytest.approx(want, rel=1e-5)


def test_the_decoding_loop_draws_from_the_probabilities_of_one_pass():
  """At a low temperature and with guidance the loop takes the most likely code, which one pass finds as likely."""
  config = configuration(guidance=3.0, temperature=1e-3)
  policy = run.make_policy(config, tiny.model(tiny.JANUS), IDS)
  some, params = asked(), tiny.params(tiny.JANUS)
  drawn = jax.jit(lambda p: policy.sample(p, some.tokens, some.lengths, jax.random.key(0), GROUP).drawn)(params)
  assert float(jnp.mean(jnp.exp(drawn.log_probability) > 0.5)) > 0.98  # the rest are ties
  assert len(np.unique(drawn.codes)) > 3


def test_a_bandit_pulls_the_arm_that_pays():
  """The reward is the share of codes of one half of the codebook."""
  _, state, sample, update = started()
  paid, rows = tiny.JANUS.autoencoder.codebook_size // 2, []
  for step in range(12):
    drawn, _, diversity = sample(state.trained, state.frozen, jnp.int32(step), asked())
    reward = (np.asarray(drawn.codes) < paid).mean(1).astype(np.float32)
    state, metrics = update(state, asked(), drawn, reward[:, None], diversity)
    rows.append({name: float(x) for name, x in metrics.items()})
  assert rows[0]["ratio"] == pytest.approx(1, abs=1e-5) and rows[0]["kl"] == pytest.approx(0, abs=1e-6)
  assert np.mean([row["reward"] for row in rows[-3:]]) > np.mean([row["reward"] for row in rows[:3]]) + 0.1
  assert rows[-1]["kl"] > 1e-3


def test_several_updates_on_a_batch_clip_and_count_as_one_step():
  _, state, sample, _ = started()
  drawn, _, diversity = sample(state.trained, state.frozen, state.step, asked())
  reward = np.asarray(drawn.codes).mean(1).astype(np.float32)
  new, metrics = started(updates=2)[3](state, asked(), drawn, reward[:, None], diversity)
  assert int(new.step) == 1
  assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state.trained), jax.tree.leaves(new.trained)))
  assert float(metrics["ratio"]) != 1.0 and 0 <= float(metrics["clipped"]) <= 1
