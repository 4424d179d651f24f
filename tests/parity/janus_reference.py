"""Janus's generation of images in PyTorch, all of it transformers': what `bench --versus` and tests compare with."""

import pathlib

import torch
import transformers


class JanusReference:
  """The model that `bench` wrote to the folder `janus` of a directory."""

  def __init__(self, directory: pathlib.Path, device: str, dtype: torch.dtype):
    kind = transformers.JanusForConditionalGeneration
    self.model = kind.from_pretrained(directory / "janus", dtype=dtype, attn_implementation="sdpa").to(device).eval()

  @torch.inference_mode()
  def draw(self, tokens: torch.Tensor, ids: list[int], guidance: float) -> torch.Tensor:
    """The most likely codes int64[N, P] with guidance.

    Args:
      tokens: int64[N, S], prompts of one length with the begin-of-image token.
      ids: those of BOS, begin of image, and padding.
      guidance: w > 1, on logits.
    """
    bos, begin, pad = ids
    config = self.model.generation_config
    config.bos_token_id, config.pad_token_id, config.eos_token_id = bos, pad, None
    config.generation_kwargs = {"boi_token_id": begin}
    mask = torch.ones_like(tokens)
    return self.model.generate(
      tokens, attention_mask=mask, generation_mode="image", do_sample=False, guidance_scale=guidance
    )

  @torch.inference_mode()
  def decode(self, codes: torch.Tensor) -> torch.Tensor:
    """Codes -> pixels [N, 3, H, W]."""
    return self.model.model.vqmodel.decode(codes).float()
