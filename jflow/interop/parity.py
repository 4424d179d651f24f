"""Comparison of a checkpoint with golden outputs of the PyTorch code: SigLIP, LLM, g_enc and g_dec, decoding, sampler.

`python -m jflow parity --help` describes the golden file.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow.generation.flow import equations as flow
from jflow.interop import golden
from jflow.interop.checkpoints import describe
from jflow.interop.comparison import Line, line
from jflow.models.cache import Cache
from jflow.models.unified import UnifiedModel, for_inference

TOLERANCE = 1e-5  # default relative L2 error
# Output -> the component that makes it from the ones before.
_COMPONENTS = {
  "und/features": "understanding_encoder",
  "und/inputs_embeds": "understanding_projector, understanding_start or the embedding",
  "und/logits": "language_model",
  "und/greedy_tokens": "greedy decoding with the cache",
  "text/logits": "language_model",
  "gen/t_emb": "generation_encoder (time embedding)",
  "gen/z_emb": "generation_encoder",
  "gen/skip": "generation_encoder",
  "gen/hidden": "language_model",
  "gen/velocity_cond": "generation_output_norm, generation_output_projector or generation_decoder",
  "gen/velocity_uncond": "the dropped prompt",
  "gen/trajectory": "guidance or the solver",
  "gen/z1": "guidance or the solver",
}


class Output(NamedTuple):
  """An output of jflow in PyTorch's layout; `mask`, bool[B, T], marks the tokens to compare."""

  value: np.ndarray
  mask: np.ndarray | None = None


def compare(arrays: Mapping[str, np.ndarray], ours: Mapping[str, Output], tolerance: float) -> list[Line]:
  """Compares every output in the golden file, whole or as a variant (`_last4`, `_first8`, `_mean`)."""
  lines = []
  for key, component in _COMPONENTS.items():
    for name in arrays:
      if golden.VARIANT.sub("", name) == key:
        value, mask = _variant(ours[key], name, arrays[name].shape)
        lines.append(line(name, component, value, arrays[name], tolerance, mask))
  return lines


def _variant(output: Output, name: str, shape: tuple[int, ...]) -> Output:
  """The first or last tokens of an array, or its mean over tokens, in the layout of the golden array.

  A map [B, C, H, W] has H * W tokens in raster order; where that does not give `shape`, axis 1 is sliced instead.
  """
  variant = golden.VARIANT.search(name)
  if variant is None:
    return output
  stored, mask = output
  tokens = stored if stored.ndim != 4 else stored.reshape(*stored.shape[:2], -1).swapaxes(1, 2)
  side, count, mean = variant.groups()
  if mean:
    weight = np.ones(tokens.shape[:2]) if mask is None else mask
    weight = weight / weight.sum(axis=1, keepdims=True)
    first = np.einsum("bt...,bt->b...", tokens.astype(np.float64), weight)
    options = [first, first[:, None], stored.mean(axis=1, dtype=np.float64)]
    mask = None
  else:
    cut = slice(0, int(count)) if side == "first" else slice(-int(count), None)
    options = [tokens[:, cut], tokens[:, cut].swapaxes(1, -1), stored[:, cut]]
    mask = None if mask is None else mask[:, cut]
  return Output(next((x for x in options if x.shape == shape), options[0]), mask)


