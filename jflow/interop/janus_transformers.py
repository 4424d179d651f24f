"""transformers' layout of Janus (`model_type: janus`): config.json and names of tensors, both ways.

Its tensors are those of the official layout under other names: q, k and v of SigLIP apart, no pooling head, no usage
statistic of the codebook. The middle width of gen_head is the LLM's width there.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from jflow.errors import UserError
from jflow.generation.codes import weights
from jflow.generation.codes.config import CodesConfig
from jflow.interop import janus, processor_config, release, sizes
from jflow.interop.fields import Fields
from jflow.interop.layouts import Layout
from jflow.interop.safetensors_io import Tensor
from jflow.interop.transformers_config import language_model_config, language_model_to_transformers
from jflow.models.config import ModelConfig, ReaderConfig, SiglipConfig
from jflow.models.weights import SAME, TABLE, Entry, jflow_shape

_POOL = "vision_model.vision_tower.attn_pool."  # SigLIP's pooling head, which the release never uses
_QKV = ".attn.qkv."
_TOWER = "model.vision_model"
# Beginnings of official names and transformers' for them, the first that fits; then the same for what follows.
_PARTS = (
  (r"vision_model\.vision_tower\.pos_embed$", f"{_TOWER}.embeddings.position_embedding.weight"),
  (r"vision_model\.vision_tower\.patch_embed\.proj", f"{_TOWER}.embeddings.patch_embedding"),
  (r"vision_model\.vision_tower\.blocks\.(\d+)\.norm(\d)", rf"{_TOWER}.encoder.layers.\1.layer_norm\2"),
  (r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.proj", rf"{_TOWER}.encoder.layers.\1.self_attn.projection_layer"),
  (r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.", rf"{_TOWER}.encoder.layers.\1.self_attn."),
  (r"vision_model\.vision_tower\.blocks\.", f"{_TOWER}.encoder.layers."),
  (r"vision_model\.vision_tower\.norm\.", f"{_TOWER}.post_layernorm."),
  (r"gen_embed\.", "model.generation_embeddings."),
  (r"gen_head\.output_mlp_projector\.", "model.generation_head.proj_out."),
  (r"gen_head\.", "model.generation_head."),
  (r"gen_vision_model\.encoder\.conv_blocks\.(\d+)\.(?:res|(attn))\.(\d+)", r"model.vqmodel.encoder.down.\1.\2.\3"),
  (r"gen_vision_model\.decoder\.conv_blocks\.(\d+)\.(?:res|(attn))\.(\d+)", r"model.vqmodel.decoder.up.\1.\2.\3"),
  (r"gen_vision_model\.encoder\.conv_blocks\.", "model.vqmodel.encoder.down."),
  (r"gen_vision_model\.decoder\.conv_blocks\.", "model.vqmodel.decoder.up."),
  (r"gen_vision_model\.(encoder|decoder)\.mid\.0\.", r"model.vqmodel.\1.mid.block_1."),
  (r"gen_vision_model\.(encoder|decoder)\.mid\.1\.", r"model.vqmodel.\1.mid.attn_1."),
  (r"gen_vision_model\.(encoder|decoder)\.mid\.2\.", r"model.vqmodel.\1.mid.block_2."),
  (r"gen_vision_model\.", "model.vqmodel."),
  (r"language_model\.model\.", "model.language_model."),
  (r"language_model\.lm_head\.", "lm_head."),
)


def _name(official: str) -> str:
  """transformers' name of an official tensor."""
  if found := re.match(r"(gen_)?aligner\.layers\.(\d+)\.(.*)", official):
    part, layer = "model.generation_aligner" if found[1] else "model.aligner", int(found[2]) // 2
    return f"{part}.fc1.{found[3]}" if layer == 0 else f"{part}.hidden_layers.{layer - 1}.{found[3]}"
  for pattern, ours in _PARTS:
    if found := re.match(pattern, official):
      made = found.expand(ours).replace("..", ".block.")  # a resblock
      return made + official[found.end() :]
  raise ValueError(f"{official} has no name in transformers' layout")


def entries(c: ModelConfig, tied: bool = False) -> list[Entry]:
  """Every tensor of transformers' JanusForConditionalGeneration; `tied`: the head is the embedding."""
  return [*_renamed(weights.official(c, tied))]


def _renamed(official: list[Entry]) -> Iterator[Entry]:
  for entry in official:
    if entry.name.startswith(_POOL):
      continue
    name, shape, kind = _name(entry.name), entry.shape, entry.kind
    if _QKV in entry.name:  # one tensor becomes three
      name, shape = name.replace(".qkv.", f".{'qkv'[entry.part[0]]}_proj."), entry.part_shape
    if kind == TABLE:
      shape, kind = shape[-2:], SAME
    yield entry._replace(name=name, shape=shape, kind=kind, part=(0, 1))


