"""Codes of a frozen tokenizer of images, one after another (Janus, arXiv 2410.13848; Janus-Pro, arXiv 2501.17811)."""

from jflow.generation.base import Family, Stored
from jflow.generation.codes.config import CodesConfig, CodesExploration
from jflow.generation.codes.layout import CodesLayout
from jflow.generation.codes.settings import Settings

FAMILY = Family(
  name="codes",
  about="codes of a VQ tokenizer",
  config=CodesConfig,
  layout=CodesLayout(),
  settings=Settings,
  writer="jflow.generation.codes.writer:CodesWriter",
  sampler="jflow.generation.codes.sampler:CodesSampler",
  tokens=("pad",),
  layouts=("jflow.interop.janus:LAYOUT", "jflow.interop.janus_transformers:LAYOUT"),
  parity="jflow.interop.parity_codes:GROUPS",
  flops="jflow.generation.codes.flops",
  frozen=("vq",),
  derived="jflow.generation.codes.writer:derived",
  policy="jflow.generation.codes.policy:CodesPolicy",
  explores=CodesExploration,
  stored=Stored(
    name="codes",
    array="codes",
    dtype="uint16",
    shape=lambda model: (model.patches,),
    part="vq",
    weights=("encoder", "quant_conv", "codebook"),
    encode="jflow.generation.codes.stored:encode",
    about="the codes of the tokenizer and the crop that they belong to",
  ),
)
