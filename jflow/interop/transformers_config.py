"""config.json of a decoder such as Llama, and of a SigLIP, as transformers writes them.

Each is read with a closed list of fields; a Llama's is written too. Absent fields have the library's defaults.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from jflow.errors import UserError
from jflow.interop.fields import Fields
from jflow.models.config import SiglipConfig
from jflow.models.llm.config import LanguageModelConfig, Llama3Config, Qwen2Config, Qwen3Config
from jflow.strict_json import shown


class _Kind(NamedTuple):
  """A decoder of transformers: its classes, and the defaults of its config where they are not a Llama's."""

  config: type  # of jflow's
  architectures: tuple[str, ...]
  defaults: Mapping[str, int] = {}


_QWEN = {"vocab_size": 151_936, "intermediate_size": 22_016, "max_position_embeddings": 32_768}
_KINDS = {  # by model_type
  "llama": _Kind(LanguageModelConfig, ("LlamaForCausalLM", "LLaMAForCausalLM", "LlamaModel")),
  "mistral": _Kind(
    LanguageModelConfig,
    ("MistralForCausalLM", "MistralModel"),
    {"intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
  ),
  "qwen2": _Kind(Qwen2Config, ("Qwen2ForCausalLM", "Qwen2Model"), _QWEN | {"num_key_value_heads": 32}),
  "qwen3": _Kind(Qwen3Config, ("Qwen3ForCausalLM", "Qwen3Model"), _QWEN | {"num_key_value_heads": 32, "head_dim": 128}),
}


def language_model_config(f: Fields, kinds: Collection[str] = ("llama",)) -> LanguageModelConfig:
  """Reads the config of a Llama of transformers, or of another decoder.

  Args:
    f: its fields.
    kinds: the model_types that are read, keys of _KINDS, and "llama3", a Llama with the rotations of Llama 3.1.

  Raises:
    UserError: a field is mistyped, contradicts another, or asks for something that jflow does not compute.
  """
  f.only("model_type", *(kind for kind in _KINDS if kind in kinds))
  kind = _KINDS[f.values.get("model_type") or "llama"]
  f.only("architectures", *([name] for name in kind.architectures))
  f.only("hidden_act", "silu")
  _no_dropout(f)
  f.only("pretraining_tp", 1)
  for name in (
    "attention_bias",
    "mlp_bias",
    "rope_interleaved",
    "use_sliding_window",
    "use_mrope",
    "qk_norm",
    "use_qk_norm",
  ):
    f.only(name, False)
  for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
    f.only(name, 1)
  sliding = f.values.get("use_sliding_window")
  if sliding is False or sliding is None and kind.config is not LanguageModelConfig:  # Qwen's window is off by default
    f.ignore(("sliding_window", "max_window_layers"))
  default = lambda name, of_llama: kind.defaults.get(name, of_llama)
  width, heads = f.get("hidden_size", int, 4096), f.get("num_attention_heads", int, 32, "num_heads")
  head_dim = default("head_dim", None)
  if f.values.get("head_dim") is None and head_dim is None and width % heads:
    raise UserError(
      f"{f.where}: hidden_size={width} must be a multiple of num_attention_heads={heads}, or head_dim given"
    )
  layers = f.get("num_hidden_layers", int, 32, "num_layers")
  context = f.get("max_position_embeddings", int, default("max_position_embeddings", 2048))
  layer_types = f.get("layer_types", list, [])
  if layer_types and (len(layer_types) != layers or any(one != "full_attention" for one in layer_types)):
    raise UserError(f"{f.where}: layer_types={shown(layer_types)} is not supported, only {layers} x 'full_attention'")
  f.only("max_sequence_length", context)
  is_tied(f)
  theta, rotation = _rotation(f, scaled=kind is _KINDS["llama"] and "llama3" in kinds)
  values = dict(
    kind="llama3" if rotation else {Qwen2Config: "qwen2", Qwen3Config: "qwen3"}.get(kind.config, "llama"),
    vocab_size=f.get("vocab_size", int, default("vocab_size", 32_000)),
    embed_dim=width,
    mlp_dim=f.get("intermediate_size", int, default("intermediate_size", 11_008)),
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=f.get("num_key_value_heads", int, default("num_key_value_heads", heads), "num_kv_heads"),
    head_dim=f.get("head_dim", int, head_dim or width // heads),
    rms_norm_epsilon=f.get("rms_norm_eps", float, 1e-6),
    rope_theta=theta,
    max_length=min(context, _window(f, context)) if kind is _KINDS["mistral"] else context,
  )
  f.close()
  return Llama3Config(**values, **rotation) if rotation else kind.config(**values)


def _window(f: Fields, context: int) -> int:
  """The longest sequence of a Mistral in which each token sees all before it: its window, where it has one."""
  return f.get("sliding_window", int, context) if "sliding_window" in f.values else 4096


def _no_dropout(f: Fields) -> None:
  """Refuses dropout, which jflow does not use in training."""
  for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout"):
    f.only(name, 0)


def is_tied(f: Fields) -> bool:
  """Whether the configuration ties the head to the embedding."""
  return f.get("tie_word_embeddings", bool, False)


_ROTATION = {"rope_factor": "factor", "rope_low": "low_freq_factor", "rope_high": "high_freq_factor"}


def _rotation(f: Fields, scaled: bool) -> tuple[float, dict[str, Any]]:
  """The base of the rotary frequencies, and the fields of Llama3Config where they are scaled, else {}.

  The base is from rope_theta or the rotation's own object, which must agree. `scaled`: whether Llama 3.1's is read.
  """
  f.only("partial_rotary_factor", 1)
  said = {f"{f.where}: rope_theta": f.get("rope_theta", float)} if f.values.get("rope_theta") is not None else {}
  f.ignore(("rope_theta", "rope_scaling", "rope_parameters"))
  rotations: list[dict[str, Any]] = []
  for name in ("rope_parameters", "rope_scaling"):
    if f.values.get(name) in (None, {}):
      continue
    rope = f.sub(name)
    for key in ("rope_type", "type"):
      rope.only(key, "default", *(["llama3"] if scaled else []))
    if rope.values.get("rope_type") is None and rope.values.get("type") is None and set(rope.values) - {"rope_theta"}:
      raise UserError(f"{rope.where}={shown(rope.values)} has no rope_type: only 'default' is supported")
    rope.only("partial_rotary_factor", 1)
    if "llama3" in (rope.values.get("rope_type"), rope.values.get("type")):
      length = rope.get("original_max_position_embeddings", int)
      rotations.append(
        {our: rope.get(name, float) for our, name in _ROTATION.items()} | {"rope_original_length": length}
      )
    else:
      rope.only("factor", 1)
      rotations.append({})
    if rope.values.get("rope_theta") is not None:
      said[f"{rope.where}: rope_theta"] = rope.get("rope_theta", float)
    rope.close()
  if len(set(said.values())) > 1:
    raise UserError(" and ".join(f"{field}={value:g}" for field, value in said.items()) + " contradict each other")
  if any(one != rotations[0] for one in rotations):
    raise UserError(f"{f.where}: rope_parameters and rope_scaling contradict each other")
  return next(iter(said.values()), 10_000.0), rotations[0] if rotations else {}


LANGUAGE_MODELS = (*_KINDS, "llama3")  # what `convert --from=huggingface-parts` starts from


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