def _pool_head(c: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The parameters of SigLIP's pooling head, and their shapes."""
  pool = [entry for entry in weights.official(c) if entry.name.startswith(_POOL)]
  return {entry.path: jflow_shape(entry.kind, entry.part_shape) for entry in pool}


def _vision_config(f: Fields) -> SiglipConfig:
  """Reads a JanusVisionConfig, but for its projector."""
  f.only("model_type", "janus_vision_model")
  f.only("hidden_act", "gelu")  # the projector's too
  f.only("num_channels", 3)
  f.only("attention_bias", True)
  f.only("use_qk_norm", False)
  for name in ("attention_dropout", "hidden_dropout_rate", "projection_dropout"):
    f.only(name, 0)
  width = f.get("hidden_size", int, 1024)
  config = SiglipConfig(
    image_size=f.get("image_size", int, 384, "image_size"),
    patch_size=f.get("patch_size", int, 16, "patch_size"),
    embed_dim=width,
    mlp_dim=release.mlp_dim(f, width, 4.0),
    num_layers=f.get("num_hidden_layers", int, 24, "num_layers"),
    num_heads=f.get("num_attention_heads", int, 16, "num_heads"),
    layer_norm_epsilon=f.get("layer_norm_eps", float, 1e-6),
    gelu="erf",
  )
  f.only("num_image_tokens", config.patches)
  return config


# The fields of tokenizer_config.json by which JanusProcessor finds the tokens around an image, and pads.
_TOKENS = {
  "pad_token": SPECIAL_TOKENS["pad"],
  "boi_token": SPECIAL_TOKENS["image_start"],
  "eoi_token": SPECIAL_TOKENS["image_end"],
  "image_token": SPECIAL_TOKENS["image"],
}
_VQ = dict(
  num_embeddings=16_384,
  embed_dim=8,
  base_channels=128,
  channel_multiplier=[1, 1, 2, 2, 4],
  num_res_blocks=2,
  latent_channels=256,
)


def read_config(values: Mapping[str, Any], where: str, autoencoder: None = None) -> ModelConfig:
  """Reads a JanusConfig of transformers; absent fields have the library's defaults.

  Args:
    values: the contents of config.json.
    where: its name, for messages.
    autoencoder: not used; the VQ is inside.

  Raises:
    UserError: a field is mistyped, or asks for something that jflow does not compute.
  """
  root = Fields(values, where)
  root.only("model_type", "janus")
  root.only("architectures", ["JanusForConditionalGeneration"], ["JanusModel"])
  root.ignore(("image_token_id", "image_token_index"))  # by name from the tokenizer
  is_tied(root)
  text, vision, vq = root.sub("text_config"), root.sub("vision_config"), root.sub("vq_config")
  root.close()
  lm = language_model_config(text)
  siglip = _vision_config(vision)
  janus.need_width(text, vision, "projection_dim", lm.embed_dim)
  reading = vision.get("depth", int, 2, "layers")
  vision.close()
  codec = janus.vq_config(vq, tuple(_VQ), _VQ.get, siglip)
  vq.only("model_type", "janus_vqgan")
  vq.only("hidden_act", "gelu")
  vq.only("double_latent", False)
  vq.only("dropout", 0)
  for name in ("in_channels", "out_channels"):
    vq.only(name, 3)
  vq.ignore(("num_patches",))  # which transformers computes from SigLIP's
  vq.ignore(("depth",))  # written by transformers' conversion, read by nothing: num_hidden_layers counts
  for name in ("projection_dim", "image_token_embed_dim"):
    janus.need_width(text, vq, name, lm.embed_dim)
  writing = vq.get("num_hidden_layers", int, 2, "projector_layers")
  vq.close()
  return ModelConfig(
    language_model=lm,
    understanding_encoder=siglip,
    generation=CodesConfig(kind="codes", hidden_dim=lm.embed_dim, projector_layers=writing),
    autoencoder=codec,
    objectives=(),
    reader=ReaderConfig(kind="siglip", start="token", layers=reading),
  )


def write_config(c: ModelConfig, dtype: str, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
  """The config.json of a model.

  Args:
    c: of the model.
    dtype: name of the weights' type.
    tokenizer: says the ids of tokens; None: the result has the library's defaults, which are those of Janus-Pro-1B.

  Raises:
    UserError: the layout cannot hold it.
  """
  janus.check_parts(c, "transformers")
  lm, vision, codec = c.language_model, c.understanding_encoder, c.autoencoder
  d = lm.embed_dim
  if c.generation.hidden_dim != d:
    raise UserError(
      f"model.generation.hidden_dim={c.generation.hidden_dim} must be the LLM's width {d}: transformers' layout has no "
      "other middle width of gen_head"
    )
  if vision.gelu != "erf":
    raise UserError(
      f"model.understanding_encoder.gelu={vision.gelu!r} must be 'erf': transformers' layout has one GELU for SigLIP "
      "and its projector"
    )
  return {
    "architectures": ["JanusForConditionalGeneration"],
    "model_type": "janus",
    "dtype": dtype,
    "tie_word_embeddings": False,
    **({} if tokenizer is None else {"image_token_id": tokenizer.image}),
    "text_config": language_model_to_transformers(lm) | _ids(tokenizer),
    "vision_config": {
      "model_type": "janus_vision_model",
      "hidden_size": vision.embed_dim,
      "num_hidden_layers": vision.num_layers,
      "num_attention_heads": vision.num_heads,
      "image_size": vision.image_size,
      "patch_size": vision.patch_size,
      "mlp_ratio": release.mlp_ratio(vision),
      "layer_norm_eps": vision.layer_norm_epsilon,
      "hidden_act": "gelu",
      "projection_dim": d,
      "depth": c.reader.layers,
      "num_image_tokens": vision.patches,
    },
    "vq_config": {
      "model_type": "janus_vqgan",
      "embed_dim": codec.code_dim,
      "num_embeddings": codec.codebook_size,
      "latent_channels": codec.latent_channels,
      "base_channels": codec.channels,
      "channel_multiplier": list(codec.multipliers),
      "num_res_blocks": codec.blocks_per_level,
      "num_patches": vision.image_size // vision.patch_size,
      "hidden_act": "gelu",
      "num_hidden_layers": c.generation.projector_layers,
      "projection_dim": d,
      "image_token_embed_dim": d,
    },
  }


def _ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
  if tokenizer is None:
    return {}
  return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}


def is_tied(root: Fields) -> bool | None:
  """False where config.json unties the head; else None, since the library's default is true and means nothing."""
  root.only("tie_word_embeddings", True, False)
  return False if root.values.get("tie_word_embeddings") is False else None


def _check_sizes(root: Fields, config: ModelConfig, tensors: Mapping[str, Tensor], where: Any) -> None:
  sizes.check_llama(root.sub("text_config"), config.language_model, tensors, "model.language_model.", where)
  vision, vq = root.sub("vision_config"), root.sub("vq_config")
  embeddings = f"{_TOWER}.embeddings"
  names = (
    f"{_TOWER}.encoder.layers.",
    f"{embeddings}.patch_embedding.weight",
    f"{embeddings}.position_embedding.weight",
  )
  fields = ("num_hidden_layers", "hidden_size")
  sizes.check_siglip(vision, config.understanding_encoder, tensors, fields, names, where)
  for f, field, part, layers in (
    (vision, "depth", "aligner", config.reader.layers),
    (vq, "num_hidden_layers", "generation_aligner", config.generation.projector_layers),
  ):
    more = sizes.count_of(tensors, f"model.{part}.hidden_layers.")
    sizes.check(f, {field: layers}, {field: more._replace(size=1 + more.size)}, where)
  janus.check_vq(
    vq,
    config.autoencoder,
    {"num_res_blocks": sizes.count_of(tensors, "model.vqmodel.encoder.down.0.block.")},
    ("num_embeddings", "embed_dim", "channel_multiplier"),
    ("model.vqmodel.quantize.embedding.weight", "model.vqmodel.encoder.down."),
    tensors,
    where,
  )


def _files(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """The processor's files and the settings of generation, by name."""
  generation: dict[str, Any] = {"guidance_scale": 5} | _ids(tokenizer)
  if tokenizer is not None:
    generation["generation_kwargs"] = {"boi_token_id": tokenizer.image_start}
  files = processor_config.transformers_files(config) | {"generation_config.json": generation}
  if tokenizer is None:
    return files
  settings = {name: value for name, value in tokenizer.settings().items() if value is not None}  # pad_token may be null
  return files | {"tokenizer_config.json": _TOKENS | settings}


LAYOUT = Layout(
  name="transformers",
  family="codes",
  title="Janus",
  recognises=lambda values: values.get("model_type") == "janus",
  read_config=read_config,
  write_config=write_config,
  entries=entries,
  check_sizes=_check_sizes,
  language="text_config",
  is_tied=is_tied,
  embedding="model.language_model.embed_tokens.weight",
  head="lm_head.weight",
  checks=processor_config.TRANSFORMERS_CHECKS,
  files=_files,
  unread=_pool_head,
  template=janus.template,
  instead=janus.INSTEAD,
)
