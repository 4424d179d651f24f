"""FLOPs by formula: those of published counters, and of XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from configs import models
from jflow.models import flops as model_flops
from jflow.models.config import ModelConfig
from jflow.perf import hlo

PAPER = ModelConfig.from_dict(models.janusflow_384())


STAGE_2 = ("language_model", "generation_encoder", "understanding_projector", "alignment_head")


def per_token(tokens, loss, read, written):
  work = model_flops.Work(tokens, tokens * (tokens + 1) / 2, loss, read, written)
  return sum(model_flops.step(PAPER, STAGE_2, work, ("text", "flow", "alignment"), False).values()) / tokens / 1e9


def test_stage_2_at_384_needs_9_34_gigaflops_per_token():
  """80 : 14 : 6 rows of written images (650 tokens), read ones (776, 200 learned) and text."""
  parts = per_token(650, 0, 0, 1), per_token(776, 200, 1, 0), per_token(4096, 4096, 0, 0)
  np.testing.assert_allclose(np.dot((0.80, 0.14, 0.06), parts), 9.34, atol=0.01)


def test_the_formula_of_the_encoders_is_that_of_published_counters():
  """SigLIP-L/16 and the encoder of SDXL's VAE at 384, counted by PyTorch's FlopCounterMode."""
  np.testing.assert_allclose(model_flops.siglip(PAPER) / 1e9, 383.9, rtol=0.01)
  np.testing.assert_allclose(PAPER.autoencoder.encoder_flops(384) / 1e9, 619.7, rtol=0.001)


def test_the_formula_agrees_with_what_xla_counts():
  """Forward and backward of an unrolled language model, whose full square of attention XLA counts."""
  wide = dict(embed_dim=256, mlp_dim=704, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=64)
  config = ModelConfig.from_dict({**tiny.DICT, "language_model": tiny.DICT["language_model"] | wide})
  model, s = tiny.model(config, unroll=2), tiny.SHAPE.tokens

  def loss(p, x):
    positions = jnp.broadcast_to(jnp.arange(s), (2, s))
    out = model.apply({"params": p}, x, positions, jnp.ones_like(positions), method="backbone")
    return jnp.sum(jnp.square(model.apply({"params": p}, out.hidden, method="logits")))

  x = jax.ShapeDtypeStruct((2, s, config.language_model.embed_dim), jnp.float32)
  lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(tiny.shapes(config), x)
  work = model_flops.Work(2 * s, 2 * s * s, 2 * s, 0, 0)
  parts = model_flops.step(config, ("language_model",), work, ("text",), False)
  np.testing.assert_allclose(lowered.cost_analysis()["flops"], parts["llm"] + parts["head"], rtol=0.05)
  counts = hlo.count(lowered.compile().as_text(), {"data": 1}, lambda loop: 0)
  np.testing.assert_allclose(counts.flops, parts["llm"] + parts["head"], rtol=0.001)
