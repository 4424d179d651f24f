"""The sections that the official config.json of JanusFlow and of Janus share, the LLM's and SigLIP's, both ways."""

import math
from typing import Any

from jflow.errors import UserError
from jflow.interop import processor_config, sizes
from jflow.interop.fields import Fields
from jflow.interop.transformers_config import language_model_to_transformers
from jflow.models.config import SiglipConfig
from jflow.models.llm.config import LanguageModelConfig
from jflow.models.sizes import most
from jflow.strict_json import shown

# Named presets of the release's SigLIP: embed_dim, num_layers, num_heads, patch size, mlp_dim over embed_dim.
_SIGLIP = {
  "siglip_large_patch16_384": (1024, 24, 16, 16, 4.0),
  "siglip_large_patch16_256": (1024, 24, 16, 16, 4.0),
  "siglip_so400m_patch14_384": (1152, 27, 16, 14, 3.7362),
  "siglip_so400m_patch14_224": (1152, 27, 16, 14, 3.7362),
}


def params(root: Fields, part: str, cls: str) -> Fields:
  """The arguments of a part's class."""
  f = root.sub(f"{part}_config")
  f.only("cls", cls)
  f.only("model_type", part)
  params = f.sub("params")
  f.close()
  return params


def is_tied(root: Fields) -> bool:
  """Whether the LLM's or the whole model's section ties the head to the embedding.

  Raises:
    UserError: the two contradict each other.
  """
  inner = root.sub("language_config")
  told = [
    (f, f.get("tie_word_embeddings", bool)) for f in (root, inner) if f.values.get("tie_word_embeddings") is not None
  ]
  root.ignore(("tie_word_embeddings",))
  if len({value for _, value in told}) > 1:
    raise UserError(
      " and ".join(f"{f.where}: tie_word_embeddings={value}" for f, value in told) + " contradict each other"
    )
  return bool(told) and told[0][1]


def siglip_config(f: Fields) -> SiglipConfig:
  """Reads the arguments of the release's CLIPVisionTower, with explicit sizes where it has no preset."""
  f.only("select_feature", "same")
  f.only("select_layers")
  f.only("ckpt_path", "")
  for name in ("pixel_mean", "pixel_std"):
    f.only(name)
  name = f.get("model_name", str, "")
  if name not in _SIGLIP and f.values.get("width") is None:
    raise UserError(f"{f.where}: model_name={shown(name)} is unknown and width is missing; known: {', '.join(_SIGLIP)}")
  preset = _SIGLIP.get(name, (None,) * 5)
  if name in _SIGLIP:
    for field, value in zip(("width", "layers", "heads", "patch_size", "mlp_ratio"), preset, strict=True):
      f.only(field, value)
  width = f.get("width", int, preset[0])
  layers = f.get("layers", int, preset[1], "num_layers")
  f.ignore(("select_layer",))
  select = -2 if f.values.get("select_layer") is None else f.values["select_layer"]  # the release's own default
  if type(select) is not int or not -layers <= select <= layers:
    raise UserError(f"{f.where}: select_layer={shown(select)} should be an integer in {-layers}..{layers}")
  config = SiglipConfig(
    image_size=f.get("image_size", int, None, "image_size"),
    patch_size=f.get("patch_size", int, preset[3], "patch_size"),
    embed_dim=width,
    mlp_dim=mlp_dim(f, width, preset[4]),
    num_layers=select if select > 0 else layers + select + 1 if select else layers,
    num_heads=f.get("heads", int, preset[2], "num_heads"),
    layer_norm_epsilon=f.get("norm_eps", float, 1e-6),
    gelu=f.get("gelu", str, "erf"),
  )
  f.close()
  return config


def siglip_to_official(c: SiglipConfig) -> dict[str, Any]:
  """The arguments of CLIPVisionTower; the sizes are written out where the release has no preset for them."""
  siglip: dict[str, Any] = {
    "image_size": c.image_size,
    "model_name": f"siglip_large_patch16_{c.image_size}",
    "select_feature": "same",
    "select_layer": -1,
  }
  arguments = (c.embed_dim, c.num_layers, c.num_heads, c.patch_size, mlp_ratio(c))
  if _SIGLIP.get(siglip["model_name"]) != arguments:
    siglip |= {"model_name": "siglip_custom"} | dict(
      zip(("width", "layers", "heads", "patch_size", "mlp_ratio"), arguments, strict=True)
    )
  if c.gelu != "erf":
    siglip["gelu"] = c.gelu
  if c.layer_norm_epsilon != 1e-6:
    siglip["norm_eps"] = c.layer_norm_epsilon
  return siglip


def mlp_dim(f: Fields, width: int, default: float | None) -> int:
  """The width of SigLIP's MLP, from the field mlp_ratio; the inverse of `mlp_ratio`."""
  ratio = f.get("mlp_ratio", float, default)
  if not 1 <= width * ratio <= most(""):
    raise UserError(
      f"{f.where}: mlp_ratio={ratio:g} should give a width of the MLP in 1..{most('')}, got {width * ratio:g}"
    )
  return int(width * ratio)


def mlp_ratio(c: SiglipConfig) -> float:
  """The ratio of SigLIP's MLP to its width whose product, truncated, is the MLP's width."""
  ratio = c.mlp_dim / c.embed_dim
  return math.nextafter(ratio, math.inf) if int(c.embed_dim * ratio) < c.mlp_dim else ratio


def section(part: str, cls: str, params: dict[str, Any]) -> dict[str, Any]:
  """The object of a part: its class and arguments; the inverse of `params`."""
  return {"cls": cls, "model_type": part, "params": params}


def header(language_model: LanguageModelConfig, dtype: str) -> dict[str, Any]:
  """The fields in front of the parts."""
  return {
    "architectures": ["MultiModalityCausalLM"],
    "model_type": "multi_modality",
    "torch_dtype": dtype,
    "language_config": {"torch_dtype": dtype} | language_model_to_transformers(language_model),
  }


def check_header(root: Fields) -> None:
  """Checks the fields in front of the parts."""
  root.only("model_type", "multi_modality")
  root.only("architectures", ["MultiModalityCausalLM"])


def check_siglip(root: Fields, part: str, c: SiglipConfig, tower: str, tensors: Any, where: Any) -> None:
  """Compares SigLIP's sizes with the weights, whose names begin with `tower`; see `sizes.check`."""
  found = (f"{tower}.blocks.", f"{tower}.patch_embed.proj.weight", f"{tower}.pos_embed")
  f = root.sub(f"{part}_config").sub("params")
  sizes.check_siglip(f, c, tensors, ("layers", "width"), found, where)


# The fields of `layouts.Layout` that all models of the release share.
SHARED: dict[str, Any] = dict(
  name="official",
  language="language_config",
  is_tied=is_tied,
  embedding="language_model.model.embed_tokens.weight",
  head="language_model.lm_head.weight",
  checks=processor_config.OFFICIAL_CHECKS,
  files=processor_config.official_files,
)
