"""The published layout of JanusFlow: its tensor names and jflow's parameter paths, both ways."""

from collections.abc import Iterator

from jflow.models.config import ModelConfig
from jflow.models.weights import DEPTHWISE, PATCH, SAME, VECTOR, Entry, language_model, linear, norm, siglip


def _convnext(name: str, path: str, blocks: int, channels: int, condition: int) -> Iterator[Entry]:
  for i in range(blocks):
    block, ours, wide = f"{name}.mid_block.res_blocks.{i}", f"{path}/blocks_{i}", 4 * channels
    yield Entry(f"{block}.depthwise.weight", (channels, 1, 7, 7), f"{ours}/depthwise_kernel", DEPTHWISE)
    yield Entry(f"{block}.depthwise.bias", (channels,), f"{ours}/depthwise_bias", SAME)
    yield from norm(f"{block}.norm", f"{ours}/norm", channels, bias=False)
    yield from linear(f"{block}.channelwise_linear_1", f"{ours}/expand", wide, channels)
    for leaf, ours_leaf in (("weight", "scale"), ("bias", "bias")):
      shape = (1, 1, 1, wide)
      yield Entry(f"{block}.channelwise_norm.{leaf}", shape, f"{ours}/response_norm/{ours_leaf}", VECTOR)
    yield from linear(f"{block}.channelwise_linear_2", f"{ours}/contract", channels, wide)
    yield from linear(f"{block}.cond_embeds_mapper", f"{ours}/modulation", 2 * channels, condition)


def official(c: ModelConfig, tied: bool = False) -> list[Entry]:
  """Every tensor of the published checkpoint, in its order. REPA's head and the VAE are not in it."""
  lm, vision, gen = c.language_model, c.understanding_encoder, c.generation
  d, g, patch = lm.embed_dim, gen.channels, gen.patch_size
  entries = [Entry("beg_of_und_embed", (1, d), "understanding_start", VECTOR)]
  entries += siglip(vision)
  entries += linear("vision_und_enc_aligner", "understanding_projector", d, vision.embed_dim)
  encoder, path = "vision_gen_enc_model", "generation_encoder"
  entries += linear(f"{encoder}.time_embed.linear_1", f"{path}/time_embed/expand", d, g)
  entries += linear(f"{encoder}.time_embed.linear_2", f"{path}/time_embed/output", d, d)
  latents = c.autoencoder.latent_channels
  entries.append(Entry(f"{encoder}.in_conv.weight", (g, latents, patch, patch), f"{path}/patch_embed/kernel", PATCH))
  entries.append(Entry(f"{encoder}.in_conv.bias", (g,), f"{path}/patch_embed/bias", SAME))
  entries += _convnext(encoder, path, gen.encoder_blocks, g, d)
  entries += linear("vision_gen_enc_aligner", "generation_projector", d, g)
  decoder, path = "vision_gen_dec_model", "generation_decoder"
  entries += _convnext(decoder, path, gen.decoder_blocks, 2 * g, d)
  entries += norm(f"{decoder}.out_convs.0.norm", f"{path}/output_norm", 2 * g, bias=False)
  out = latents * patch**2
  unpatch = f"{decoder}.out_convs.0.unpatch_conv"
  entries.append(Entry(f"{unpatch}.weight", (out, 2 * g, 1, 1), f"{path}/output/kernel", PATCH))
  entries.append(Entry(f"{unpatch}.bias", (out,), f"{path}/output/bias", SAME))
  entries += norm(f"{decoder}.input_norm", f"{path}/input_norm", g, bias=False)
  entries += language_model(lm, "language_model.", tied)
  entries += norm("vision_gen_dec_aligner_norm", "generation_output_norm", d, bias=False)
  entries += linear("vision_gen_dec_aligner", "generation_output_projector", g, d)
  return entries
