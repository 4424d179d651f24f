"""Laws of a training step that writes codes: accumulation, what stays frozen, codes in the step or made ahead."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict
from refusals import refused

from jflow import sharding
from jflow.batch import WRITE
from jflow.generation.base import family
from jflow.models.flops import Work
from jflow.training import encode, program, setup
from jflow.training.flops import model_flops_of

KIND = family(tiny.JANUS.generation).stored


def configuration(accumulation: int = 1, **data):
  """Reading, writing and text of the built-in world; half of the prompts are dropped."""
  fields = dict(
    sources=dict.fromkeys(("understanding", "generation", "text"), (("shapes", 1.0),)),
    mixture=((0, (1, 2, 1)),),
    prompt_drop=0.5,
    shapes=dict(size=60),
    plan_cache="",
  )
  return tiny.janus(train=dict(accumulation=accumulation), data=fields | data)


@functools.cache
def batch():
  return setup.open_data(configuration()).batch(0)


@functools.cache
def training(accumulation: int = 1):
  return tiny.training(configuration(accumulation))


@functools.cache
def first_step():
  state, step = training()
  return step(state, batch())


def close(ours, theirs):
  for name in theirs[1]:
    assert float(ours[1][name]) == pytest.approx(float(theirs[1][name]), rel=2e-5), name
  near = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max()))
  jax.tree.map(near, tiny.adam(ours[0]).mu, tiny.adam(theirs[0]).mu)


def test_rows_one_by_one_have_the_loss_and_the_gradient_of_all_at_once():
  state, step = training(accumulation=4)
  close(step(state, batch()), first_step())


def test_frozen_parts_keep_their_bits_and_the_others_move():
  (before, _), (after, metrics) = training(), first_step()
  assert set(before.frozen) == {"understanding_encoder", "vq"}
  jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
  for path, old in flatten_dict(before.trained, sep="/").items():
    assert np.any(np.asarray(old) != np.asarray(flatten_dict(after.trained, sep="/")[path])), path
  assert {name for name in metrics if name.startswith("loss_")} == {"loss_text", "loss_codes"}
  assert 0.3 < float(metrics["loss_codes"]) / np.log(tiny.JANUS.autoencoder.codebook_size) < 3


def test_a_step_on_codes_made_ahead_is_that_on_the_pixels():
  """And takes its codes from nowhere else."""
  written = batch().image_kind == WRITE
  run = encode.encoder(KIND, tiny.params(tiny.JANUS)["vq"], tiny.JANUS)
  codes = np.zeros((*written.shape, tiny.JANUS.patches), np.uint16)
  codes[written] = run(batch().images[written])
  state, step = training()
  ahead = step(state, batch()._replace(stored=codes))
  close(ahead, first_step())
  other = step(state, batch()._replace(stored=(codes + 1) % tiny.JANUS.autoencoder.codebook_size))
  assert abs(float(other[1]["loss_codes"]) - float(ahead[1]["loss_codes"])) > 1e-3


def test_the_fingerprint_covers_what_makes_codes_and_nothing_else():
  vq = tiny.params(tiny.JANUS)["vq"]
  ours = encode.fingerprint(KIND, vq, tiny.JANUS)
  encode.check({"codes-16": ours}, {"vq": vq}, tiny.JANUS)
  for part in vq:
    nudged = vq | {part: jax.tree.map(lambda x: x + np.float32(1e-3), vq[part])}
    same = encode.fingerprint(KIND, nudged, tiny.JANUS) == ours
    assert same == (part in ("decoder", "post_quant_conv")), part
    if not same:
      with refused("codes-16"):
        encode.check({"codes-16": ours}, {"vq": nudged}, tiny.JANUS)
  with refused("VQ"):
    encode.check({"codes-16": ours}, {}, tiny.JANUS)
  groups = tiny.JANUS.autoencoder.norm_groups // 2  # which no weight shows
  other = dataclasses.replace(tiny.JANUS, autoencoder=dataclasses.replace(tiny.JANUS.autoencoder, norm_groups=groups))
  assert encode.fingerprint(KIND, vq, other) != ours


def test_the_flops_of_a_step_follow_the_weights():
  """Six per weight of a trained matrix and token that it sees; codes made ahead save the encoder."""
  shapes = flatten_dict(tiny.shapes(tiny.JANUS), sep="/")
  weights = lambda part: sum(x.size for path, x in shapes.items() if path.startswith(part) and path.endswith("kernel"))
  work = Work(tokens=100.0, pairs=1000.0, loss_tokens=10.0, read=2.0, written=3.0)
  count = lambda **data: model_flops_of(configuration(**data), tiny.JANUS, training()[0].trained, work)
  parts, lm = count(), tiny.JANUS.language_model
  patches = {"understanding_projector": 2, "generation_projector": 3, "generation_head": 3}
  heads = sum(6 * weights(part) * tiny.JANUS.patches * images for part, images in patches.items())
  attention = 12 * lm.num_layers * lm.num_heads * lm.head_dim * work.pairs
  assert parts["heads"] == heads
  assert parts["llm"] == 6 * weights("language_model/layers") * work.tokens + attention
  assert parts["head"] == 6 * weights("language_model/head") * work.loss_tokens
  assert parts["vq"] == 3 * tiny.JANUS.autoencoder.encoder_flops(16) > 0
  assert count(stored=True) == parts | {"vq": 0.0}


def test_a_run_that_would_train_the_tokenizer_is_refused():
  config = tiny.janus(optimizer=dict(trained=("(?!understanding_encoder).*",), frozen=("understanding_encoder",)))
  device = jax.devices()[0]
  with refused("optimizer.trained", "vq"):
    program.make_program(config, setup.build(config, device), sharding.make_mesh(1, 1, 1, [device]))
