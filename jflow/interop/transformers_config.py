"""config.json of a Llama and of a SigLIP as transformers writes them.

Each is read with a closed list of fields; a Llama's is written too. Absent fields have the library's defaults.
"""

from typing import Any

from jflow.errors import UserError
from jflow.interop.fields import Fields
from jflow.models.config import SiglipConfig
from jflow.models.llm.config import LanguageModelConfig
from jflow.strict_json import shown


def language_model_config(f: Fields) -> LanguageModelConfig:
  """Reads a LlamaConfig of transformers.

  Raises:
    UserError: a field is mistyped, contradicts another, or asks for something that jflow does not compute.
  """
  f.only("model_type", "llama")
  f.only("architectures", ["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["LlamaModel"])
  f.only("hidden_act", "silu")
  _no_dropout(f)
  f.only("pretraining_tp", 1)
  for name in (
    "attention_bias",
    "mlp_bias",
    "rope_interleaved",
    "use_sliding_window",
    "qk_norm",
    "use_qk_norm",
  ):
    f.only(name, False)
  for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
    f.only(name, 1)
  if f.values.get("use_sliding_window") is False:
    f.ignore(("sliding_window", "max_window_layers"))
  width, heads = f.get("hidden_size", int, 4096), f.get("num_attention_heads", int, 32, "num_heads")
  if f.values.get("head_dim") is None and width % heads:
    raise UserError(
      f"{f.where}: hidden_size={width} must be a multiple of num_attention_heads={heads}, or head_dim given"
    )
  layers, context = f.get("num_hidden_layers", int, 32, "num_layers"), f.get("max_position_embeddings", int, 2048)
  kinds = f.get("layer_types", list, [])
  if kinds and (len(kinds) != layers or any(kind != "full_attention" for kind in kinds)):
    raise UserError(f"{f.where}: layer_types={shown(kinds)} is not supported, only {layers} x 'full_attention'")
  f.only("max_sequence_length", context)
  is_tied(f)
  config = LanguageModelConfig(
    kind="llama",
    vocab_size=f.get("vocab_size", int, 32_000),
    embed_dim=width,
    mlp_dim=f.get("intermediate_size", int, 11_008),
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=f.get("num_key_value_heads", int, heads, "num_kv_heads"),
    head_dim=f.get("head_dim", int, width // heads),
    rms_norm_epsilon=f.get("rms_norm_eps", float, 1e-6),
    rope_theta=_theta(f),
    max_length=context,
  )
  f.close()
  return config


def _no_dropout(f: Fields) -> None:
  """Refuses dropout, which jflow does not use in training."""
  for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout"):
    f.only(name, 0)


def is_tied(f: Fields) -> bool:
  """Whether the configuration ties the head to the embedding."""
  return f.get("tie_word_embeddings", bool, False)


def _theta(f: Fields) -> float:
  """The base of the rotary frequencies, from rope_theta or the rotation's own object, which must agree."""
  f.only("partial_rotary_factor", 1)
  said = {f"{f.where}: rope_theta": f.get("rope_theta", float)} if f.values.get("rope_theta") is not None else {}
  f.ignore(("rope_theta", "rope_scaling", "rope_parameters"))
  for name in ("rope_parameters", "rope_scaling"):
    if f.values.get(name) in (None, {}):
      continue
    rope = f.sub(name)
    for key in ("rope_type", "type"):
      rope.only(key, "default")
    if rope.values.get("rope_type") is None and rope.values.get("type") is None and set(rope.values) - {"rope_theta"}:
      raise UserError(f"{rope.where}={shown(rope.values)} has no rope_type: only 'default' is supported")
    rope.only("partial_rotary_factor", 1)
    rope.only("factor", 1)
    if rope.values.get("rope_theta") is not None:
      said[f"{rope.where}: rope_theta"] = rope.get("rope_theta", float)
    rope.close()
  if len(set(said.values())) > 1:
    raise UserError(" and ".join(f"{field}={value:g}" for field, value in said.items()) + " contradict each other")
  return next(iter(said.values()), 10_000.0)


def language_model_to_transformers(c: LanguageModelConfig) -> dict[str, Any]:
  """The LlamaConfig of a language model."""
  return {
    "model_type": "llama",
    "hidden_size": c.embed_dim,
    "intermediate_size": c.mlp_dim,
    "num_hidden_layers": c.num_layers,
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": c.num_kv_heads,
    "head_dim": c.head_dim,
    "vocab_size": c.vocab_size,
    "max_position_embeddings": c.max_length,
    "rms_norm_eps": c.rms_norm_epsilon,
    "rope_theta": c.rope_theta,
    "tie_word_embeddings": False,
  }


def siglip_config(f: Fields) -> SiglipConfig:
  """Reads the config.json of a SiglipModel (its vision tower) or a SiglipVisionModel of transformers.

  Raises:
    UserError: a field is mistyped or asks for something that jflow does not compute.
  """
  f.only("model_type", "siglip", "siglip_vision_model")
  if f.values.get("vision_config") is not None:
    f.only("architectures", ["SiglipModel"])
    f.ignore(("text_config", "tie_word_embeddings"))  # the text tower is not read
    outer, f = f, f.sub("vision_config")
    outer.close()
    f.only("model_type", "siglip_vision_model")
  f.only("architectures", ["SiglipVisionModel"])
  f.only("hidden_act", "gelu_pytorch_tanh", "gelu")
  f.only("num_channels", 3)
  _no_dropout(f)
  f.get("vision_use_head", bool, True)  # the pooling head, which jflow keeps and does not compute
  f.ignore(("tie_word_embeddings",))  # there are none
  config = SiglipConfig(
    image_size=f.get("image_size", int, 224, "image_size"),
    patch_size=f.get("patch_size", int, 16, "patch_size"),
    embed_dim=f.get("hidden_size", int, 768),
    mlp_dim=f.get("intermediate_size", int, 3072),
    num_layers=f.get("num_hidden_layers", int, 12, "num_layers"),
    num_heads=f.get("num_attention_heads", int, 12, "num_heads"),
    layer_norm_epsilon=f.get("layer_norm_eps", float, 1e-6),
    gelu="erf" if f.values.get("hidden_act") == "gelu" else "tanh",
  )
  f.close()
  return config
