"""Laws of compaction: what is taken is put back, and the losses do not depend on the room for images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax.traverse_util import flatten_dict

from jflow.batch import WRITE
from jflow.models.compaction import Capacity, Chosen

MASK = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1], [0, 0, 1]], bool)
CHOSEN = list(zip(*np.nonzero(MASK)))


@pytest.mark.parametrize("most", [None, 7, 5])
def test_images_are_taken_in_their_order_and_the_rest_is_zeros(most):
  chosen = Chosen(jnp.asarray(MASK), most)
  values = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(np.float32)
  got = np.asarray(chosen.take(values))
  np.testing.assert_array_equal(got[:5], [values[at] for at in CHOSEN])
  assert len(got) == (most or 12) and not got[5:].any()
  assert bool(chosen.fits) and chosen.real_I.tolist() == [True] * 5 + [False] * (len(got) - 5)


def test_too_many_images_are_told():
  assert not bool(Chosen(jnp.asarray(MASK), 4).fits)


def test_values_move_between_two_choices():
  some, other = MASK & (np.arange(3) > 0), MASK
  values = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
  first, second = Chosen(jnp.asarray(other), 6), Chosen(jnp.asarray(some), 5)
  np.testing.assert_array_equal(second.of(first, first.take(values)), second.take(values))
  back = np.asarray(first.of(second, second.take(values)))
  np.testing.assert_array_equal(back, np.where(np.asarray(first.take(some)), first.take(values), 0))


def test_positions_of_images_are_put_back_where_they_came_from():
  """Three positions for each image; also their gradients."""
  rng = np.random.default_rng(2)
  row = rng.standard_normal((4, 11, 2)).astype(np.float32)
  start = np.array([[1, 0, 7], [0, 0, 0], [0, 2, 5], [0, 0, 8]])
  slot, inside = np.full((4, 11), -1), np.zeros((4, 11), int)
  for b, m in CHOSEN:
    slot[b, start[b, m] : start[b, m] + 3], inside[b, start[b, m] : start[b, m] + 3] = m, np.arange(3)
  chosen = Chosen(jnp.asarray(MASK), 6)
  taken = np.asarray(chosen.at(jnp.asarray(row), start, 0, 3))
  np.testing.assert_array_equal(taken[:5], [row[b, start[b, m] : start[b, m] + 3] for b, m in CHOSEN])
  back = lambda x: chosen.spread(chosen.at(x, start, 0, 3), jnp.asarray(slot), jnp.asarray(inside))
  np.testing.assert_array_equal(back(jnp.asarray(row)), np.where(slot[..., None] >= 0, row, 0))
  weight = rng.standard_normal(row.shape).astype(np.float32)
  gradient = jax.grad(lambda x: jnp.sum(back(x) * weight))(jnp.asarray(row))
  np.testing.assert_array_equal(gradient, np.where(slot[..., None] >= 0, weight, 0))


def test_less_room_changes_neither_losses_nor_gradients():
  batch, draws = tiny.mixed(), tiny.draws(4)
  small = tiny.model().clone(capacity=Capacity(read=3, written=3, all=6, segments=3))
  want, got = (tiny.loss_and_gradient(model, tiny.params(), batch, draws) for model in (tiny.model(), small))
  assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
  for path, gradient in flatten_dict(got[1], sep="/").items():
    wanted = flatten_dict(want[1], sep="/")[path]
    atol = 2e-6 * max(float(np.abs(wanted).max()), 1.0)  # that of keys' biases is zero but for rounding
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=atol, err_msg=path)


@pytest.mark.parametrize("field", ["read", "written", "all", "segments"])
def test_too_little_room_is_never_a_number(field):
  room = Capacity(read=3, written=3, all=6, segments=3)._replace(**{field: 2})
  sums = tiny.loss_sums(tiny.model().clone(capacity=room), tiny.params(), tiny.mixed(), tiny.draws(4))
  assert all(np.isnan(float(value)) for value in sums.values())


def test_images_that_no_one_needs_are_not_encoded():
  """SigLIP reads the images to read, and those to write where a loss compares with them."""
  seen = []

  def count(model, batch, draws, wanted):
    inner = model.understanding_encoder
    object.__setattr__(model, "features", lambda pixels: seen.append(len(pixels)) or inner(pixels))
    return model.losses(batch, draws, wanted)

  model = tiny.model().clone(capacity=Capacity(read=3, written=4, all=6))
  for wanted in (("text", "flow"), tiny.LOSSES):
    function = lambda p: model.apply({"params": p}, tiny.mixed(), tiny.draws(4), wanted, method=count)
    jax.eval_shape(function, tiny.params())
  assert seen == [3, 6] and int((tiny.mixed().image_kind == WRITE).sum()) == 3
