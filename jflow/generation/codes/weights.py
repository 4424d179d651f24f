"""The published layout of Janus and Janus-Pro: its tensor names and jflow's parameter paths, both ways."""

from collections.abc import Iterator

from jflow.models.autoencoders.vq import VQConfig
from jflow.models.config import ModelConfig
from jflow.models.weights import PATCH, SAME, Entry, conv, language_model, linear, norm, resnet, siglip


def official(c: ModelConfig, tied: bool = False) -> list[Entry]:
  """Every tensor of the published checkpoint but the buffer `gen_vision_model.quantize.codebook_used`."""
  lm, vision, codec = c.language_model, c.understanding_encoder, c.autoencoder
  d, hidden, codes = lm.embed_dim, c.generation.hidden_dim, codec.codebook_size
  entries = [*siglip(vision, "vision_model.vision_tower")]
  entries += _mlp("aligner", "understanding_projector", d, vision.embed_dim, c.reader.layers)
  entries += vq(codec, "gen_vision_model.")
  entries += _mlp("gen_aligner", "generation_projector", d, codec.code_dim, c.generation.projector_layers)
  entries += linear("gen_head.output_mlp_projector", "generation_head/hidden", hidden, d)
  entries += linear("gen_head.vision_head", "generation_head/output", codes, hidden)
  entries.append(Entry("gen_embed.weight", (codes, codec.code_dim), "generation_embed/embed", SAME))
  entries += language_model(lm, "language_model.", tied)
  return entries


def _mlp(name: str, path: str, out: int, into: int, layers: int) -> Iterator[Entry]:
  """An aligner of kind "mlp_gelu", whose GELUs are layers of its own."""
  for k in range(layers):
    yield from linear(f"{name}.layers.{2 * k}", f"{path}/layers_{k}", out, out if k else into)


def vq(c: VQConfig, prefix: str) -> Iterator[Entry]:
  """The entries of the tokenizer, whose names begin with `prefix`."""
  widths, top, levels = c.widths, c.widths[-1], len(c.widths)
  encoder, decoder = f"{prefix}encoder", f"{prefix}decoder"
  yield from conv(f"{encoder}.conv_in", "vq/encoder/conv_in", c.channels, 3, 3)
  into = c.channels
  for i, out in enumerate(widths):
    name, path = f"{encoder}.conv_blocks.{i}", f"vq/encoder/down_{i}"
    for j in range(c.blocks_per_level):
      yield from resnet(f"{name}.res.{j}", f"{path}_resnet_{j}", out, into, "nin_shortcut")
      into = out
      if i + 1 == levels:
        yield from _attention(f"{name}.attn.{j}", f"{path}_attention_{j}", out)
    if i + 1 < levels:
      yield from conv(f"{name}.downsample.conv", f"{path}_sample", out, out, 3)
  yield from _middle(encoder, "vq/encoder/middle", top)
  yield from norm(f"{encoder}.norm_out", "vq/encoder/norm_out", top)
  yield from conv(f"{encoder}.conv_out", "vq/encoder/conv_out", c.latent_channels, top, 3)
  yield from conv(f"{prefix}quant_conv", "vq/quant_conv", c.code_dim, c.latent_channels, 1)
  yield Entry(f"{prefix}quantize.embedding.weight", (c.codebook_size, c.code_dim), "vq/codebook", SAME)
  yield from conv(f"{prefix}post_quant_conv", "vq/post_quant_conv", c.latent_channels, c.code_dim, 1)
  yield from conv(f"{decoder}.conv_in", "vq/decoder/conv_in", top, c.latent_channels, 3)
  yield from _middle(decoder, "vq/decoder/middle", top)
  into = top
  for i, out in enumerate(reversed(widths)):
    name, path = f"{decoder}.conv_blocks.{i}", f"vq/decoder/up_{i}"
    for j in range(c.blocks_per_level + 1):
      yield from resnet(f"{name}.res.{j}", f"{path}_resnet_{j}", out, into, "nin_shortcut")
      into = out
      if not i:
        yield from _attention(f"{name}.attn.{j}", f"{path}_attention_{j}", out)
    if i + 1 < levels:
      yield from conv(f"{name}.upsample.conv", f"{path}_sample", out, out, 3)
  yield from norm(f"{decoder}.norm_out", "vq/decoder/norm_out", widths[0])
  yield from conv(f"{decoder}.conv_out", "vq/decoder/conv_out", 3, widths[0], 3)


def _middle(name: str, path: str, width: int) -> Iterator[Entry]:
  yield from resnet(f"{name}.mid.0", f"{path}/resnet_1", width, width)
  yield from _attention(f"{name}.mid.1", f"{path}/attention", width)
  yield from resnet(f"{name}.mid.2", f"{path}/resnet_2", width, width)


def _attention(name: str, path: str, width: int) -> Iterator[Entry]:
  """Maps by 1x1 convolutions, which are matrices here."""
  yield from norm(f"{name}.norm", f"{path}/norm", width)
  for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("proj_out", "output")):
    yield Entry(f"{name}.{theirs}.weight", (width, width, 1, 1), f"{path}/{ours}/kernel", PATCH)
    yield Entry(f"{name}.{theirs}.bias", (width,), f"{path}/{ours}/bias", SAME)
