"""config.json of others is read with a closed list: what is published loads, what jflow does not compute is refused."""

import copy
import json

import official_checkpoint
import pytest
from refusals import refused

from jflow.errors import UserError
from jflow.interop import janusflow, processor_config, transformers_config, vae
from jflow.interop.fields import Fields

JANUSFLOW = json.loads((official_checkpoint.TINY / "config.json").read_text())
LLAMA = dict(
  model_type="llama",
  hidden_size=64,
  intermediate_size=160,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  vocab_size=256,
)
SIGLIP = dict(
  model_type="siglip_vision_model",
  image_size=64,
  patch_size=16,
  hidden_size=48,
  intermediate_size=96,
  num_hidden_layers=2,
  num_attention_heads=4,
)
VAE = dict(
  _class_name="AutoencoderKL",
  act_fn="silu",
  block_out_channels=[32, 64],
  in_channels=3,
  out_channels=3,
  down_block_types=["DownEncoderBlock2D"] * 2,
  up_block_types=["UpDecoderBlock2D"] * 2,
  latent_channels=4,
  layers_per_block=1,
  norm_num_groups=32,
  scaling_factor=0.5,
)
IMAGES = dict(
  background_color=[127, 127, 127],
  do_normalize=True,
  image_mean=[0.5, 0.5, 0.5],
  image_std=[0.5, 0.5, 0.5],
  image_processor_type="VLMImageProcessor",
  image_size=64,
  min_size=14,
  processor_class="VLChatProcessor",
  rescale_factor=0.00392156862745098,
)
CHAT = dict(
  add_special_token=False,
  ignore_id=-100,
  image_end_tag="<end_of_image>",
  image_start_tag="<begin_of_image>",
  image_tag="<image_placeholder>",
  mask_prompt=True,
  num_image_tokens=16,
  sft_format="deepseek",
)


def _official(values):
  return janusflow.config_from_official(values, "config.json", None)


def _of_model(check):
  return lambda values: check(Fields(values, "config.json"), _official(JANUSFLOW))


READERS = {
  "official": (_official, JANUSFLOW),
  "llama": (lambda values: transformers_config.language_model_config(Fields(values, "config.json")), LLAMA),
  "siglip": (lambda values: transformers_config.siglip_config(Fields(values, "config.json")), SIGLIP),
  "vae": (lambda values: vae.read_config(Fields(values, "config.json")), VAE),
  "images": (_of_model(processor_config.check_images), IMAGES),
  "chat": (_of_model(processor_config.check_chat), CHAT),
  "siglip images": (
    lambda values: processor_config.check_siglip(Fields(values, "config.json"), 64),
    dict(
      do_normalize=True,
      do_rescale=True,
      do_resize=True,
      image_mean=[0.5, 0.5, 0.5],
      image_std=[0.5, 0.5, 0.5],
      image_processor_type="SiglipImageProcessor",
      processor_class="SiglipProcessor",
      resample=3,
      rescale_factor=1 / 255,
      size={"height": 64, "width": 64},
    ),
  ),
}


def _changed(reader, path, value):
  """A reader's sound values with one field set; "a/b" is field b of the object a."""
  values = copy.deepcopy(READERS[reader][1])
  *parents, field = path.split("/")
  place = values
  for parent in parents:
    place = place[parent]
  place[field] = value
  return values


# --- what is published -------------------------------------------------------------------------------------

