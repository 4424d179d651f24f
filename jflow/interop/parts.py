"""The starting point of stage 1: a pretrained LLM (Llama, Mistral, Qwen2 or Qwen3), SigLIP and VAE, with fresh parts
between them."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax.traverse_util import flatten_dict

from jflow import sharding
from jflow.data import tokenizer_file
from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer, build
from jflow.errors import UserError
from jflow.generation.flow.config import FlowConfig
from jflow.interop import budget, foreign_tokenizer, processor_config, sizes, tied, transfer
from jflow.interop import vae as diffusers_vae
from jflow.interop.fields import Fields
from jflow.interop.published import Loaded
from jflow.interop.safetensors_io import Checkpoint
from jflow.interop.transformers_config import LANGUAGE_MODELS, is_tied, language_model_config, siglip_config
from jflow.models import initial
from jflow.models import weights as names
from jflow.models.build import initial_params
from jflow.models.config import JANUSFLOW_READER, ModelConfig, SiglipConfig
from jflow.models.llm.config import LanguageModelConfig
from jflow.models.unified import UnifiedModel
from jflow.strict_json import read_object

# The fresh parts have the release's sizes (g_enc and g_dec; REPA reads block 6 of the LLM, paper section 4.1).
_GENERATION = FlowConfig(kind="flow", channels=768, encoder_blocks=2, decoder_blocks=2, patch_size=2, norm_epsilon=1e-6)
# Special tokens to add to an LLM's tokenizer, which must have EOS; BOS too where its files name none (Qwen).
_ADDED = ("pad", "image", "image_start", "image_end", "generation_start")
_ROWS = 64  # an extended vocabulary is rounded up to a multiple of this


def _config(path: pathlib.Path) -> Fields:
  return Fields(read_object(path), str(path))


def _tokenizer(directory: pathlib.Path) -> Tokenizer:
  """Reads a tokenizer and adds the special tokens that it lacks, with the next free ids.

  Raises:
    UserError: the tokenizer cannot be read, or lacks EOS, or a BOS that its files name.
  """
  files = foreign_tokenizer.read(directory)
  tokenizer_file.check(files["tokenizer.json"], str(directory))
  tokenizer = build(files["tokenizer.json"], str(directory))
  tokenizer.no_truncation()
  tokenizer.no_padding()
  present = tokenizer.get_vocab(with_added_tokens=True)
  told = [directory / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
  has_bos = any(read_object(path).get("bos_token") for path in told if path.exists())
  wanted = _ADDED if has_bos else (*_ADDED, "bos")
  missing = [SPECIAL_TOKENS[name] for name in wanted if SPECIAL_TOKENS[name] not in present]
  tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False, special=True) for t in missing])
  path = directory / "tokenizer_config.json"
  config = read_object(path) if path.exists() else {}
  return Tokenizer(
    files
    | {
      "tokenizer.json": tokenizer.to_str(pretty=True).encode("utf-8"),
      "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=1).encode("utf-8"),
    },
    str(directory),
  )


def describe_siglip(directory: pathlib.Path) -> tuple[SiglipConfig, transfer.Weights]:
  """Reads the configuration and the headers of a SiglipModel (its vision tower) or a SiglipVisionModel."""
  f = _config(directory / "config.json")
  config = siglip_config(f)
  f = f.sub("vision_config") if f.values.get("vision_config") is not None else f
  if (directory / "preprocessor_config.json").exists():
    processor_config.check_siglip(_config(directory / "preprocessor_config.json"), config.image_size)
  checkpoint = Checkpoint(directory, ("model",))
  prefix = "vision_model." if any(n.startswith("vision_model.") for n in checkpoint.tensors) else ""
  embeddings = f"{prefix}embeddings"
  found = (
    f"{prefix}encoder.layers.",
    f"{embeddings}.patch_embedding.weight",
    f"{embeddings}.position_embedding.weight",
  )
  sizes.check_siglip(f, config, checkpoint.tensors, ("num_hidden_layers", "hidden_size"), found, directory)
  head = f"{prefix}head.probe" in checkpoint.tensors
  if head and f.values.get("vision_use_head") is False:
    raise UserError(f"{f.where}: vision_use_head=False, and {directory} holds tensor {prefix}head.probe")
  ignored = lambda name: name.startswith(("text_model.", "logit_")) or name == f"{embeddings}.position_ids"
  entries = list(names.siglip_transformers(config, prefix, head))
  return config, transfer.Weights.describe(entries, checkpoint, "SigLIP", ignored)


def _describe_llm(directory: pathlib.Path) -> tuple[LanguageModelConfig, transfer.Weights]:
  """Reads the configuration and the headers of a causal model of transformers, see `LANGUAGE_MODELS`."""
  f = _config(directory / "config.json")
  config = language_model_config(f, LANGUAGE_MODELS)
  checkpoint = Checkpoint(directory, ("model",))
  sizes.check_llama(f, config, checkpoint.tensors, "model.", directory)
  from_embedding = tied.check(f, is_tied(f), checkpoint, "model.embed_tokens.weight", "lm_head.weight")
  entries = list(names.language_model(config, "", from_embedding))
  ignored = lambda name: name.endswith(".rotary_emb.inv_freq")
  return config, transfer.Weights.describe(entries, checkpoint, "LLM", ignored)


def _grow(params: dict[str, np.ndarray], rows: int) -> None:
  """Adds rows for new tokens, each the mean of the old ones, which gives plausible logits from the start."""
  table, head = params["language_model/embed"], params["language_model/head/kernel"]
  extra = rows - len(table)
  mean = table.astype(np.float32).mean(axis=0).astype(table.dtype)
  params["language_model/embed"] = np.concatenate([table, np.broadcast_to(mean, (extra, len(mean)))])
  mean = head.astype(np.float32).mean(axis=1).astype(head.dtype)
  params["language_model/head/kernel"] = np.concatenate(
    [head, np.broadcast_to(mean[:, None], (len(mean), extra))], axis=1
  )


def _fresh(config: ModelConfig, seed: int, there: Collection[str]) -> dict[str, np.ndarray]:
  """Fresh f32 parameters of the parts without a checkpoint, equal to those of a run that starts fresh."""
  model = UnifiedModel(config, jnp.dtype("float32"), "none", 1, "xla")

  def missing() -> dict[str, Any]:
    flat: dict[str, Any] = flatten_dict(initial_params(model, seed), sep="/")
    return {path: x for path, x in flat.items() if path not in there}

  mesh = sharding.make_mesh(1, 1, 1, jax.local_devices()[:1])
  return {path: np.asarray(x) for path, x in initial.create(missing, mesh).items()}


def load(
  llm: pathlib.Path,
  siglip: pathlib.Path,
  vae: pathlib.Path,
  tokenizer: pathlib.Path | None,
  dtype: np.dtype | None,
  seed: int,
) -> Loaded:
  """Builds a JanusFlow from a trained language model, vision tower and VAE, with the other parts fresh.

  Args:
    llm: directory of a causal model of transformers, see `LANGUAGE_MODELS`; a head that is tied to the embedding
      becomes a copy of it, which training moves apart.
    siglip: directory of a SiglipModel or SiglipVisionModel of transformers.
    vae: directory of an AutoencoderKL of diffusers.
    tokenizer: directory with tokenizer.json; None: that of the LLM. Missing special tokens are added.
    dtype: of the parameters that are read; None keeps each file's.
    seed: of the fresh parts.

  Raises:
    UserError: a part is missing, damaged, of another layout, or does not fit the others.
  """
  language, llm_weights = _describe_llm(llm)
  words = _tokenizer(tokenizer or llm)
  vision, siglip_weights = describe_siglip(siglip)
  autoencoder, vae_weights = diffusers_vae.describe(vae)
  rows = language.vocab_size
  if words.vocabulary_size > rows:
    rows = -(-words.vocabulary_size // _ROWS) * _ROWS
  config = ModelConfig(
    language_model=dataclasses.replace(language, vocab_size=rows),
    understanding_encoder=vision,
    generation=_GENERATION,
    autoencoder=autoencoder,
    objectives=(),
    reader=JANUSFLOW_READER,
  )
  weights = (siglip_weights, vae_weights, llm_weights)
  budget.check(sum(part.bytes(dtype) for part in weights), llm)
  params = {path: x for part in weights for path, x in part.read(dtype).items()}
  if rows > language.vocab_size:
    print(f"jflow: the vocabulary grows from {language.vocab_size} to {rows} rows", file=sys.stderr)
    _grow(params, rows)
  return Loaded(config, params | _fresh(config, seed, params), True, words, "plain")
