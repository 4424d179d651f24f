"""Golden arrays of rectified flow: g_enc, g_dec, the velocity with and without the prompt, Euler steps, its loss."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.generation.flow import equations as flow
from jflow.interop import golden, parity_training
from jflow.interop.golden import IDS, MOST_STEPS, REAL, Group, Output
from jflow.interop.parity_reading import Runner
from jflow.models.config import ModelConfig
from jflow.models.unified import UnifiedModel


def _generation(runner: Runner, g: Mapping[str, np.ndarray], want: Callable[[str], bool]) -> dict[str, Output]:
  """Embeddings and velocities at `gen/t`, and the Euler trajectory; rows with the prompt, then without."""
  prompt = g["gen/prompt_ids"].reshape(-1).astype(np.int32)
  z0 = _latents(g["gen/z0"])
  n = len(z0)
  step = functools.partial(_velocity, runner.model, runner.params, prompt)
  v, parts = step(z0, _times(g, n))
  twice = lambda x: np.concatenate([x, x])
  channels_first = lambda x: np.asarray(x).transpose(0, 3, 1, 2)
  skip, visible = channels_first(parts["skip"]), np.ones(parts["hidden"].shape[:2], bool)
  visible[n:, 1 : len(prompt)] = False
  rows = 2 * n if g.get("gen/t_emb", np.empty(2 * n)).shape[:1] == (2 * n,) else n
  both = twice if rows == 2 * n else (lambda x: x)
  out = {
    "gen/t_emb": Output(both(np.asarray(parts["time"]))),
    "gen/z_emb": Output(both(skip)),
    "gen/skip": Output(both(skip)),
    "gen/hidden": Output(np.asarray(parts["hidden"]), visible),
    "gen/velocity_cond": Output(channels_first(v[:n])),
    "gen/velocity_uncond": Output(channels_first(v[n:])),
  }
  if want("gen/trajectory") or want("gen/z1"):
    steps, guidance = int(g["gen/steps"].item()), float(g["gen/cfg_weight"].item())
    grid, z, trajectory = flow.time_grid(steps), jnp.asarray(z0), []
    for i in range(steps):
      v, _ = step(z, jnp.broadcast_to(grid[i], (n,)))
      z = z + flow.guide(v[:n], v[n:], guidance) / steps
      trajectory.append(channels_first(z))
    out["gen/trajectory"] = Output(np.stack(trajectory))
    out["gen/z1"] = Output(trajectory[-1])
  return out


def _latents(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32).transpose(0, 2, 3, 1)


def _times(g: Mapping[str, np.ndarray], count: int) -> np.ndarray:
  return np.broadcast_to(np.asarray(g["gen/t"], np.float32), (count,))


@functools.partial(jax.jit, static_argnums=(0,))
def _velocity(model: UnifiedModel, params: Any, prompt: jax.Array, z: jax.Array, time: jax.Array) -> Any:
  """Velocities of I images with the prompt and I without (masked except BOS), and their intermediate values."""
  apply = functools.partial(model.apply, {"params": params})
  n, s = len(z), len(prompt)
  slots, skip, time_ID = apply(z, time, method=lambda m, *x: m.writer.slots(*x))
  x = apply(prompt, method="embed")
  x = jnp.concatenate([jnp.broadcast_to(x, (n, *x.shape)), slots], axis=1)
  total = x.shape[1]
  shown = jnp.ones((2 * n, total), jnp.int32).at[n:, 1:s].set(0)
  positions = jnp.broadcast_to(jnp.arange(total), (2 * n, total))
  twice = lambda a: jnp.concatenate([a, a])
  hidden = apply(twice(x), positions, shown, method="backbone").hidden
  v = apply(hidden[:, s + 1 :], twice(skip), twice(time_ID), method=lambda m, *x: m.writer.velocity(*x))
  return v, {"skip": skip, "time": time_ID, "hidden": hidden}


def _loss(runner: Runner, g: Mapping[str, np.ndarray]) -> Callable[[Any], jax.Array]:
  """The mean of (velocity - (x - z0))^2 behind the prompt, at z_t = t x + (1 - t) z0."""
  model, prompt = runner.model, g["gen/prompt_ids"].reshape(-1).astype(np.int32)
  data, noise = _latents(g["train/x"]), _latents(g["gen/z0"])
  n, s = len(data), len(prompt)
  time = _times(g, n)
  z = flow.interpolate(noise, data, time)

  def loss(params: Any) -> jax.Array:
    bound = model.bind({"params": params})
    slots, skip, time_ID = bound.writer.slots(z, time)
    x = bound.embed(prompt)
    x = jnp.concatenate([jnp.broadcast_to(x, (n, *x.shape)), slots], axis=1)
    positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    hidden = bound.backbone(x, positions, jnp.ones_like(positions)).hidden[:, s + 1 :]
    return jnp.mean(jnp.square(bound.writer.velocity(hidden, skip, time_ID) - flow.velocity_target(noise, data)))

  return loss


def _check(path: pathlib.Path, g: Mapping[str, np.ndarray]) -> None:
  count = len(g["gen/z0"])
  if g["gen/t"].ndim and g["gen/t"].shape not in ((1,), (count,)):
    raise UserError(f"{path}: gen/t is {list(g['gen/t'].shape)}, gen/z0 has {count} pictures")
  if (g["gen/t"] < 0).any() or (g["gen/t"] > 1).any():
    raise UserError(f"{path}: gen/t must be in [0, 1]")
  if "gen/steps" in g and not 1 <= int(g["gen/steps"].item()) <= MOST_STEPS:
    raise UserError(f"{path}: gen/steps={g['gen/steps'].item()} must be in 1..{MOST_STEPS}")


def _fits(g: Mapping[str, np.ndarray], c: ModelConfig) -> None:
  golden.check_ids("gen/prompt_ids", g["gen/prompt_ids"], c.language_model.vocab_size)
  shape = (c.autoencoder.latent_channels, c.latent_size, c.latent_size)
  golden.check_shape("gen/z0", g["gen/z0"].shape[-3:], shape)
  if "train/x" in g:
    golden.check_shape("train/x", g["train/x"].shape, (len(g["gen/z0"]), *shape))


_GEN = {
  "gen/prompt_ids": (IDS, ("S",)),
  "gen/z0": (REAL, ("N", "C", "h", "w")),
  "gen/t": (REAL, None),
}
_NEEDS = tuple(_GEN)
_SOLVED = (*_NEEDS, "gen/steps", "gen/cfg_weight")
_HEADS = {
  "vision_gen_enc_model": "generation_encoder",
  "vision_gen_enc_aligner": "generation_projector",
  "vision_gen_dec_aligner_norm": "generation_output_norm",
  "vision_gen_dec_aligner": "generation_output_projector",
  "vision_gen_dec_model": "generation_decoder",
  "language_model": "language_model",
}
_READING = {
  "vision_und_enc_model": "understanding_encoder",
  "vision_und_enc_aligner": "understanding_projector",
  "language_model": "language_model",
}
GROUPS = (
  Group(
    inputs=_GEN | {"gen/steps": (IDS, None), "gen/cfg_weight": (REAL, None)},
    outputs={
      "gen/t_emb": ("generation_encoder (time embedding)", _NEEDS),
      "gen/z_emb": ("generation_encoder", _NEEDS),
      "gen/skip": ("generation_encoder", _NEEDS),
      "gen/hidden": ("language_model", _NEEDS),
      "gen/velocity_cond": ("generation_output_norm, generation_output_projector or generation_decoder", _NEEDS),
      "gen/velocity_uncond": ("the dropped prompt", _NEEDS),
      "gen/trajectory": ("guidance or the solver", _SOLVED),
      "gen/z1": ("guidance or the solver", _SOLVED),
    },
    check=_check,
    fits=_fits,
    run=_generation,
  ),
  parity_training.group(
    "flow", _HEADS, _loss, {**_GEN, "train/x": (REAL, ("N", "C", "h", "w"))}, (*_NEEDS, "train/x"), _fits
  ),
  parity_training.text(_READING),
)