_COMMON = dict(transformers_version="4.38.2", torch_dtype="bfloat16", use_cache=True, initializer_range=0.02)
_DEEPSEEK = _COMMON | dict(
  architectures=["LlamaForCausalLM"],
  attention_bias=False,
  bos_token_id=100000,
  eos_token_id=100001,
  hidden_act="silu",
  hidden_size=4096,
  intermediate_size=11008,
  max_position_embeddings=4096,
  model_type="llama",
  num_attention_heads=32,
  num_hidden_layers=30,
  num_key_value_heads=32,
  pretraining_tp=1,
  rms_norm_eps=1e-6,
  rope_scaling=None,
  rope_theta=10000.0,
  tie_word_embeddings=False,
  vocab_size=102400,
)
_JANUS_PRO_7B = dict(
  max_position_embeddings=16384,
  model_type="llama",
  num_hidden_layers=30,
  torch_dtype="bfloat16",
  vocab_size=102400,
)
_TINYLLAMA = _COMMON | dict(
  _name_or_path="meta-llama/Llama-2-7b-hf",
  architectures=["LlamaForCausalLM"],
  bos_token_id=1,
  eos_token_id=2,
  hidden_act="silu",
  hidden_size=2048,
  intermediate_size=5632,
  max_position_embeddings=2048,
  model_type="llama",
  num_attention_heads=32,
  num_hidden_layers=22,
  num_key_value_heads=4,
  pretraining_tp=1,
  rms_norm_eps=1e-5,
  rope_scaling=None,
  rope_theta=10000.0,
  tie_word_embeddings=False,
  vocab_size=32000,
  attention_bias=False,
)
_SMOLLM = _COMMON | dict(
  architectures=["LlamaForCausalLM"],
  attention_bias=False,
  attention_dropout=0.0,
  bos_token_id=0,
  eos_token_id=0,
  hidden_act="silu",
  hidden_size=576,
  intermediate_size=1536,
  is_llama_config=True,
  max_position_embeddings=8192,
  mlp_bias=False,
  model_type="llama",
  num_attention_heads=9,
  num_hidden_layers=30,
  num_key_value_heads=3,
  pretraining_tp=1,
  rms_norm_eps=1e-5,
  rope_interleaved=False,
  rope_scaling=None,
  rope_theta=100000,
  tie_word_embeddings=True,
  vocab_size=49152,
  **{"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
)
_SIGLIP_LARGE = dict(
  architectures=["SiglipModel"],
  initializer_factor=1.0,
  model_type="siglip",
  torch_dtype="float32",
  text_config=dict(hidden_size=1024, intermediate_size=4096, model_type="siglip_text_model", num_hidden_layers=24),
  transformers_version="4.37.0.dev0",
  vision_config=dict(
    hidden_size=1024,
    image_size=384,
    intermediate_size=4096,
    model_type="siglip_vision_model",
    num_attention_heads=16,
    num_hidden_layers=24,
    patch_size=16,
  ),
)
_SDXL_VAE = VAE | dict(
  _diffusers_version="0.18.0.dev0",
  _name_or_path=".",
  block_out_channels=[128, 256, 512, 512],
  layers_per_block=2,
  down_block_types=["DownEncoderBlock2D"] * 4,
  up_block_types=["UpDecoderBlock2D"] * 4,
  sample_size=1024,
  scaling_factor=0.13025,
  force_upcast=True,
  latents_mean=None,
  latents_std=None,
  shift_factor=None,
)
_RELEASE_PART = dict(
  block_out_channels=[768],
  hidden_size=2048,
  layers_in_middle=2,
  norm_eps=1e-6,
  elementwise_affine=True,
  use_bias=True,
  use_mid_block=True,
  dropout=0.0,
)
_JANUSFLOW_1B = dict(
  architectures=["MultiModalityCausalLM"],
  model_type="multi_modality",
  torch_dtype="bfloat16",
  transformers_version="4.38.2",
  language_config=_JANUS_PRO_7B
  | dict(
    hidden_size=2048,
    intermediate_size=5632,
    num_attention_heads=16,
    num_hidden_layers=24,
    num_key_value_heads=16,
    _attn_implementation="flash_attention_2",
    rms_norm_eps=1e-6,
  ),
  vision_und_enc_config=dict(
    cls="CLIPVisionTower",
    model_type="vision_und_enc",
    params=dict(
      image_size=384,
      model_name="siglip_large_patch16_384",
      select_feature="same",
      select_layer=-1,
    ),
  ),
  vision_gen_enc_config=dict(
    cls="ShallowUViTEncoder",
    model_type="vision_gen_enc",
    params=_RELEASE_PART | dict(input_channels=4, stride=2, kernel_size=2, padding=0),
  ),
  vision_gen_dec_config=dict(
    cls="ShallowUViTDecoder",
    model_type="vision_gen_dec",
    params=_RELEASE_PART | dict(in_channels=768, out_channels=4, upsamples=1),
  ),
)


@pytest.mark.parametrize(
  "reader, values",
  [
    ("official", _JANUSFLOW_1B),
    ("official", _JANUSFLOW_1B | dict(tie_word_embeddings=False, id2label={"0": "LABEL_0"})),
    ("llama", _DEEPSEEK),
    ("llama", _JANUS_PRO_7B),
    ("llama", _TINYLLAMA),
    ("llama", _SMOLLM),
    ("llama", _TINYLLAMA | dict(rope_parameters=dict(rope_theta=10000.0, rope_type="default"))),
    (
      "llama",
      LLAMA | dict(layer_types=["full_attention"] * 3, use_sliding_window=False, sliding_window=4096),
    ),
    ("siglip", _SIGLIP_LARGE),
    ("siglip", SIGLIP | dict(hidden_act="gelu_pytorch_tanh", attention_dropout=0.0, vision_use_head=True)),
    ("vae", _SDXL_VAE),
    ("vae", _SDXL_VAE | dict(force_upcast=False, use_quant_conv=True, mid_block_add_attention=True)),
    ("vae", VAE | dict(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, shift_factor=0.0)),
    *((name, values) for name, (_, values) in READERS.items()),
  ],
)
def test_what_is_published_loads(reader, values):
  READERS[reader][0](values)


def test_what_a_file_leaves_out_has_the_default_of_its_library():
  lm = READERS["llama"][0](_JANUS_PRO_7B)
  assert (lm.embed_dim, lm.mlp_dim, lm.num_layers, lm.num_heads, lm.num_kv_heads, lm.head_dim) == (
    4096,
    11008,
    30,
    32,
    32,
    128,
  )
  assert (lm.rms_norm_epsilon, lm.rope_theta, lm.max_length) == (1e-6, 10_000.0, 16384)
  assert READERS["siglip"][0]({"model_type": "siglip_vision_model"}).embed_dim == 768


# --- what jflow does not compute ---------------------------------------------------------------------------

_LANGUAGE, _UND = "language_config", "vision_und_enc_config/params"
_ENC, _DEC = "vision_gen_enc_config/params", "vision_gen_dec_config/params"
_REFUSED = [
  *(
    ("llama", field, value)
    for field, value in (
      ("rope_scaling", {"factor": 2.0}),
      ("rope_scaling", {"rope_type": "default", "factor": 2.0}),
      ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
      ("rope_scaling", "linear"),
      ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
      ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
      ("rope_parameters", {"full_attention": {"rope_theta": 1e4}}),
      ("partial_rotary_factor", 0.25),
      ("rope_interleaved", True),
      ("sliding_window", 4096),
      ("use_sliding_window", True),
      ("attention_bias", True),
      ("mlp_bias", True),
      ("hidden_act", "gelu"),
      ("attention_multiplier", 0.1),
      ("logits_scaling", 8.0),
      ("embedding_multiplier", 12.0),
      ("residual_multiplier", 0.2),
      ("qk_norm", True),
      ("pretraining_tp", 2),
      ("quantization_config", {"bits": 4}),
      ("attn_logit_softcapping", 50.0),
      ("final_logit_softcapping", 30.0),
      ("num_experts", 8),
      ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
      ("layer_types", ["full_attention"]),
      ("attention_dropout", 0.1),
      ("is_encoder_decoder", True),
      ("pruned_heads", {"0": [1]}),
      ("architectures", ["MistralForCausalLM"]),
      ("model_type", "mistral"),
      ("tie_word_embeddings", "false"),
      ("tie_word_embeddings", 1),
      ("attention_bias", 0.5),
      ("never_heard_of", 1),
      ("never_heard_of", False),
      ("auto_map", {"AutoModel": "evil.Model"}),
    )
  ),
  ("siglip", "hidden_act", "quick_gelu"),
  ("siglip", "num_channels", 1),
  ("siglip", "vision_use_head", "yes"),
  ("siglip", "attention_dropout", 0.1),
  ("siglip", "never_heard_of", 1),
  ("siglip", "model_type", "siglip2"),
  *(
    ("vae", field, value)
    for field, value in (
      ("latents_mean", [-1.5, 2.0, -1.25, 2.5]),
      ("latents_mean", [0.0]),
      ("latents_std", [8.0, 6.0, 6.5, 5.0]),
      ("shift_factor", 0.1),
      ("use_quant_conv", False),
      ("use_post_quant_conv", False),
      ("mid_block_add_attention", False),
      ("act_fn", "relu"),
      ("norm_num_groups", 24),
      ("in_channels", 4),
      ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
      ("down_block_types", ["DownEncoderBlock2D"]),
      ("up_block_types", [{}, {}]),
      ("_class_name", "AutoencoderKLWan"),
      ("never_heard_of", 0),
    )
  ),
  ("official", f"{_LANGUAGE}/rope_scaling", {"factor": 2.0}),
  ("official", f"{_LANGUAGE}/auto_map", {"AutoModel": "evil.Model"}),
  ("official", f"{_UND}/pixel_mean", [0.48, 0.46, 0.41]),
  ("official", f"{_UND}/select_layers", [1, 2]),
  ("official", f"{_UND}/ckpt_path", "/etc/passwd"),
  ("official", f"{_UND}/never_heard_of", 1),
  ("official", f"{_UND}/mlp_ratio", 1e30),
  ("official", f"{_ENC}/dropout", 0.1),
  ("official", f"{_ENC}/never_heard_of", 1),
  ("official", f"{_DEC}/in_channels", 64),
  ("official", f"{_DEC}/out_channels", 8),
  ("official", f"{_DEC}/upsamples", 2),
  ("official", "vision_gen_enc_config/cls", "SomethingElse"),
  ("official", "architectures", ["LlamaForCausalLM"]),
  ("official", "model_type", "janus"),
  ("official", "quantization_config", {"bits": 4}),
  ("images", "image_mean", [0.48, 0.46, 0.41]),
  ("images", "image_std", [0.5, 0.5]),
  ("images", "image_std", [0.0, 0.0, 0.0]),
  ("images", "image_std", "0.5"),
  ("images", "image_size", 10**9),
  ("images", "image_size", "64"),
  ("images", "image_size", 32),
  ("images", "rescale_factor", 1.0),
  ("images", "background_color", [0, 0, 0]),
  ("images", "do_rescale", False),
  ("images", "auto_map", {"AutoImageProcessor": "evil.Processor"}),
  ("chat", "num_image_tokens", 576),
  ("chat", "image_tag", "<image>"),
  ("chat", "sft_format", "llama-2"),
  ("siglip images", "size", {"height": 224, "width": 224}),
  ("siglip images", "size", {"height": 64, "width": 64, "depth": 1}),
  ("siglip images", "do_center_crop", True),
]


@pytest.mark.parametrize("reader, path, value", _REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_not_computed_is_refused_by_its_field(reader, path, value):
  with pytest.raises(UserError) as caught:
    READERS[reader][0](_changed(reader, path, value))
  assert path.split("/")[-1] in str(caught.value) and "\n" not in str(caught.value)


_SIZES = [
  ("official", f"{_LANGUAGE}/num_hidden_layers"),
  ("official", f"{_LANGUAGE}/num_attention_heads"),
  ("official", f"{_UND}/image_size"),
  ("official", f"{_UND}/layers"),
  ("official", f"{_ENC}/stride"),
  ("official", f"{_DEC}/layers_in_middle"),
  ("llama", "vocab_size"),
  ("llama", "num_key_value_heads"),
  ("llama", "max_position_embeddings"),
  ("siglip", "patch_size"),
  ("vae", "latent_channels"),
  ("vae", "norm_num_groups"),
  ("vae", "layers_per_block"),
]
_NO_SIZE = (0, -1, 10**12, 10**400, 2.5, "4", True, [4], {"a": 4}, float("nan"), float("inf"))


@pytest.mark.parametrize("value", _NO_SIZE, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize("reader, path", _SIZES)
def test_a_size_is_a_positive_whole_number_of_some_range(reader, path, value):
  with pytest.raises(UserError) as caught:
    READERS[reader][0](_changed(reader, path, value))
  assert path.split("/")[-1] in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("value", (0, -1.0, "1e-6", True, [1.0], float("nan"), float("inf"), 10**400))
@pytest.mark.parametrize(
  "reader, path",
  [
    ("llama", "rms_norm_eps"),
    ("llama", "rope_theta"),
    ("siglip", "layer_norm_eps"),
    ("vae", "scaling_factor"),
  ],
)
def test_a_factor_is_a_positive_finite_number(reader, path, value):
  with refused(path):
    READERS[reader][0](_changed(reader, path, value))


def test_two_thetas_must_agree():
  values = LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
  with refused("rope_theta=10000", "rope_theta=500000"):
    READERS["llama"][0](values)
  values["rope_parameters"]["rope_theta"] = 1e4
  assert READERS["llama"][0](values).rope_theta == 1e4


def test_inner_and_outer_may_not_differ_on_the_head():
  values = _changed("official", f"{_LANGUAGE}/tie_word_embeddings", True)
  READERS["official"][0](values)
  with refused("tie_word_embeddings=False", "tie_word_embeddings=True"):
    READERS["official"][0](values | {"tie_word_embeddings": False})


def test_a_processor_that_does_not_normalise_is_said_and_unknown_fields_too(capsys):
  READERS["images"][0](IMAGES | {"do_normalize": False, "image_mean": [0.48, 0.46, 0.41], "do_magic": 1})
  said = capsys.readouterr().err
  assert said.count("do_normalize=false") == 1 and "do_magic" in said
