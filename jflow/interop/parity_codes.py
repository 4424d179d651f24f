"""Golden arrays of codes: the VQ tokenizer, gen_embed, gen_aligner, gen_head, guided logits, greedy codes, pictures."""

import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jflow.errors import UserError
from jflow.generation.codes.sampler import CodesSampler, guide
from jflow.generation.codes.settings import Settings
from jflow.interop import golden, parity_training
from jflow.interop.golden import IDS, REAL, Group, Output
from jflow.interop.parity_reading import CLEAR, Runner, clear_until_it_splits
from jflow.models.autoencoders.vq import unit
from jflow.models.config import ModelConfig

_MAPS = 2.0  # factor of the tolerance of some 40 convolutions
_GUIDANCE = 5.0  # of the published loop, where the file does not say
_GREEDY = ("paint/greedy_", "paint/short_greedy_")


def _channels_first(x: Any) -> np.ndarray:
  return np.asarray(x).transpose(0, 3, 1, 2)


# --- the tokenizer ---------------------------------------------------------------------------------------


def _vq(runner: Runner, g: Mapping[str, np.ndarray], want: Callable[[str], bool]) -> dict[str, Output]:
  c, out = runner.model.config, {}
  codes, clear = g.get("vq/codes"), None
  if "vq/pixels" in g:
    pixels = g["vq/pixels"].astype(np.float32).transpose(0, 2, 3, 1)
    encoded, latents = runner.apply(_encode, pixels)
    cosines = runner.apply(_cosines, latents)
    best = np.asarray(jax.lax.top_k(cosines, 2)[0])
    margin = g.get("vq/margin", best[..., 0] - best[..., 1])
    ours, clear = np.asarray(jnp.argmax(cosines, axis=-1)), margin > CLEAR
    out["vq/encoder_output"] = Output(_channels_first(encoded), loose=_MAPS)
    out["vq/latents"] = Output(_channels_first(latents), loose=_MAPS)
    out["vq/codes"] = Output(ours, clear)
    codes, clear = (ours, clear) if codes is None else (codes, None)
  if codes is None:
    return out
  rows, pictures = runner.apply(_decode, codes.astype(np.int32).reshape(-1, c.latent_size, c.latent_size))
  out["vq/quantised"] = Output(_channels_first(rows), clear)
  out["vq/decoded"] = Output(_channels_first(pictures), loose=_MAPS)
  return out


def _encode(model: Any, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
  vq = model.writer.vq
  encoded = vq.encoder(pixels)
  return encoded, vq.quant_conv(encoded)


def _cosines(model: Any, latents: jax.Array) -> jax.Array:
  """f32[B, N, C], of every position with every row of the codebook."""
  rows = unit(model.writer.vq.codebook)
  return unit(latents).reshape(len(latents), -1, rows.shape[-1]) @ rows.T


def _decode(model: Any, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
  vq = model.writer.vq
  return vq.lookup(codes), vq.decode(codes)


# --- generation ------------------------------------------------------------------------------------------


def _generate(runner: Runner, g: Mapping[str, np.ndarray], want: Callable[[str], bool]) -> dict[str, Output]:
  out, guidance = {}, float(g.get("paint/cfg_weight", np.array(_GUIDANCE)).item())
  if "paint/codes" in g:
    codes = g["paint/codes"].astype(np.int32)
    rows, aligned = runner.apply(_embedded, codes)
    out |= {"paint/gen_embeds": Output(np.asarray(rows)), "paint/aligned": Output(np.asarray(aligned))}
    if "paint/prompt_ids" in g:
      prompt = g["paint/prompt_ids"].astype(np.int32)
      hidden, logits = runner.apply(_forced, prompt, codes)
      _, without = runner.apply(_forced, _twin(prompt, runner.vocabulary), codes)
      log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), codes[..., None], axis=-1)[..., 0]
      out |= {
        "paint/hidden_cond": Output(np.asarray(hidden)),
        "paint/logits_cond": Output(np.asarray(logits)),
        "paint/logits_uncond": Output(np.asarray(without)),
        "paint/logits_guided": Output(np.asarray(guide(logits, without, guidance))),
        "paint/cross_entropy": Output(-log_p),
      }
  drawn = [start for start in _GREEDY if f"{start}prompt_ids" in g]
  if any(want(f"{start}{name}") for start in drawn for name in ("codes", "logits")) or (
    "paint/greedy_codes" not in g and (want("paint/image") or want("paint/image_uint8"))
  ):
    out |= _greedy(runner, g, drawn, guidance)
  if want("paint/image") or want("paint/image_uint8"):
    codes = g["paint/greedy_codes"] if "paint/greedy_codes" in g else out["paint/greedy_codes"].value
    side = runner.model.config.latent_size
    _, picture = runner.apply(_decode, codes.astype(np.int32).reshape(1, side, side))
    picture = np.asarray(picture)
    out["paint/image"] = Output(_channels_first(picture), loose=_MAPS)
    out["paint/image_uint8"] = Output(np.clip((picture + 1) / 2 * 255, 0, 255).astype(np.uint8), within=1)
  return out


