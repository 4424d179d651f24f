"""The config.json of decoders that differ from a Llama: published ones load, what none of them computes is refused."""

import pytest
from refusals import refused

from jflow.interop.fields import Fields
from jflow.interop.transformers_config import LANGUAGE_MODELS, language_model_config

_COMMON = dict(transformers_version="4.38.2", torch_dtype="bfloat16", use_cache=True, initializer_range=0.02)
_QWEN25 = _COMMON | dict(  # Qwen2.5-0.5B
  architectures=["Qwen2ForCausalLM"],
  attention_dropout=0.0,
  hidden_act="silu",
  hidden_size=896,
  intermediate_size=4864,
  max_position_embeddings=32768,
  max_window_layers=24,
  model_type="qwen2",
  num_attention_heads=14,
  num_hidden_layers=24,
  num_key_value_heads=2,
  rms_norm_eps=1e-6,
  rope_theta=1e6,
  sliding_window=32768,
  tie_word_embeddings=True,
  use_mrope=False,
  use_sliding_window=False,
  vocab_size=151936,
)
_QWEN3 = _COMMON | dict(  # Qwen3-0.6B
  architectures=["Qwen3ForCausalLM"],
  attention_bias=False,
  attention_dropout=0.0,
  head_dim=128,
  hidden_act="silu",
  hidden_size=1024,
  intermediate_size=3072,
  max_position_embeddings=40960,
  max_window_layers=28,
  model_type="qwen3",
  num_attention_heads=16,
  num_hidden_layers=28,
  num_key_value_heads=8,
  rms_norm_eps=1e-6,
  rope_scaling=None,
  rope_theta=1e6,
  sliding_window=None,
  tie_word_embeddings=True,
  use_sliding_window=False,
  vocab_size=151936,
)
_MISTRAL = _COMMON | dict(  # Mistral-7B-v0.1
  architectures=["MistralForCausalLM"],
  hidden_act="silu",
  hidden_size=4096,
  intermediate_size=14336,
  max_position_embeddings=32768,
  model_type="mistral",
  num_attention_heads=32,
  num_hidden_layers=32,
  num_key_value_heads=8,
  rms_norm_eps=1e-5,
  rope_theta=10000.0,
  sliding_window=4096,
  tie_word_embeddings=False,
  vocab_size=32000,
)
_ROTATION = dict(
  factor=32.0,
  high_freq_factor=4.0,
  low_freq_factor=1.0,
  original_max_position_embeddings=8192,
  rope_type="llama3",
)
_LLAMA3 = _COMMON | dict(  # Llama-3.2-1B
  architectures=["LlamaForCausalLM"],
  attention_bias=False,
  attention_dropout=0.0,
  head_dim=64,
  hidden_act="silu",
  hidden_size=2048,
  intermediate_size=8192,
  max_position_embeddings=131072,
  mlp_bias=False,
  model_type="llama",
  num_attention_heads=32,
  num_hidden_layers=16,
  num_key_value_heads=8,
  pretraining_tp=1,
  rms_norm_eps=1e-5,
  rope_scaling=_ROTATION,
  rope_theta=500000.0,
  tie_word_embeddings=True,
  vocab_size=128256,
)


def _decoder(values):
  return language_model_config(Fields(values, "config.json"), LANGUAGE_MODELS)


@pytest.mark.parametrize(
  "values, wanted",
  [
    (_QWEN25, dict(kind="qwen2", num_kv_heads=2, head_dim=64, rope_theta=1e6, max_length=32768)),
    (_QWEN3, dict(kind="qwen3", num_kv_heads=8, head_dim=128, max_length=40960)),
    (_MISTRAL, dict(kind="llama", num_kv_heads=8, max_length=4096)),  # its window
    (_MISTRAL | dict(sliding_window=None, vocab_size=32768), dict(kind="llama", max_length=32768)),  # v0.3
    (_LLAMA3, dict(kind="llama3", rope_factor=32.0, rope_low=1.0, rope_high=4.0, rope_original_length=8192)),
    ({"model_type": "qwen2"}, dict(kind="qwen2", mlp_dim=22016, num_kv_heads=32, vocab_size=151936)),
    ({"model_type": "qwen3"}, dict(kind="qwen3", head_dim=128, max_length=32768)),
    ({"model_type": "mistral"}, dict(mlp_dim=14336, num_kv_heads=8, max_length=4096, rope_theta=1e4)),
  ],
)
def test_other_decoders_load(values, wanted):
  read = vars(_decoder(values))
  assert {name: read[name] for name in wanted} == wanted


@pytest.mark.parametrize(
  "values, named",
  [
    (_QWEN25 | dict(use_sliding_window=True), "use_sliding_window"),
    (_QWEN25 | dict(use_mrope=True), "use_mrope"),
    (_QWEN25 | dict(rope_scaling=dict(type="yarn", factor=4.0)), "yarn"),
    (_QWEN25 | dict(rope_scaling=_ROTATION), "llama3"),
    (_QWEN3 | dict(attention_bias=True), "attention_bias"),
    (_QWEN3 | dict(num_experts=128), "num_experts"),
    (_MISTRAL | dict(rope_scaling=_ROTATION), "llama3"),
    (_MISTRAL | dict(model_type="mixtral"), "mixtral"),
    (_LLAMA3 | dict(rope_scaling=_ROTATION | dict(factor=None)), "factor"),
    (_LLAMA3 | dict(rope_scaling=_ROTATION | dict(attention_factor=1.5)), "attention_factor"),
    (_LLAMA3 | dict(rope_parameters=_ROTATION | dict(factor=8.0)), "rope_parameters"),
    (_LLAMA3 | dict(model_type="gemma3_text"), "gemma3_text"),
    (_LLAMA3 | dict(sliding_window=4096, use_sliding_window=None), "sliding_window"),
  ],
)
def test_what_other_decoders_have_beyond_that_is_refused(values, named):
  with refused(named, "config.json"):
    _decoder(values)


@pytest.mark.parametrize("values, named", [(_QWEN25, "qwen2"), (_MISTRAL, "mistral"), (_LLAMA3, "llama3")])
def test_a_published_layout_has_a_llama_alone(values, named):
  with refused(named):
    language_model_config(Fields(values, "config.json"))
