"""Small random models of transformers and diffusers, written as these libraries write them."""

import pathlib

import diffusers
import numpy as np
import torch
import transformers


def shake(model, seed: int):
  """Random values everywhere, so that no zero bias and no unit scale hides an error."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, x in model.named_parameters():
      noise = torch.randn(x.shape, generator=generator)
      if x.ndim == 1:
        x.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
      else:
        x.copy_(noise / np.sqrt(np.prod(x.shape[1:])))
  return model.eval()


def llama(directory: pathlib.Path, seed: int, kind: str = "Llama", **changes):
  """A causal Llama of 97 ids, or another decoder of this name in transformers."""
  values = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    attn_implementation="eager",
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=1,
  )
  config = getattr(transformers, f"{kind}Config")(**(values | changes))
  model = shake(getattr(transformers, f"{kind}ForCausalLM")(config), seed)
  model.save_pretrained(directory)
  return model


def siglip(directory: pathlib.Path, seed: int, whole: bool = False, **changes):
  """SigLIP's vision model, alone or in a whole SigLIP."""
  values = dict(
    hidden_size=32,
    intermediate_size=72,
    num_hidden_layers=2,
    num_attention_heads=4,
    image_size=64,
    patch_size=16,
    attn_implementation="eager",
  )
  if whole:
    text = dict(vocab_size=50, hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.SiglipConfig(text_config=text, vision_config=values | changes)
    model = shake(transformers.SiglipModel(config), seed)
    model.save_pretrained(directory)
    return model.vision_model
  model = shake(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**(values | changes))), seed)
  model.save_pretrained(directory)
  return model


def vae(directory: pathlib.Path, seed: int, channels=(8, 16), layers=1):
  """An AutoencoderKL of 4 latent channels."""
  model = diffusers.AutoencoderKL(
    down_block_types=("DownEncoderBlock2D",) * len(channels),
    up_block_types=("UpDecoderBlock2D",) * len(channels),
    block_out_channels=channels,
    layers_per_block=layers,
    norm_num_groups=4,
    latent_channels=4,
    scaling_factor=0.13025,
  )
  shake(model, seed).save_pretrained(directory)
  return model


def janus(directory: pathlib.Path, seed: int, text: dict, vision: dict, vq: dict):
  """A JanusForConditionalGeneration of 97 ids: BOS 0, BOI 94, image 95, pad 96."""
  sizes = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
  sizes |= dict(max_position_embeddings=256, bos_token_id=0, eos_token_id=None, pad_token_id=96) | text
  width = sizes["hidden_size"]
  seen = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, projection_dim=width) | vision
  patches = (seen["image_size"] // seen["patch_size"]) ** 2
  codes = dict(projection_dim=width, image_token_embed_dim=width, base_channels=32, latent_channels=16) | vq
  config = transformers.JanusConfig(
    text_config=sizes | {"model_type": "llama"},
    vision_config=seen | {"num_image_tokens": patches},
    vq_config=codes,
    image_token_id=95,
    attn_implementation="eager",
  )
  model = shake(transformers.JanusForConditionalGeneration(config), seed)
  model.save_pretrained(directory)
  return model
