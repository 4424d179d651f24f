"""Sampling: prompts -> codes, one after another with guidance on logits -> pixels. One program draws all codes.

Legend: I images, S prompt slots (bucketed), P codes of an image, R rows: the images, twice where guidance has two
halves, D embed, V rows of the codebook.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.generation import slices
from jflow.generation.base import Loop, tenths
from jflow.generation.codes.settings import Settings
from jflow.models.cache import MANY_ROWS, Cache
from jflow.models.layers import Linear
from jflow.models.unified import UnifiedModel, normalise
from jflow.programs import bounded

_COVERS = 4  # sizes of what attention covers of the cache of many rows, each a program
_LONG = 128  # codes from which they are worth it


class CodesSampler:
  """The sampler of codes, see `generation.base.Sampler`.

  Prompts of all lengths share one cache: prompts are padded on the right to S slots that later rows do not see, codes
  follow from slot S on, and positions count on from each prompt's own end. The unconditional half reads the pads that
  replace a prompt.
  """

  halves = ("draw", "decode")

  def __init__(self, model: UnifiedModel, params: Any, tokenizer: Any):
    """`model`: with separate layers, see `unified.for_inference`; of `tokenizer`, the ids `image_start` and `pad`."""
    self._model, self._params = model, params
    self._at_once = slices.at_once(model.config.image_size)
    self._begin, self._pad = np.int32(tokenizer.image_start), np.int32(tokenizer.pad)

  def start(self, seeds: Sequence[int]) -> np.ndarray:
    """The seeds of the draws, uint32[I]."""
    return np.asarray(seeds, np.uint32)

  def given(self, noise: Any, count: int) -> np.ndarray:
    """Raises UserError: codes start from no noise."""
    raise UserError("noise must be left out: a model that writes codes draws them by its seed")

  def evaluations(self, settings: Settings) -> int:
    """See `generation.base.Sampler.evaluations`: the codes of an image."""
    return self._model.config.patches

  def sample(
    self,
    tokens_IS: np.ndarray,
    lengths_I: np.ndarray,
    start: np.ndarray,
    settings: Settings,
    on_step: Callable[[int, int], None] | None = None,
  ) -> np.ndarray:
    """Draws the codes and decodes them. With `on_step` the host waits for the device about ten times."""
    return self.decode(self.write(tokens_IS, lengths_I, start, settings, on_step))

  def decode(self, codes_IP: jax.Array) -> np.ndarray:
    """Pixels of codes, see `sample`."""
    return np.asarray(decode(self._model, self._params, codes_IP, most=self._at_once))

  def write(
    self,
    tokens_IS: np.ndarray,
    lengths_I: np.ndarray,
    start: np.ndarray,
    settings: Settings,
    on_step: Callable[[int, int], None] | None = None,
  ) -> jax.Array:
    """The codes of images, int32[I, P]; see `sample`."""
    p = self._model.config.patches
    tokens = np.asarray(tokens_IS, np.int32)
    inside = np.arange(tokens.shape[1]) >= 1
    twin = np.where(inside, self._pad, tokens)
    rows = {"prompt": (tokens,), "twin": (twin,), "both": (tokens, twin)}[_halves(settings)]
    lengths = np.asarray(lengths_I, np.int32)
    cache = read_prompts(self._model, self._params, np.concatenate(rows), np.tile(lengths, len(rows)))
    codes: Any = jnp.zeros((len(tokens), p), jnp.int32)
    covers = _covers(len(cache.filled), p)
    told = set(tenths(p)) if on_step else {p}
    stops = sorted(told | set(covers))
    for first, stop in zip([0, *stops], stops):
      codes, cache = draw(
        self._model,
        self._params,
        codes,
        cache,
        lengths,
        np.asarray(start, np.uint32),
        np.int32(first),
        np.int32(stop),
        self._begin,
        np.float32(settings.guidance),
        np.float32(settings.temperature),
        **_static(settings, tokens.shape[1] + min(cover for cover in covers if cover >= stop)),
      )
      if on_step and stop in told:
        codes.block_until_ready()
        on_step(stop, p)
    return codes

  def round_trip(self, pixels_IHW3: np.ndarray) -> np.ndarray:
    """See `generation.base.Sampler.round_trip`."""
    return self.decode(encode(self._model, self._params, pixels_IHW3))

  def prepare(self, rows: int, slots: int, settings: Settings, compile: bool = True) -> bool:
    """See `generation.base.Sampler.prepare`."""
    to = (compile, self._model, self._params)
    halves = 2 if _halves(settings) == "both" else 1
    prompts = (jax.ShapeDtypeStruct((halves * rows, *more), jnp.int32) for more in ((slots,), ()))
    cache = read_prompts.prepare(*to, *prompts)
    if cache is None:
      return False
    args = self._drawing(cache, rows)
    covers = _covers(halves * rows, self._model.config.patches)
    drawn = (draw.prepare(*to, *args, **_static(settings, slots + cover)) for cover in covers)
    return all(x is not None for x in drawn) and decode.prepare(*to, args[0], most=self._at_once) is not None

  def loop(self, rows: int, slots: int, settings: Settings) -> Loop:
    """See `generation.base.Sampler.loop`; of the last codes, where attention covers the whole cache."""
    halves = 2 if _halves(settings) == "both" else 1
    prompts = (jax.ShapeDtypeStruct((halves * rows, *more), jnp.int32) for more in ((slots,), ()))
    cache = jax.eval_shape(read_prompts.jitted(self._model), self._params, *prompts)
    static = _static(settings, slots + self._model.config.patches)
    return Loop(draw, self._drawing(cache, rows), static, step="code of each picture", large=False)

  def _drawing(self, cache: Cache, rows: int) -> tuple[Any, ...]:
    """The arguments of `draw` after the params, as shapes."""
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    whole, number = array(jnp.int32), array(jnp.float32)
    codes, seeds = array(jnp.int32, rows, self._model.config.patches), array(jnp.uint32, rows)
    return codes, cache, array(jnp.int32, rows), seeds, whole, whole, whole, number, number


def _halves(settings: Settings) -> str:
  """Which rows a guidance needs: those of the prompt, of its unconditional twin, or both."""
  return {1.0: "prompt", 0.0: "twin"}.get(settings.guidance, "both")


def _covers(rows: int, codes: int) -> list[int]:
  """Numbers of codes of an image that attention may cover, in rising order; one program each."""
  count = _COVERS if rows >= MANY_ROWS and codes >= _LONG else 1
  return [-(-codes * (i + 1) // count) for i in range(count)]


def _static(settings: Settings, slots: int) -> dict[str, Any]:
  """The static arguments of `draw`."""
  return dict(release=settings.precision == "release", greedy=settings.temperature == 0, slots=slots)


@bounded(most=16)
def read_prompts(model: UnifiedModel, params: Any, tokens_RS: jax.Array, lengths_R: jax.Array) -> Cache:
  """The keys and values of the prompts, with room for the codes of an image: a cache of S + P slots, S in use."""
  bound, (r, s) = model.bind({"params": params}), tokens_RS.shape
  x = bound.embed(tokens_RS)
  positions = jnp.broadcast_to(jnp.arange(s), (r, s))
  segments = (positions < lengths_R[:, None]).astype(jnp.int32)
  cache = Cache.empty(model.config.language_model, r, s + model.config.patches, x.dtype)
  return bound.backbone(x, positions, segments, cache).cache


@bounded(most=64, donate=("codes_IP", "cache"))  # up to four covers for each size of a batch
def draw(
  model: UnifiedModel,
  params: Any,
  codes_IP: jax.Array,
  cache: Cache,
  lengths_I: jax.Array,
  seeds_I: jax.Array,
  first: jax.Array,
  stop: jax.Array,
  begin: jax.Array,
  guidance: jax.Array,
  temperature: jax.Array,
  *,
  release: bool,
  greedy: bool,
  slots: int,
) -> tuple[jax.Array, Cache]:
  """Draws the codes `first` to `stop` of each image; a cache of twice as many rows turns guidance on.

  Args:
    codes_IP: int32, the codes before `first`.
    cache: of the prompts and those codes, from `read_prompts`; its slots count for all rows.
    lengths_I: int32, tokens of the prompts.
    seeds_I: uint32; a draw depends on its image's seed and its place in the image alone.
    first, stop: int32[].
    begin: int32[], the begin-of-image token, which is read before the first code.
    guidance, temperature: f32[].
    release: logits and guidance in bf16, as published.
    greedy: the temperature is 0: each code is the most likely.
    slots: of the cache that attention covers; at least those in use after code `stop`.
  """
  i = len(codes_IP)
  halves = len(cache.filled) // i
  both = lambda x: jnp.concatenate([x] * halves)
  guided = lambda x: guide(x[:i], x[i:], guidance.astype(x.dtype)) if halves == 2 else x
  # Logits are linear in what the last product takes: guided before it, half the rows. bfloat16 would be rounded
  # between.
  early = model.dtype == jnp.float32 and not release

  def body(k: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
    codes, cache = carry
    bound = model.bind({"params": params})
    before_I = jax.lax.dynamic_index_in_dim(codes, jnp.maximum(k - 1, 0), axis=1, keepdims=False)
    x_ID = jnp.where(k == 0, bound.embed(begin), bound.writer.slots(before_I))
    positions = both(lengths_I + k)[:, None]
    out = bound.backbone(both(x_ID)[:, None], positions, jnp.ones_like(positions), cache)
    if early:
      logits = bound.writer.logits(out.hidden[:, 0], guided)
    else:
      logits = bound.writer.logits(out.hidden[:, 0])
      logits = guided(logits.astype(jnp.bfloat16) if release else logits).astype(jnp.float32)
    drawn = jnp.argmax(logits, axis=-1).astype(jnp.int32) if greedy else pick(logits, seeds_I, k, temperature)
    return codes.at[:, k].set(drawn), out.cache

  with nn.intercept_methods(_row_by_row):
    codes_IP, near = jax.lax.fori_loop(first, stop, body, (codes_IP, cache.first(slots)))
  return codes_IP, cache.with_first(near)


def _row_by_row(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
  """Two products of one row in place of one product of two rows, which XLA:CPU takes half as long again for in
  float32."""
  on_cpu = isinstance(context.module, Linear) and jax.default_backend() == "cpu"
  if not on_cpu or context.module.dtype != jnp.float32 or args[0].size != 2 * args[0].shape[-1]:
    return call(*args, **kwargs)
  linear, variables = context.module.unbind()  # a bound module declares its parameters only once
  one: Any = linear.apply
  return jnp.stack([one(variables, row) for row in args[0].reshape(2, -1)]).reshape(*args[0].shape[:-1], -1)


def guide(conditional: jax.Array, unconditional: jax.Array, guidance: jax.Array | float) -> jax.Array:
  """l = l_u + w (l_c - l_u); w = 1 is the conditional one, w = 0 the other."""
  return unconditional + guidance * (conditional - unconditional)


def pick(logits_IV: jax.Array, seeds_I: jax.Array, k: jax.Array, temperature: jax.Array) -> jax.Array:
  """Draws code k of each image from softmax(logits / temperature), temperature above 0: int32[I]."""
  one = lambda seed, logits: jax.random.categorical(jax.random.fold_in(jax.random.key(seed), k), logits)
  return jax.vmap(one)(seeds_I, logits_IV / jnp.maximum(temperature, 1e-6)).astype(jnp.int32)


@bounded(most=6)
def encode(model: UnifiedModel, params: Any, pixels_IHW3: jax.Array) -> jax.Array:
  """uint8[I, H, W, 3] -> codes int32[I, P]."""
  return model.bind({"params": params}).writer.encode(normalise(pixels_IHW3))


@bounded(most=6)
def decode(model: UnifiedModel, params: Any, codes_IP: jax.Array, *, most: int) -> jax.Array:
  """Codes -> f32[I, H, W, 3], by the tokenizer's decoder on at most `most` images at a time."""
  return slices.decoded(model, params, codes_IP, most)
