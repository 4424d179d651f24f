"""An adapter in PEFT's format: PEFT over transformers' Janus computes what jflow does with the adapter merged."""

import adapted
import janus_checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import pytest

REASON = "PEFT is not installed: JFLOW_PARITY=1 bash launch/test.sh installs it"
torch = pytest.importorskip("torch", reason=REASON)
transformers = pytest.importorskip("transformers", "4.52", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

import torch_models

from jflow.cli import convert
from jflow.data.tokenizer import Tokenizer
from jflow.interop import adapters, transfer
from jflow.interop.checkpoints import read_checkpoint
from jflow.interop.comparison import line
from jflow.models import lora
from jflow.models.unified import UnifiedModel

PATTERNS = (
  "language_model/layers",
  "language_model/head",
  "understanding_encoder/(layers|patch_embed)",
  "understanding_projector",
  "generation_(head|projector)",
)
BOI, IMAGE = 94, 95


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Holds `base`, which transformers wrote, and `peft`, the adapter of a run that started from it."""
  folder = tmp_path_factory.mktemp("peft")
  torch_models.janus(
    folder / "base",
    0,
    dict(num_key_value_heads=2, head_dim=16),
    dict(image_size=64, patch_size=16),
    dict(num_embeddings=64),
  )
  found = read_checkpoint(folder / "base")
  words = Tokenizer.load(str(janus_checkpoint.PROCESSOR))
  adapted.save_run(folder / "run", found.config, found.params, words, PATTERNS, template="pro")
  flags = ["--adapter", "--to=transformers", f"--input={folder / 'run'}", f"--output={folder / 'peft'}"]
  assert not convert.main(flags)
  return folder


def inputs(config):
  rng, p = np.random.default_rng(0), config.patches
  pixels = rng.uniform(-1, 1, (2, 3, config.image_size, config.image_size)).astype(np.float32)
  head = rng.integers(2, 90, (2, 4))
  tokens = np.concatenate([head, np.full((2, 1), BOI), np.full((2, p), IMAGE), rng.integers(2, 90, (2, 5))], axis=1)
  return pixels, tokens.astype(np.int32)


def ours(config, params, pixels, tokens):
  """Logits of text after a picture, and those of codes."""
  model = UnifiedModel(config, jnp.dtype("float32"), remat="none", unroll=1, attention="xla")

  def logits(m, pixels, tokens):
    index = np.full(tokens.shape, -1, np.int32)
    index[:, 4 : 5 + config.patches] = np.arange(1 + config.patches)
    x = m.assemble(tokens, m.read(pixels), index)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = m.backbone(x, positions, jnp.ones_like(positions)).hidden
    return m.logits(hidden), m.writer.logits(hidden)

  run = jax.jit(lambda p, *x: model.apply({"params": p}, *x, method=logits))
  return run(params, pixels.transpose(0, 2, 3, 1), tokens)


def theirs(model, pixels, tokens):
  with torch.no_grad():
    out = model(
      input_ids=torch.from_numpy(tokens.astype(np.int64)),
      pixel_values=torch.from_numpy(pixels),
      output_hidden_states=True,
    )
    return out.logits, model.model.generation_head(out.hidden_states[-1])


def test_peft_computes_the_same(folder):
  found = read_checkpoint(folder / "base")
  pixels, tokens = inputs(found.config)
  adapter = adapters.describe(folder / "peft", found.config)
  merged = transfer.nest(transfer.flatten(found.params) | adapters.changed(found.params, found.config, adapter))
  flat = {path: np.asarray(x) for path, x in transfer.flatten(found.params).items()}
  beside = transfer.nest(flat | adapted.leaves(flat, PATTERNS, 0))
  base = transformers.JanusForConditionalGeneration.from_pretrained(folder / "base", attn_implementation="eager").eval()
  before = theirs(base, pixels, tokens)
  model = peft.PeftModel.from_pretrained(base, folder / "peft").eval()
  want = theirs(model.base_model.model, pixels, tokens)
  for params in (merged, beside, lora.merged(beside)):
    for name, got, x in zip(("text", "codes"), ours(found.config, params, pixels, tokens), want, strict=True):
      compared = line(name, "", np.asarray(got), x.numpy(), 1e-5)
      assert compared.passed, compared
  for x, y in zip(want, before, strict=True):
    assert (x - y).norm() > 1e-2 * y.norm()  # the adapter does something


def test_what_peft_writes_is_read(folder, tmp_path):
  """An adapter that PEFT made and saved, loaded beside the base."""
  base = transformers.JanusForConditionalGeneration.from_pretrained(folder / "base", attn_implementation="eager").eval()
  wanted = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
  model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, target_modules=wanted, use_rslora=True)).eval()
  generator = torch.Generator().manual_seed(0)
  for name, x in model.named_parameters():
    if "lora_B" in name:
      x.data.copy_(0.1 * torch.randn(x.shape, generator=generator))
  model.save_pretrained(tmp_path / "made")
  found = read_checkpoint(folder / "base")
  pixels, tokens = inputs(found.config)
  adapter = adapters.describe(tmp_path / "made", found.config)
  merged = transfer.nest(transfer.flatten(found.params) | adapters.changed(found.params, found.config, adapter))
  want = theirs(model.base_model.model, pixels, tokens)
  for name, got, x in zip(("text", "codes"), ours(found.config, merged, pixels, tokens), want, strict=True):
    compared = line(name, "", np.asarray(got), x.numpy(), 1e-5)
    assert compared.passed, compared
