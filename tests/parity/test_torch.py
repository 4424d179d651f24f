"""Live comparison with PyTorch on small random models: Llama and SigLIP of transformers, VAE of diffusers.

Both sides get the same files, written by the other library, so the conversion is compared too.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "PyTorch is not installed: JFLOW_PARITY=1 bash launch/test.sh installs it"
torch = pytest.importorskip("torch", reason=REASON)
pytest.importorskip("diffusers", reason=REASON)

from torch_models import llama, siglip, vae

from jflow.interop import parts, transfer
from jflow.interop import vae as diffusers_vae
from jflow.interop.fields import Fields
from jflow.interop.safetensors_io import Checkpoint, read_json
from jflow.interop.transformers_config import LANGUAGE_MODELS, language_model_config
from jflow.models import weights as names
from jflow.models.llm.llama import LanguageModel
from jflow.models.siglip import Siglip

SEEDS = (0, 1, 2)
torch.set_num_threads(1)


def relative(ours, theirs) -> float:
  a, b = np.asarray(ours, np.float64), theirs.detach().double().numpy()
  assert a.shape == b.shape
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- LLM -------------------------------------------------------------------------------------------------

_ROTATION = dict(
  rope_type="llama3",
  rope_theta=1e4,
  factor=8.0,
  low_freq_factor=0.3,
  high_freq_factor=2.0,
  original_max_position_embeddings=16,
)
LLAMAS = (  # multi-head, grouped queries with another rotation and norm, tied head; others
  dict(),
  dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
  dict(num_key_value_heads=1, tie_word_embeddings=True, num_hidden_layers=4),
  dict(kind="Qwen2", num_key_value_heads=2, tie_word_embeddings=True),
  dict(kind="Qwen3", num_key_value_heads=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
  dict(kind="Mistral", num_key_value_heads=2, sliding_window=40),
  dict(num_key_value_heads=2, rope_parameters=_ROTATION),
)
ALL = range(len(LLAMAS))


def read_llama(directory: pathlib.Path):
  values = read_json(directory / "config.json")
  config = language_model_config(Fields(values, "config.json"), LANGUAGE_MODELS)
  entries = list(names.language_model(config, "", bool(values.get("tie_word_embeddings"))))
  params = transfer.load(entries, Checkpoint(directory, ("model",)), "LLM")
  nested = transfer.nest(params)["language_model"]
  return LanguageModel(config, 0, jnp.float32, "none", 1, "xla"), {"params": nested}, entries


def llama_logits(model, params, tokens, positions, segments):
  x = model.apply(params, tokens, method="embed")
  hidden = model.apply(params, x, positions, segments).hidden
  return model.apply(params, hidden, method="logits")


@pytest.mark.parametrize("seed", SEEDS)
def test_llama_logits(tmp_path, seed):
  theirs = llama(tmp_path, seed, **LLAMAS[seed])
  model, params, _ = read_llama(tmp_path)
  tokens = np.random.default_rng(seed).integers(0, 97, (2, 20))
  positions = np.broadcast_to(np.arange(20), tokens.shape)
  ours = jax.jit(lambda p: llama_logits(model, p, tokens, positions, np.ones_like(tokens)))(params)
  assert relative(ours, theirs(torch.from_numpy(tokens)).logits) < 1e-5


@pytest.mark.parametrize("seed", ALL)
def test_llama_gradients_of_every_parameter(tmp_path, seed):
  theirs = llama(tmp_path, seed, **LLAMAS[seed])
  model, params, entries = read_llama(tmp_path)
  tokens = np.random.default_rng(seed).integers(2, 97, (2, 16))  # id 1 is padding: no gradient there
  positions = np.broadcast_to(np.arange(16), tokens.shape)

  def loss(p):
    logits = llama_logits(model, p, tokens, positions, np.ones_like(tokens))
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1))

  value, gradients = jax.jit(jax.value_and_grad(loss))(params)
  expected = theirs(torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss
  expected.backward()
  assert float(value) == pytest.approx(expected.item(), rel=1e-5)
  flat = transfer.flatten({"language_model": jax.tree.map(np.asarray, gradients["params"])})
  wanted = {name: x.grad for name, x in theirs.named_parameters()}
  by_name: dict[str, list[names.Entry]] = {}
  for entry in entries:
    by_name.setdefault(entry.name, []).append(entry)
  assert by_name.keys() == wanted.keys()
  for name, group in by_name.items():
    # A tied table has one gradient there and two here: of the embedding and of the head.
    uses = [group] if len({entry.path for entry in group}) == 1 else [[entry] for entry in group]
    ours = sum(transfer.tensor(use, flat, np.dtype(np.float32)) for use in uses)
    assert relative(ours, wanted[name]) < 1e-4, name


@pytest.mark.parametrize("seed", ALL)
def test_llama_greedy_decoding_with_left_padding(tmp_path, seed):
  from jflow.models.cache import Cache
  from jflow.models.unified import separate_layers

  theirs = llama(tmp_path, seed, **LLAMAS[seed])
  model, params, _ = read_llama(tmp_path)
  tokens = np.random.default_rng(seed).integers(2, 97, (2, 9))
  mask = np.ones_like(tokens)
  mask[0, :4] = 0
  expected = theirs.generate(
    torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask), max_new_tokens=10, do_sample=False
  )[:, 9:]
  model, params = model.clone(unroll=0), {"params": separate_layers(params["params"], model.config.num_layers)}
  step = jax.jit(lambda p, x, at, segments, cache: model.apply(p, x, at, segments, cache))
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  cache, block, segments = Cache.empty(model.config, 2, 19, jnp.float32), tokens, mask
  answer = []
  for _ in range(10):
    out = step(params, model.apply(params, block, method="embed"), positions, segments, cache)
    token = np.argmax(model.apply(params, out.hidden[:, -1], method="logits"), axis=-1)
    answer.append(token)
    cache, block, segments = out.cache, token[:, None], np.ones((2, 1), int)
    positions = positions[:, -1:] + 1
  np.testing.assert_array_equal(np.stack(answer, axis=1), expected.numpy())


def _read(described):
  """(config, parameters) of what was described."""
  config, weights = described
  return config, weights.read(None)


# --- SigLIP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_siglip_features_and_pooling(tmp_path, seed):
  change = ({}, {"hidden_act": "gelu", "image_size": 50}, {"layer_norm_eps": 1e-5, "patch_size": 8})[seed]
  theirs = siglip(tmp_path, seed, whole=seed == 2, **change)
  config, params = _read(parts.describe_siglip(tmp_path))
  model = Siglip(config, jnp.float32, remat=False)
  nested = {"params": transfer.nest(params)["understanding_encoder"]}
  size = config.image_size
  pixels = np.random.default_rng(seed).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
  features = jax.jit(model.apply)(nested, pixels)
  pooled = model.apply(nested, features, method="pool")
  with torch.no_grad():
    out = theirs(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
  assert relative(features, out.last_hidden_state) < 1e-5
  assert relative(pooled, out.pooler_output) < 1e-5


# --- VAE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_autoencoder_moments_and_decoding(tmp_path, seed):
  channels, layers = (((8, 16), 1), ((8, 8, 16), 2), ((16, 8), 1))[seed]
  theirs = vae(tmp_path, seed, channels, layers)
  config, params = _read(diffusers_vae.describe(tmp_path))
  model, nested = config.make(jnp.float32), {"params": transfer.nest(params)["vae"]}
  pixels = np.random.default_rng(seed).uniform(-1, 1, (2, 24, 24, 3)).astype(np.float32)
  mean, log_variance = jax.jit(lambda p, x: model.apply(p, x, method="encode"))(nested, pixels)
  with torch.no_grad():
    posterior = theirs.encode(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())).latent_dist
    decoded = theirs.decode(posterior.mean).sample
  channels_first = lambda x: np.asarray(x).transpose(0, 3, 1, 2)
  assert relative(channels_first(mean), posterior.mean) < 1e-5
  assert relative(channels_first(log_variance), posterior.logvar) < 1e-5
  latents = posterior.mean.numpy().transpose(0, 2, 3, 1)
  ours = jax.jit(lambda p, x: model.apply(p, x, method="decode"))(nested, latents)
  assert relative(channels_first(ours), decoded) < 1e-5