def _greedy(runner: Runner, g: Mapping[str, np.ndarray], drawn: list[str], guidance: float) -> dict[str, Output]:
  """The most likely codes of prompts of different lengths, in one batch of the sampler; guided logits along them."""
  prompts = [g[f"{start}prompt_ids"].astype(np.int32) for start in drawn]
  tokens = np.full((len(prompts), max(map(len, prompts))), runner.vocabulary - 1, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt) - 1] = prompt[:-1]
  ids = types.SimpleNamespace(image_start=prompts[0][-1], pad=runner.vocabulary - 1)
  sampler = CodesSampler(runner.model, runner.params, ids)
  lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
  settings = Settings(guidance=guidance, temperature=0.0)
  codes = np.asarray(sampler.write(tokens, lengths, np.zeros(len(prompts), np.uint32), settings))
  out = {}
  for start, prompt, ours in zip(drawn, prompts, codes, strict=True):
    theirs = g.get(f"{start}codes")
    along = (ours if theirs is None else theirs).astype(np.int32)[None]
    _, logits = runner.apply(_forced, prompt, along)
    _, without = runner.apply(_forced, _twin(prompt, runner.vocabulary), along)
    logits = np.asarray(guide(logits, without, guidance))[0]
    best = np.asarray(jax.lax.top_k(logits, 2)[0])
    margin = g.get(f"{start}margin", best[:, 0] - best[:, 1])
    mask = None if theirs is None else clear_until_it_splits(ours, theirs, margin)
    out[f"{start}codes"] = Output(ours, mask, rows=False)
    out[f"{start}logits"] = Output(logits, rows=False)
  return out


def _twin(prompt: np.ndarray, vocabulary: int) -> np.ndarray:
  """The unconditional prompt: pads, the last id of the vocabulary, between BOS and BOI, which are attended to."""
  twin = np.full_like(prompt, vocabulary - 1)
  twin[0], twin[-1] = prompt[0], prompt[-1]
  return twin


