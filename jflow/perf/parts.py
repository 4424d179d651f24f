"""The parts of a train step, each compiled and timed alone on the same batch."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jflow.batch import WRITE, Batch
from jflow.config import RunConfig
from jflow.generation.base import family
from jflow.models.compaction import Capacity, Chosen
from jflow.models.unified import UnifiedModel, normalise
from jflow.objectives import next_token
from jflow.perf.timing import spread
from jflow.training import optim
from jflow.training.state import TrainState
from jflow.training.step import draw


def time_parts(
  config: RunConfig, model: UnifiedModel, state: TrainState, batch: Batch, repeats: int
) -> dict[str, dict[str, float]]:
  """Seconds of each part, {"min", "median", "max"}; forward, and backward where the step has one."""
  out = {}
  for name, function, args in _parts(config, model, state, batch):
    compiled = jax.jit(function).lower(*args).compile()
    out[name] = spread([_timed(compiled, args) for _ in range(repeats + 1)][1:])
  return out


def _timed(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
  started = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - started


def _parts(
  config: RunConfig, model: UnifiedModel, state: TrainState, batch: Batch
) -> Iterator[tuple[str, Callable, tuple]]:
  params = optim.merge(state.trained, state.frozen)
  c, lm = model.config, model.config.language_model
  (rows, seq), kinds, most = batch.tokens.shape, jnp.asarray(batch.image_kind), model.capacity
  if most is None:
    most = Capacity(None, None, None)
  chosen = Chosen(kinds == WRITE, most.written)
  seen = Chosen(kinds > 0, most.all)
  key = jax.random.key(0)
  draws = draw(model, key, batch, config.objective)
  apply = lambda p, method, *args: model.apply({"params": p}, *args, method=method)
  total = lambda x: jnp.sum(x.astype(jnp.float32))
  hidden = 0.1 * jax.random.normal(key, (rows, seq, lm.embed_dim), model.dtype)
  written = 0.1 * jax.random.normal(key, (chosen.places, c.written_patches, lm.embed_dim), model.dtype)

  def gradient(function, names, *args):
    """Gradient of the sum of a function's output by the parameters of some parts and by its last argument."""

    def run(p, *args):
      inner = lambda part, x: function({**p, **part}, *args[:-1], x)
      return jax.grad(inner, argnums=(0, 1))({name: p[name] for name in names}, args[-1])

    return run, (params, *args)

  def language_model(p, x):
    out = apply(p, "backbone", x, batch.positions, batch.segment_ids)
    return total(out.hidden) + (total(out.layer) if out.layer is not None else 0.0)

  trained = [name for name in params if name in state.trained]
  yield "llm", *gradient(language_model, [n for n in trained if n == "language_model"], hidden)
  kernel = params["language_model"]["head"]["kernel"]
  head = lambda x, k: next_token.loss(x, k, batch.targets, batch.loss_mask)
  by = (0, 1) if "language_model" in trained else 0
  yield "head", jax.value_and_grad(head, argnums=by), (hidden, kernel)
  yield "siglip", lambda p, images: apply(p, "features", normalise(seen.take(images))), (params, batch.images)
  pixels = lambda images: normalise(chosen.take(images))
  stored = family(c.generation).stored
  if stored and not config.data.stored:
    encoder = c.autoencoder.make(model.dtype)
    encode = lambda p, images: encoder.apply({"params": p}, pixels(images), method="encode")
    yield stored.part, encode, (params[stored.part], batch.images)
  aligned = config.objective.weights.get("alignment")
  ahead = jnp.zeros((chosen.places, *(stored.shape(c) if stored else (0,))), stored.dtype if stored else None)

  def heads(p, draws, x):
    """Writes images from what an encoder made of them, and takes the losses of the LLM's output `x` at their slots."""

    def parts(m, images):
      slots_IKD, context = m.writer.write(pixels(images), ahead, jax.tree.map(chosen.take, draws))
      losses = m.writer.losses(lambda first, count: x[:, :count], context, jnp.ones(chosen.places, bool))
      out = total(slots_IKD) + sum(losses.values())
      return out + total(m.objectives["alignment"].alignment_head(x)) if aligned else out

    return apply(p, parts, batch.images)

  names = [name for name in trained if name not in ("language_model", "understanding_encoder")]
  yield "heads", *gradient(heads, names, draws, written)

  optimizer = optim.make_optimizer(config.optimizer)

  def update(state: TrainState):
    gradients = jax.tree.map(lambda x: 1e-3 * x, state.trained)
    updates, inner = optimizer.update(gradients, state.optimizer, state.trained)
    new = optax.apply_updates(state.trained, updates)
    return state.replace(trained=new, optimizer=inner, ema=optim.update_ema(state.ema, new, 0.99) if state.ema else {})

  yield "optimizer", update, (state,)
