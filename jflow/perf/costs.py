"""What painting and answering cost by formula: FLOPs of a picture, bytes of a token. A multiply-add is 2 FLOPs."""

from jflow.models.config import JanusFlowConfig, LanguageModelConfig


def body_weights(c: LanguageModelConfig) -> int:
  """Weights of the LLM's matrices without embedding and head."""
  attention = c.width * c.head_width * (2 * c.heads + 2 * c.kv_heads)
  return c.layers * (attention + 3 * c.width * c.mlp_width)


def painting_flops(c: JanusFlowConfig, evaluations: int, prompt: int, guided: bool) -> float:
  """FLOPs of one picture with its prompt's keys kept: the velocity `evaluations` times, then the VAE.

  Args:
    prompt: its tokens, BOS included; the unconditional half sees BOS alone.
    guided: both halves are computed; the encoder's output serves both.
  """
  lm, g, p = c.language_model, c.generation, c.patches
  slots, width = p + 1, lm.layers * lm.heads * lm.head_width
  pairs = lambda before: slots * before + slots * (slots + 1) / 2
  llm = lambda before: 2 * body_weights(lm) * slots + 4 * width * pairs(before)
  block = lambda channels: 2 * p * (49 * channels + 8 * channels**2)
  latents = c.autoencoder.latent_channels * g.patch_size**2
  encoder = g.encoder_blocks * block(g.width) + 2 * p * g.width * (latents + lm.width)
  decoder = g.decoder_blocks * block(2 * g.width) + 2 * p * g.width * (2 * latents + lm.width)
  halves = (prompt, 1) if guided else (prompt,)
  once = 2 * body_weights(lm) * prompt
  return (
    evaluations * (encoder + sum(llm(before) + decoder for before in halves))
    + once
    + c.autoencoder.decoder_flops(c.latent_size)
  )


def token_bytes(c: LanguageModelConfig, context: int, rows: int, itemsize: int) -> int:
  """Bytes that one decoding step reads: every weight once, and the keys and values of each row."""
  weights = body_weights(c) + c.width * c.vocabulary_size
  cache = 2 * c.layers * c.kv_heads * c.head_width * context * rows
  return itemsize * (weights + cache)