def _embedded(model: Any, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
  rows = model.writer.generation_embed(codes)
  return rows, model.writer.generation_projector(rows)


def _forced(model: Any, prompt: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The LLM's output from which each code is predicted, [B, N, D], and the logits of codes, behind a prompt with
  BOI."""
  n, s = codes.shape[1], len(prompt)
  x = model.embed(prompt)
  x = jnp.concatenate([jnp.broadcast_to(x, (len(codes), *x.shape)), model.writer.slots(codes[:, :-1])], axis=1)
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  hidden = model.backbone(x, positions, jnp.ones_like(positions)).hidden[:, s - 1 : s - 1 + n]
  return hidden, model.writer.logits(hidden)


def _loss(runner: Runner, g: Mapping[str, np.ndarray]) -> Callable[[Any], jax.Array]:
  """The mean cross-entropy of the codes behind the prompt."""
  prompt, codes = g["paint/prompt_ids"].astype(np.int32), g["paint/codes"].astype(np.int32)

  def loss(params: Any) -> jax.Array:
    _, logits = _forced(runner.model.bind({"params": params}), prompt, codes)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], axis=-1))

  return loss


# --- what fits -------------------------------------------------------------------------------------------


def _fits_vq(g: Mapping[str, np.ndarray], c: ModelConfig) -> None:
  if "vq/pixels" in g:
    golden.check_shape("vq/pixels", g["vq/pixels"].shape[-3:], (3, c.image_size, c.image_size))
  _fits_codes(g, c, "vq/codes")
  if "vq/margin" in g:
    golden.check_margin(
      "vq/margin", g["vq/margin"], (len(g["vq/pixels" if "vq/pixels" in g else "vq/codes"]), c.patches)
    )


def _fits_codes(g: Mapping[str, np.ndarray], c: ModelConfig, *names: str) -> None:
  for name in names:
    if name in g:
      golden.check_shape(name, g[name].shape[-1:], (c.patches,))
      golden.check_ids(name, g[name], c.autoencoder.codebook_size)


def _fits_generation(g: Mapping[str, np.ndarray], c: ModelConfig) -> None:
  for name in ("paint/prompt_ids", *(f"{start}prompt_ids" for start in _GREEDY)):
    if name in g:
      golden.check_ids(name, g[name], c.language_model.vocab_size)
      if g[name].size < 2:
        raise UserError(f"{name} must hold BOS and BOI at least, got {g[name].size} ids")
  _fits_codes(g, c, "paint/codes", *(f"{start}codes" for start in _GREEDY))
  for start in _GREEDY:
    if f"{start}margin" in g:
      golden.check_margin(f"{start}margin", g[f"{start}margin"], (c.patches,))


_GENERATION = {
  "paint/prompt_ids": (IDS, ("S",)),
  "paint/codes": (IDS, ("B", "N")),
  "paint/cfg_weight": (REAL, None),
  **{
    f"{start}{name}": (kinds, (axis,))
    for start in _GREEDY
    for name, kinds, axis in (("prompt_ids", IDS, "S"), ("codes", IDS, "N"), ("margin", REAL, "N"))
  },
}
_CODES = ("paint/codes",)
_FORCED = ("paint/prompt_ids", "paint/codes")
_HEADS = {
  "gen_embed": "generation_embed",
  "gen_aligner": "generation_projector",
  "gen_head": "generation_head",
  "language_model": "language_model",
}
_READING = {
  "vision_model": "understanding_encoder",
  "aligner": "understanding_projector",
  "language_model": "language_model",
}
_SHOWN = (("paint/greedy_codes", "paint/greedy_prompt_ids"),)
GROUPS = (
  Group(
    inputs={"vq/pixels": (REAL, ("B", "3", "H", "W")), "vq/codes": (IDS, ("B", "N")), "vq/margin": (REAL, ("B", "N"))},
    outputs={
      "vq/encoder_output": ("vq/encoder", ("vq/pixels",)),
      "vq/latents": ("vq/quant_conv", ("vq/pixels",)),
      "vq/codes": ("vq/codebook", ("vq/pixels",)),
      "vq/quantised": ("vq/codebook", (("vq/codes", "vq/pixels"),)),
      "vq/decoded": ("vq/post_quant_conv or vq/decoder", (("vq/codes", "vq/pixels"),)),
    },
    fits=_fits_vq,
    run=_vq,
  ),
  Group(
    inputs=_GENERATION,
    outputs={
      "paint/gen_embeds": ("generation_embed", _CODES),
      "paint/aligned": ("generation_projector", _CODES),
      "paint/hidden_cond": ("language_model", _FORCED),
      "paint/logits_cond": ("generation_head", _FORCED),
      "paint/logits_uncond": ("the dropped prompt", _FORCED),
      "paint/logits_guided": ("guidance", _FORCED),
      "paint/cross_entropy": ("the loss of codes", _FORCED),
      **{
        f"{start}{name}": (what, (f"{start}prompt_ids",))
        for start in _GREEDY
        for name, what in (("logits", "guidance or the dropped prompt"), ("codes", "the sampler"))
      },
      "paint/image": ("vq/post_quant_conv or vq/decoder", _SHOWN),
      "paint/image_uint8": ("the pixels", _SHOWN),
    },
    fits=_fits_generation,
    run=_generate,
  ),
  parity_training.group("image", _HEADS, _loss, _GENERATION, _FORCED, _fits_generation),
  parity_training.text(_READING),
)
