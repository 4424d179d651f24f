"""The parts of a train step, each compiled and timed alone on the same batch."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jflow import head_loss
from jflow.batch import Batch
from jflow.bench.timing import spread
from jflow.models.janusflow import JanusFlow, normalise
from jflow.training import optim
from jflow.training.state import TrainState
from jflow.training.step import draw


def time_parts(
  config: dict[str, Any], model: JanusFlow, state: TrainState, batch: Batch, repeats: int
) -> dict[str, dict[str, float]]:
  """Seconds of each part, {"min", "median", "max"}; forward and backward where the step goes backward."""
  out = {}
  for name, function, args in _parts(config, model, state, batch):
    compiled = jax.jit(function).lower(*args).compile()
    out[name] = spread([_timed(compiled, args) for _ in range(repeats + 1)][1:])
  return out


def _timed(function: Callable[..., Any], args: tuple[Any, ...]) -> float:
  import time

  started = time.perf_counter()
  jax.block_until_ready(function(*args))
  return time.perf_counter() - started


def _parts(
  config, model: JanusFlow, state: TrainState, batch: Batch
) -> Iterator[tuple[str, Callable, tuple]]:
  params = optim.merge(state.trained, state.frozen)
  c, lm = model.config, model.config.language_model
  rows, seq = batch.tokens.shape
  slots = batch.images.shape[0] * batch.images.shape[1]
  key = jax.random.key(0)
  draws = draw(model, key, batch, 0.0, 1.0)
  flat = lambda x: x.reshape(slots, *x.shape[2:])
  apply = lambda p, method, *args: model.apply({"params": p}, *args, method=method)
  total = lambda x: jnp.sum(x.astype(jnp.float32))
  hidden = 0.1 * jax.random.normal(key, (rows, seq, lm.width), model.dtype)
  written = 0.1 * jax.random.normal(key, (slots, c.patches, lm.width), model.dtype)

  def language_model(p, x):
    out = apply(p, "backbone", x, batch.positions, batch.segment_ids)
    return total(out.hidden) + total(out.tap if out.tap is not None else out.hidden)

  llm = {"language_model": params["language_model"]}
  trained = "language_model" in state.trained
  yield "llm", jax.grad(language_model, argnums=(0, 1) if trained else 1), (llm, hidden)
  kernel = params["language_model"]["head"]["kernel"]
  head = lambda x, k: head_loss.next_token(x, k, batch.targets, batch.loss_mask)
  yield "head", jax.value_and_grad(head, argnums=(0, 1) if trained else 0), (hidden, kernel)
  pixels = lambda images: normalise(flat(images))
  encode = lambda p, images: apply(p, "features", pixels(images))
  yield "siglip", encode, ({"understanding_encoder": params["understanding_encoder"]}, batch.images)
  if not config["data"]["latents"]:
    yield (
      "vae",
      lambda p, images: apply(p, "posterior", pixels(images)),
      ({"vae": params["vae"]}, batch.images),
    )

  def heads(p, z, x):
    slots_IKD, skip, time_ID = apply(p, "write_slots", z, flat(draws.time))
    out = total(slots_IKD) + total(apply(p, "velocity", x, skip, time_ID))
    if config["objective"]["weights"]["alignment"]:
      align = lambda module, y: module.alignment_head(y)
      out += total(apply(p, align, x))
    return out

  names = ("generation_", "alignment_head")
  small = {name: x for name, x in params.items() if name.startswith(names)}
  yield "heads", jax.grad(heads, argnums=(0, 2)), (small, flat(draws.noise), written)

  optimizer = optim.make_optimizer(config["optimizer"])

  def update(state: TrainState):
    gradients = jax.tree.map(lambda x: 1e-3 * x, state.trained)
    updates, inner = optimizer.update(gradients, state.optimizer, state.trained)
    new = optax.apply_updates(state.trained, updates)
    return state.replace(trained=new, optimizer=inner, ema=optim.update_ema(state.ema, new, 0.99))

  yield "optimizer", update, (state,)
