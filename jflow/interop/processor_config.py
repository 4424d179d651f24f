"""Checks that preprocessor_config.json and processor_config.json ask for jflow's processing of images and turns.

jflow resizes, pads, normalises and tags as the release does (`jflow.data.images`, `jflow.data.prompts`,
`jflow.data.templates`). Many programs write these files, so an unknown field is reported and not refused.
"""

import sys
from typing import Any

from jflow.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from jflow.errors import UserError
from jflow.generation.base import family
from jflow.interop.fields import Fields
from jflow.models.config import ModelConfig
from jflow.strict_json import shown

_HALF = [0.5, 0.5, 0.5]


def check_images(f: Fields, config: ModelConfig) -> None:
  """Checks the release's VLMImageProcessor.

  Raises:
    UserError: naming the field that asks for something else.
  """
  f.only("image_processor_type", "VLMImageProcessor")
  f.only("background_color", [127, 127, 127])
  f.only("min_size", 14)
  _check_size(f, "image_size", config.image_size)
  _check_normalisation(f)
  _say_rest(f)


def check_siglip(f: Fields, image_size: int) -> None:
  """Checks an image processor of transformers' SigLIP, except how it resizes, since jflow pads to a square.

  Raises:
    UserError: naming the field that asks for something else.
  """
  f.only("image_processor_type", "SiglipImageProcessor", "SiglipImageProcessorFast")
  f.only("do_center_crop", False)
  f.ignore(("resample", "do_convert_rgb", "crop_size", "default_to_square"))
  if isinstance(f.values.get("size"), dict):
    size = f.sub("size")
    for side in ("height", "width", "shortest_edge", "longest_edge"):
      _check_size(size, side, image_size)
    size.close()
  else:
    _check_size(f, "size", image_size)
  _check_normalisation(f)
  _say_rest(f)


def check_chat(f: Fields, config: ModelConfig) -> None:
  """Checks the release's VLChatProcessor.

  Raises:
    UserError: naming the field that asks for something else.
  """
  _check_size(f, "num_image_tokens", config.patches)
  f.ignore(("processor_class",))
  f.only("add_special_token", False)
  f.only("ignore_id", -100)
  f.only("mask_prompt", True, False)
  f.only("sft_format", "deepseek")
  tags = {
    "image_tag": "image",
    "image_start_tag": "image_start",
    "image_end_tag": "image_end",
    "pad_tag": "pad",
  }
  for field, token in (tags | {"image_gen_tag": "generation_start"}).items():
    f.only(field, SPECIAL_TOKENS[token])
  _say_rest(f)


def check_transformers_images(f: Fields, config: ModelConfig) -> None:
  """Checks transformers' JanusImageProcessor.

  Raises:
    UserError: naming the field that asks for something else.
  """
  f.only("image_processor_type", "JanusImageProcessor", "JanusImageProcessorFast", "JanusImageProcessorPil")
  f.only("min_size", 14)
  f.only("do_pad", True)
  f.only("background_color", [127, 127, 127])
  f.only("resample", 3)
  f.only("do_convert_rgb", True)
  if isinstance(f.values.get("size"), dict):
    size = f.sub("size")
    for side in ("height", "width"):
      _check_size(size, side, config.image_size)
    size.close()
  _check_normalisation(f)
  _say_rest(f)


def check_transformers_chat(f: Fields, config: ModelConfig) -> None:
  """Checks transformers' JanusProcessor, whose system prompt jflow leaves to the user.

  Raises:
    UserError: naming the field that asks for something else.
  """
  f.only("processor_class", "JanusProcessor")
  _check_size(f, "num_image_tokens", config.patches)
  f.ignore(("use_default_system_prompt", "chat_template"))
  if isinstance(f.values.get("image_processor"), dict):
    check_transformers_images(f.sub("image_processor"), config)
  _say_rest(f)


def transformers_files(config: ModelConfig) -> dict[str, Any]:
  """The files of transformers' JanusProcessor, by name."""
  images = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": _HALF,
    "image_processor_type": "JanusImageProcessor",
    "image_std": _HALF,
    "min_size": 14,
    "processor_class": "JanusProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": config.image_size, "width": config.image_size},
  }
  chat = {"num_image_tokens": config.patches, "processor_class": "JanusProcessor", "use_default_system_prompt": True}
  return {"preprocessor_config.json": images, "processor_config.json": chat}


TRANSFORMERS_CHECKS = {
  "preprocessor_config.json": check_transformers_images,
  "processor_config.json": check_transformers_chat,
}
OFFICIAL_CHECKS = {"preprocessor_config.json": check_images, "processor_config.json": check_chat}


def official_files(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
  """The files of the release's processor, by name."""
  tags = {
    "image_end_tag": SPECIAL_TOKENS["image_end"],
    "image_start_tag": SPECIAL_TOKENS["image_start"],
    "image_tag": SPECIAL_TOKENS["image"],
  }
  if "generation_start" in family(config.generation).tokens:
    tags["image_gen_tag"] = SPECIAL_TOKENS["generation_start"]
  images = {
    "background_color": [127, 127, 127],
    "do_normalize": True,
    "image_mean": _HALF,
    "image_processor_type": "VLMImageProcessor",
    "image_size": config.image_size,
    "image_std": _HALF,
    "min_size": 14,
    "processor_class": "VLChatProcessor",
    "rescale_factor": 1 / 255,
  }
  chat = {
    "add_special_token": False,
    "ignore_id": -100,
    "mask_prompt": True,
    "num_image_tokens": config.patches,
    "processor_class": "VLChatProcessor",
    "sft_format": "deepseek",
  }
  return {"preprocessor_config.json": images, "processor_config.json": dict(sorted((chat | tags).items()))}


def _check_size(f: Fields, name: str, wanted: int) -> None:
  if f.values.get(name) is not None and f.get(name, int) != wanted:
    raise UserError(f"{f.where}: {name}={f.values[name]} is not supported, the model's is {wanted}")
  f.ignore((name,))


def _check_normalisation(f: Fields) -> None:
  """Checks that pixels are normalised to [-1, 1]: rescaled by 1/255, with mean 0.5 and deviation 0.5."""
  f.only("processor_class", "VLChatProcessor", "SiglipProcessor", "JanusProcessor")
  if f.values.get("do_normalize") is False:  # an error of an early published file, whose mean says nothing then
    f.ignore(("image_mean", "image_std"))
    print(
      f"jflow: {f.where} says do_normalize=false; pixels are normalised to [-1, 1] all the same",
      file=sys.stderr,
    )
  else:
    f.only("image_mean", _HALF)
    f.only("image_std", _HALF)
  f.only("do_rescale", True)
  f.only("do_resize", True)
  if f.values.get("rescale_factor") is not None and abs(f.get("rescale_factor", float) * 255 - 1) > 1e-6:
    raise UserError(f"{f.where}: rescale_factor={shown(f.values['rescale_factor'])} is not supported, only {1 / 255}")
  f.ignore(("rescale_factor",))
  f.only("do_normalize", True, False)


def _say_rest(f: Fields) -> None:
  if rest := f.unknown():
    names = ", ".join(shown(name)[1:-1] for name in rest[:8])
    print(f"jflow: {f.where} has fields that jflow does not read: {names}", file=sys.stderr)
