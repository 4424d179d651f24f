"""Golden losses and the gradient norms of the parts of a model."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.interop import parity_reading
from jflow.interop.golden import Group, Output
from jflow.interop.parity_reading import UND, Runner
from jflow.models.config import ModelConfig

Loss = Callable[[Runner, Mapping[str, np.ndarray]], Callable[[Any], jax.Array]]


def group(
  name: str, parts: Mapping[str, str], loss: Loss, inputs: Mapping[str, Any], needs: Sequence[str], fits: Any
) -> Group:
  """The loss `train/NAME_loss`, and `train/NAME_grad_norm/PART` for each part.

  Args:
    name: of the loss.
    parts: published name -> first part of the paths of its parameters.
    loss: (runner, arrays) -> nested parameters -> f32[].
    inputs: see `Group.inputs`.
    needs: of the inputs, those of the loss.
    fits: see `Group.fits`.
  """
  norms = {f"train/{name}_grad_norm/{part}": path for part, path in parts.items()}

  def run(runner: Runner, g: Mapping[str, np.ndarray], want: Callable[[str], bool]) -> dict[str, Output]:
    function = loss(runner, g)
    if not any(map(want, norms)):
      return {f"train/{name}_loss": Output(np.asarray(jax.jit(function)(runner.params)))}

    @jax.jit
    def values(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
      wanted = {path: params[path] for path in norms.values()}
      value, gradient = jax.value_and_grad(lambda some: function({**params, **some}))(wanted)
      squares = lambda tree: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))
      return value, {key: jnp.sqrt(squares(gradient[path])) for key, path in norms.items()}

    value, gradients = values(runner.params)
    return {key: Output(np.asarray(x)) for key, x in {f"train/{name}_loss": value, **gradients}.items()}

  outputs = {f"train/{name}_loss": (f"the loss of {name}", tuple(needs))}
  outputs |= {key: (f"the gradient of {path}", tuple(needs)) for key, path in norms.items()}
  return Group(inputs=inputs, outputs=outputs, fits=fits, run=run)


def text(parts: Mapping[str, str]) -> Group:
  """The loss of the answers of the rows of `und/`: the mean over all ids after the end of each row's last image."""
  found = group("text", parts, _text_loss, UND, tuple(UND), _fits_text)
  return dataclasses.replace(found, check=parity_reading.check_understanding)


def _ends(tokens: np.ndarray, vocabulary: int) -> list[int]:
  """The position of the last end of an image of each row; the id is the second from the end of the vocabulary."""
  ends = [np.flatnonzero(row == vocabulary - 2) for row in tokens]
  for row, found in enumerate(ends):
    if not len(found) or found[-1] + 1 == tokens.shape[1]:
      raise UserError(f"und/input_ids row {row} must have ids after <end_of_image>, {vocabulary - 2}")
  return [int(found[-1]) for found in ends]


def _fits_text(g: Mapping[str, np.ndarray], c: ModelConfig) -> None:
  parity_reading.fits_understanding(g, c)
  _ends(g["und/input_ids"], c.language_model.vocab_size)


def _text_loss(runner: Runner, g: Mapping[str, np.ndarray]) -> Callable[[Any], jax.Array]:
  model, tokens = runner.model, g["und/input_ids"].astype(np.int32)
  mask = g["und/attention_mask"].astype(bool)
  pixels = parity_reading.pixels_of(g, model.config.image_size)
  index, place = parity_reading.place_images(runner, g)
  ends = np.array(_ends(tokens, runner.vocabulary))[:, None]
  learned = (np.arange(tokens.shape[1] - 1) >= ends) & mask[:, 1:]
  positions = parity_reading.positions(mask)

  def loss(params: Any) -> jax.Array:
    bound = model.bind({"params": params})
    slots = parity_reading.read_slots(bound, bound.features(pixels))
    x = bound.assemble(tokens, slots[place].reshape(len(tokens), -1, slots.shape[-1]), index)
    logits = bound.logits(bound.backbone(x, positions, mask.astype(np.int32)).hidden[:, :-1])
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(learned, log_p, 0.0)) / learned.sum()

  return loss