class Runner:
  """Runner of a model's parts in float32 on the inputs of a golden file."""

  def __init__(self, model: UnifiedModel, params: Any):
    self.model, self.params = model, params
    self.vocabulary = model.config.language_model.vocab_size

  def apply(self, method: str | Callable[..., Any], *args: Any) -> Any:
    """The result of one method of the model, compiled."""
    return _apply(self.model, method, self.params, *args)

  def understanding(self, g: Mapping[str, np.ndarray], want: Callable[[str], bool]) -> dict[str, Output]:
    """Features, embeddings, logits and greedy tokens of the rows of `und/`."""
    tokens, mask = g["und/input_ids"].astype(np.int32), g["und/attention_mask"].astype(bool)
    size = self.model.config.image_size
    pixels = g["und/pixels"].astype(np.float32).reshape(-1, 3, size, size)
    features = self.apply("features", pixels.transpose(0, 2, 3, 1))
    slots, index = self._place(tokens, self.apply(_read_slots, features), *golden.special_ids(g, self.vocabulary))
    embeds = self.apply("assemble", tokens, slots, index)
    out = {
      "und/features": Output(np.asarray(features)),
      "und/inputs_embeds": Output(np.asarray(embeds), mask),
    }
    if want("und/logits"):
      positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
      hidden = self.apply("backbone", embeds, positions, mask.astype(np.int32)).hidden
      out["und/logits"] = Output(np.asarray(self.apply("logits", hidden)), mask)
    if want("und/greedy_tokens"):
      out["und/greedy_tokens"] = Output(self._greedy(np.asarray(embeds), mask, golden.greedy_count(g)))
    return out

  def _place(self, tokens: np.ndarray, slots_IKD: jax.Array, boi: int, image: int) -> tuple[jax.Array, np.ndarray]:
    """Distributes images over rows: [B, M * K, D] slots and int32[B, S] indices into them."""
    k = slots_IKD.shape[1]
    starts = golden.image_starts(tokens, len(slots_IKD), k - 1, boi, image)
    most = max(map(len, starts))
    index, place = np.full(tokens.shape, -1, np.int32), np.zeros((len(tokens), most), np.int32)
    used = 0
    for b, row in enumerate(starts):
      for m, start in enumerate(row):
        index[b, start : start + k] = m * k + np.arange(k)
        place[b, m] = used
        used += 1
    return slots_IKD[place].reshape(len(tokens), most * k, -1), index

  def _greedy(self, embeds: np.ndarray, mask: np.ndarray, count: int) -> np.ndarray:
    """Decodes `count` tokens per row as `understand` does: prompts padded on the right, each row at its own length."""
    lengths = mask.sum(axis=1).astype(np.int32)
    order = np.argsort(~mask, axis=1, kind="stable")  # left padding to the right end
    embeds = np.take_along_axis(embeds, order[..., None], axis=1)
    b, s = mask.shape
    segments = (np.arange(s) < lengths[:, None]).astype(np.int32)
    cache = Cache.empty(self.model.config.language_model, b, s + count, jnp.float32)
    out = self.apply("backbone", embeds, np.broadcast_to(np.arange(s, dtype=np.int32), (b, s)), segments, cache)
    cache, last = out.cache.replace(length=lengths), out.hidden[np.arange(b), lengths - 1]
    logits, answer = self.apply("logits", last), []
    for i in range(count):
      answer.append(np.asarray(jnp.argmax(logits, axis=-1), np.int32)[:, None])
      if i + 1 < count:
        x = self.apply("embed", answer[-1])
        out = self.apply("backbone", x, lengths[:, None] + i, np.ones((b, 1), np.int32), cache)
        cache, logits = out.cache, self.apply("logits", out.hidden[:, 0])
    return np.concatenate(answer, axis=1)

  def text(self, g: Mapping[str, np.ndarray]) -> dict[str, Output]:
    """Logits of plain token rows."""
    tokens = g["text/input_ids"].astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    hidden = self.apply("backbone", self.apply("embed", tokens), positions, np.ones_like(tokens)).hidden
    return {"text/logits": Output(np.asarray(self.apply("logits", hidden)))}

  def generation(self, g: Mapping[str, np.ndarray], want: Callable[[str], bool]) -> dict[str, Output]:
    """Embeddings and velocities at `gen/t`, and the Euler trajectory; rows with the prompt, then without."""
    prompt = g["gen/prompt_ids"].reshape(-1).astype(np.int32)
    z0 = g["gen/z0"].astype(np.float32).transpose(0, 2, 3, 1)
    n = len(z0)
    step = functools.partial(_velocity, self.model, self.params, prompt)
    v, parts = step(z0, np.broadcast_to(np.asarray(g["gen/t"], np.float32), (n,)))
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


def _read_slots(model: UnifiedModel, features: jax.Array) -> jax.Array:
  return model.reader.slots(features)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: UnifiedModel, method: str | Callable[..., Any], params: Any, *args: Any) -> Any:
  return model.apply({"params": params}, *args, method=method)


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


def compare_model(checkpoint: str, path: pathlib.Path, tolerance: float) -> list[Line]:
  """Runs a checkpoint on the inputs of a golden file and compares.

  Raises:
    UserError: the file is unreadable, lacks an input or any output, or is of another model.
  """
  arrays = golden.read(path)
  groups = golden.check(path, arrays, _COMPONENTS)
  found = describe(checkpoint)
  golden.check_fits(arrays, groups, found.config)
  model, params = for_inference(
    UnifiedModel(found.config, jnp.dtype("float32"), remat="none", unroll=1, attention="xla"),
    found.read_params(),
  )
  bases = {golden.VARIANT.sub("", name) for name in arrays}
  ours: dict[str, Output] = {}
  with jax.default_matmul_precision("highest"):
    runner = Runner(model, jax.device_put(params))
    del params
    if "und" in groups:
      ours |= runner.understanding(arrays, bases.__contains__)
    if "text" in groups:
      ours |= runner.text(arrays)
    if "gen" in groups:
      ours |= runner.generation(arrays, bases.__contains__)
  return compare(arrays, ours, tolerance)
