"""Janus against transformers' JanusForConditionalGeneration, on small random models that transformers wrote.

Its encoder of codes is left out: it compares with the codebook without dividing by the lengths, unlike the release.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "PyTorch is not installed: JFLOW_PARITY=1 bash launch/test.sh installs it"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", "4.52", reason=REASON)

import torch_models

from jflow.__main__ import main
from jflow.generation.codes.sampler import CodesSampler, guide
from jflow.generation.codes.settings import Settings
from jflow.interop.checkpoints import read_checkpoint
from jflow.interop.comparison import line
from jflow.models.unified import UnifiedModel, for_inference

BOS, BOI, IMAGE, PAD = 0, 94, 95, 96
MODELS = (
  (dict(), dict(image_size=64, patch_size=16), dict(num_embeddings=128)),
  (  # grouped queries, heads of another width, projectors of other depths, two levels
    dict(num_key_value_heads=2, head_dim=16, rope_theta=5e5),
    dict(image_size=16, patch_size=4, depth=3, mlp_ratio=2.5),
    dict(num_embeddings=64, embed_dim=4, channel_multiplier=[1, 2, 1], num_res_blocks=1, num_hidden_layers=1),
  ),
  (
    dict(hidden_size=64, num_key_value_heads=1, num_hidden_layers=3, rms_norm_eps=1e-5),
    dict(image_size=24, patch_size=8, depth=1, num_hidden_layers=3),
    dict(num_embeddings=50, embed_dim=6, channel_multiplier=[2, 1, 1, 2], num_res_blocks=3, num_hidden_layers=3),
  ),
)


@pytest.fixture(scope="module", params=range(len(MODELS)))
def pair(request, tmp_path_factory):
  """transformers' model, its directory, and jflow's model with the parameters read from there."""
  directory = tmp_path_factory.mktemp("janus") / str(request.param)
  theirs = torch_models.janus(directory, request.param, *MODELS[request.param])
  found = read_checkpoint(directory)
  model = UnifiedModel(found.config, jnp.dtype("float32"), remat="none", unroll=1, attention="xla")
  return theirs, directory, *for_inference(model, found.params)


def _close(name: str, ours, theirs, tolerance: float = 1e-5) -> None:
  found = line(name, "", np.asarray(ours), theirs.detach().numpy(), tolerance)
  assert found.passed, found


def _prompt(length: int, seed: int) -> np.ndarray:
  return np.concatenate([[BOS], np.random.default_rng(seed).integers(1, 90, length), [BOI]]).astype(np.int32)


def _apply(model, params, method, *args):
  return jax.jit(lambda p, *x: model.apply({"params": p}, *x, method=method))(params, *args)


def test_features_and_text_logits(pair):
  theirs, _, model, params = pair
  c, rng = model.config, np.random.default_rng(0)
  size, p = c.image_size, c.patches
  pixels = rng.uniform(-1, 1, (2, 3, size, size)).astype(np.float32)
  tokens = np.stack([np.concatenate([_prompt(4, s), [IMAGE] * p, rng.integers(1, 90, 5)]) for s in (1, 2)]).astype(
    np.int32
  )
  ids = torch.from_numpy(tokens.astype(np.int64))
  seen = theirs.model.get_image_features(torch.from_numpy(pixels), return_dict=True)
  features = _apply(model, params, "features", pixels.transpose(0, 2, 3, 1))
  _close("features", features, seen.last_hidden_state)

  def logits(m, pixels, tokens):
    index = np.full(tokens.shape, -1, np.int32)
    index[:, 5 : 6 + p] = np.arange(1 + p)  # the first slot, that of BOI, keeps its embedding
    x = m.assemble(tokens, m.read(pixels), index)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return m.logits(m.backbone(x, positions, jnp.ones_like(positions)).hidden)

  ours = _apply(model, params, logits, pixels.transpose(0, 2, 3, 1), tokens)
  _close("logits", ours, theirs(input_ids=ids, pixel_values=torch.from_numpy(pixels)).logits)


def test_guided_logits_of_codes(pair):
  theirs, _, model, params = pair
  c, prompt = model.config, _prompt(6, 3)
  codes = np.random.default_rng(4).integers(0, c.autoencoder.codebook_size, (1, c.patches))

  def logits(m, prompt, codes):
    x = jnp.concatenate([m.embed(prompt)[None], m.writer.slots(codes[:, :-1])], axis=1)
    positions = jnp.arange(x.shape[1])[None]
    return m.writer.logits(m.backbone(x, positions, jnp.ones_like(positions)).hidden[:, len(prompt) - 1 :])

  def published(prompt):
    x = theirs.get_input_embeddings()(torch.from_numpy(prompt.astype(np.int64)))[None]
    x = torch.cat([x, theirs.prepare_embeddings_for_image_generation(torch.from_numpy(codes[:, :-1]))], dim=1)
    return theirs.model.generation_head(
      theirs.model.language_model(inputs_embeds=x).last_hidden_state[:, len(prompt) - 1 :]
    )

  twin = np.concatenate([prompt[:1], np.full(len(prompt) - 2, PAD, np.int32), prompt[-1:]])
  ours = [_apply(model, params, logits, ids, codes) for ids in (prompt, twin)]
  conditional, without = published(prompt), published(twin)
  _close("conditional", ours[0], conditional)
  _close("guided", guide(*ours, 5.0), without + 5 * (conditional - without))


def test_greedy_codes_and_their_pixels(pair):
  """Two prompts of different lengths in one batch against transformers' own loop on each."""
  theirs, _, model, params = pair
  prompts, c = [_prompt(3, 5), _prompt(9, 6)], model.config
  settings = theirs.generation_config
  settings.bos_token_id, settings.pad_token_id, settings.max_length = BOS, PAD, 200
  settings.guidance_scale, settings.generation_kwargs = 5, {"boi_token_id": BOI}
  alone = []
  for prompt in prompts:
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    mask = torch.ones_like(ids)
    made = theirs.generate(ids, attention_mask=mask, generation_config=settings, generation_mode="image")
    alone.append(made)
  tokens = np.full((2, 10), 7, np.int32)
  for row, prompt in zip(tokens, prompts):
    row[: len(prompt) - 1] = prompt[:-1]  # the sampler reads the begin-of-image token itself
  sampler = CodesSampler(model, params, types.SimpleNamespace(image_start=BOI, pad=PAD))
  lengths = np.array([len(prompt) - 1 for prompt in prompts], np.int32)
  greedy = Settings(temperature=0.0, guidance=5.0)
  codes = torch.cat(alone)
  np.testing.assert_array_equal(sampler.write(tokens, lengths, np.zeros(2, np.uint32), greedy), codes.numpy())
  assert len(np.unique(codes.numpy())) > 3  # a picture of one code would show nothing
  pixels = sampler.sample(tokens, lengths, np.zeros(2, np.uint32), greedy)
  assert pixels.shape == (2, c.image_size, c.image_size, 3)
  _close("pixels", pixels, theirs.decode_image_tokens(codes), 2e-5)


def test_what_jflow_writes_is_loaded_as_the_same_model(pair, tmp_path):
  """By way of the official layout, whose pooling head and usage statistic transformers does not have."""
  theirs, directory, *_ = pair
  for source, to in ((directory, "official"), (tmp_path / "official", "transformers")):
    assert main(["convert", f"--input={source}", f"--to={to}", f"--output={tmp_path / to}"]) == 0
  loaded, info = transformers.JanusForConditionalGeneration.from_pretrained(
    tmp_path / "transformers", output_loading_info=True, attn_implementation="eager"
  )
  assert not info["missing_keys"] and not info["unexpected_keys"]
  ours, state = loaded.state_dict(), theirs.state_dict()
  assert ours.keys() == state.keys() and all(torch.equal(ours[name], x) for name, x in state.items())
  for section in ("text_config", "vision_config", "vq_config"):
    made, wanted = (getattr(m.config, section).to_dict() for m in (loaded, theirs))
    same = {name for name in wanted if "token" not in name and "dtype" not in name and name != "_attn_implementation"}
    assert {name: made[name] for name in same} == {name: wanted[name] for name in same}
