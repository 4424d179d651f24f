"""Reading of a foreign config.json by a closed list of fields: each is used, known to change nothing, or refused."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from jflow.errors import UserError
from jflow.models.sizes import most
from jflow.strict_json import shown

# Fields of transformers' PretrainedConfig and of the tools around it that change nothing a forward pass computes:
# bookkeeping, defaults of its own sampling loop (jflow's flags say how to sample), choices of a kernel or a type.
_HARMLESS = frozenset(
  [
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_diffusers_version",
    "_experts_implementation",
    "_flash_attn_2_enabled",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "chunk_size_feed_forward",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "neftune_noise_alpha",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "trust_remote_code",
    "typical_p",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
  ]
)


def refuse_code(values: Mapping[str, Any], where: str) -> None:
  """Refuses a config.json that names Python code to execute."""
  if values.get("auto_map") is not None or values.get("trust_remote_code"):
    raise UserError(
      f"{where} asks to run Python code that came with the weights (auto_map, trust_remote_code), which "
      "jflow never does: remove the field if the weights are those of a plain model"
    )


class Fields:
  """Reader of the fields of a config.json; errors name file and field.

  A field that is null counts as absent.
  """

  def __init__(self, values: Any, where: str):
    if not isinstance(values, Mapping):
      raise UserError(f"{where} should be a JSON object")
    refuse_code(values, where)
    self.values, self.where = values, where
    self._known: set[str] = set()

  def get(self, name: str, kind: type, default: Any = None, ours: str = "") -> Any:
    """The value of a field; numbers must be positive and finite.

    Args:
      name: of the field.
      kind: its type.
      default: for an absent field; without one, absence is an error.
      ours: the name in jflow's own configuration, which bounds the value.
    """
    self._known.add(name)
    value = self.values.get(name)
    if value is None:
      if default is None:
        raise UserError(f"{self.where} has no field {name}")
      return default
    number = kind in (int, float)
    if kind is float and type(value) is int and abs(value) < 2**63:
      value = float(value)
    if type(value) is not kind or (number and not 0 < value < math.inf):
      what = f"positive {kind.__name__}" if number else kind.__name__
      raise UserError(f"{self.where}: {name}={shown(value)} should be a {what}")
    if kind is int and value > most(ours):
      raise UserError(f"{self.where}: {name}={shown(value)} should be at most {most(ours)}")
    return value

  def only(self, name: str, *allowed: Any) -> None:
    """Refuses any value except those allowed; the field may be absent."""
    self._known.add(name)
    value = self.values.get(name)
    if value is not None and not any(_same(value, x) for x in allowed):
      raise UserError(
        f"{self.where}: {name}={shown(value)} is not supported, only {shown(allowed[0]) if allowed else 'null'}"
      )

  def ignore(self, names: Iterable[str]) -> None:
    """Accepts fields that do not change the computation."""
    self._known.update(names)

  def sub(self, name: str) -> "Fields":
    """A reader of the object in a field."""
    self._known.add(name)
    if self.values.get(name) is None:
      raise UserError(f"{self.where} has no field {name}")
    return Fields(self.values[name], f"{self.where}: {name}")

  def close(self) -> None:
    """Refuses fields that were not read; see _HARMLESS for those that any config.json may have.

    Raises:
      UserError: the field and its value are named.
    """
    self.only("is_encoder_decoder", False)
    self.only("add_cross_attention", False)
    self.only("cross_attention_hidden_size")
    self.only("tie_encoder_decoder", False)
    self.only("pruned_heads", {})
    for name in self.unknown():
      raise UserError(
        f"{self.where}: {shown(name)[1:-1]}={shown(self.values[name])} is a field that jflow does not compute: another "
        "kind of model? Remove it only if the model is the same without it"
      )

  def unknown(self) -> list[str]:
    """The fields that were not read and are not in _HARMLESS."""
    known = self._known | _HARMLESS
    return [name for name, value in self.values.items() if name not in known and value is not None]


def _same(a: Any, b: Any) -> bool:
  """Equality in which true is not 1; lists element by element."""
  if isinstance(a, bool) or isinstance(b, bool):
    return a is b
  if isinstance(a, list) and isinstance(b, list):
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
  return a == b and isinstance(a, str) == isinstance(b, str)
