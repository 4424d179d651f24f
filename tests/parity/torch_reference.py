"""JanusFlow's inference in PyTorch, as the published loop does it: what `bench --versus` and tests compare with.

The LLM and SigLIP are those of transformers, the VAE that of diffusers; the ConvNeXt encoder and decoder around the
LLM stand here, written from the paper and the tensors' names and shapes.
"""

import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class RMSNorm(nn.Module):
  def __init__(self, width: int, epsilon: float):
    super().__init__()
    self.weight, self.epsilon = nn.Parameter(torch.ones(width)), epsilon

  def forward(self, x):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.epsilon)
    return (self.weight * y).to(x.dtype)


class ResponseNorm(nn.Module):
  """Global response norm over [B, H, W, C]."""

  def __init__(self, width: int, epsilon: float):
    super().__init__()
    self.weight, self.bias = (
      nn.Parameter(torch.zeros(1, 1, 1, width)),
      nn.Parameter(torch.zeros(1, 1, 1, width)),
    )
    self.epsilon = epsilon

  def forward(self, x):
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    return (self.weight * (norm / (norm.mean(-1, keepdim=True) + self.epsilon)) + 1) * x + self.bias


class Block(nn.Module):
  def __init__(self, width: int, condition: int, epsilon: float):
    super().__init__()
    self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
    self.norm = RMSNorm(width, epsilon)
    self.channelwise_linear_1 = nn.Linear(width, 4 * width)
    self.channelwise_norm = ResponseNorm(4 * width, epsilon)
    self.channelwise_linear_2 = nn.Linear(4 * width, width)
    self.cond_embeds_mapper = nn.Linear(condition, 2 * width)

  def forward(self, x, condition):
    y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
    y = self.channelwise_linear_2(self.channelwise_norm(F.gelu(self.channelwise_linear_1(y))))
    x = x + y.permute(0, 3, 1, 2)
    scale, shift = self.cond_embeds_mapper(F.silu(condition)).chunk(2, dim=-1)
    return x * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


class Encoder(nn.Module):
  """g_enc: latents [B, C, h, w] and 1000 t [B] -> (features [B, C', h/2, w/2], time embedding [B, D])."""

  def __init__(self, c: dict):
    super().__init__()
    g, width = c["generation"], c["language_model"]["embed_dim"]
    self.channels = g["channels"]
    self.time_embed = nn.ModuleDict(dict(linear_1=nn.Linear(g["channels"], width), linear_2=nn.Linear(width, width)))
    self.in_conv = nn.Conv2d(c["autoencoder"]["latent_channels"], g["channels"], g["patch_size"], g["patch_size"])
    blocks = [Block(g["channels"], width, g["norm_epsilon"]) for _ in range(g["encoder_blocks"])]
    self.mid_block = nn.ModuleDict({"res_blocks": nn.ModuleList(blocks)})

  def forward(self, z, time):
    half = self.channels // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=z.device) / half)
    angle = time.float()[:, None] * frequency
    sinusoids = torch.cat([angle.cos(), angle.sin()], dim=-1).to(z.dtype)
    embedding = self.time_embed["linear_2"](F.silu(self.time_embed["linear_1"](sinusoids)))
    x = self.in_conv(z)
    for block in self.mid_block["res_blocks"]:
      x = block(x, embedding)
    return x, embedding


class Decoder(nn.Module):
  """g_dec: [B, C', H, W] of the LLM, the encoder's skip and the time embedding -> velocity [B, C, h, w]."""

  def __init__(self, c: dict):
    super().__init__()
    g, width = c["generation"], c["language_model"]["embed_dim"]
    self.patch = g["patch_size"]
    self.input_norm = RMSNorm(g["channels"], g["norm_epsilon"])
    blocks = [Block(2 * g["channels"], width, g["norm_epsilon"]) for _ in range(g["decoder_blocks"])]
    self.mid_block = nn.ModuleDict({"res_blocks": nn.ModuleList(blocks)})
    out = c["autoencoder"]["latent_channels"] * g["patch_size"] ** 2
    unpatch = nn.ModuleDict(
      dict(norm=RMSNorm(2 * g["channels"], g["norm_epsilon"]), unpatch_conv=nn.Conv2d(2 * g["channels"], out, 1))
    )
    self.out_convs = nn.ModuleList([unpatch])

  def forward(self, x_BPC, skip, embedding):
    b, c, h, w = skip.shape
    x = self.input_norm(x_BPC).transpose(1, 2).reshape(b, c, h, w)
    x = torch.cat([x, skip], dim=1)
    for block in self.mid_block["res_blocks"]:
      x = block(x, embedding)
    last = self.out_convs[0]
    x = last["norm"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.pixel_shuffle(last["unpatch_conv"](x), self.patch)


class Generation(nn.Module):
  """The parts around the LLM when it generates images, with the published names."""

  def __init__(self, c: dict):
    super().__init__()
    width, g, lm = c["language_model"]["embed_dim"], c["generation"]["channels"], c["language_model"]
    self.vision_gen_enc_model, self.vision_gen_dec_model = Encoder(c), Decoder(c)
    self.vision_gen_enc_aligner = nn.Linear(g, width)
    self.vision_gen_dec_aligner_norm = RMSNorm(width, lm["rms_norm_epsilon"])
    self.vision_gen_dec_aligner = nn.Linear(width, g)
    self.vision_und_enc_aligner = nn.Linear(c["understanding_encoder"]["embed_dim"], width)
    self.beg_of_und_embed = nn.Parameter(torch.zeros(1, width))


class Reference:
  """All parts of a model that `bench` wrote to a directory: config.json and one folder per part."""

  def __init__(self, directory: pathlib.Path, device: str, dtype: torch.dtype):
    import transformers
    from diffusers import AutoencoderKL

    self.config = c = json.loads((directory / "config.json").read_text())
    self.device, self.dtype = device, dtype
    lm, vision, vae = c["language_model"], c["understanding_encoder"], c["autoencoder"]
    llama = transformers.LlamaConfig(
      vocab_size=lm["vocab_size"],
      hidden_size=lm["embed_dim"],
      intermediate_size=lm["mlp_dim"],
      num_hidden_layers=lm["num_layers"],
      num_attention_heads=lm["num_heads"],
      num_key_value_heads=lm["num_kv_heads"],
      head_dim=lm["head_dim"],
      rms_norm_eps=lm["rms_norm_epsilon"],
      max_position_embeddings=lm["max_length"],
      rope_parameters={"rope_type": "default", "rope_theta": lm["rope_theta"]},
      tie_word_embeddings=False,
      bos_token_id=None,
      eos_token_id=None,
      pad_token_id=None,
      attn_implementation="sdpa",
    )
    siglip = transformers.SiglipVisionConfig(
      hidden_size=vision["embed_dim"],
      intermediate_size=vision["mlp_dim"],
      num_hidden_layers=vision["num_layers"],
      num_attention_heads=vision["num_heads"],
      image_size=vision["image_size"],
      patch_size=vision["patch_size"],
      layer_norm_eps=vision["layer_norm_epsilon"],
      attn_implementation="sdpa",
      hidden_act="gelu" if vision["gelu"] == "erf" else "gelu_pytorch_tanh",
    )
    self.llm = self._load(transformers.LlamaForCausalLM(llama), directory / "llm")
    self.siglip = self._load(transformers.SiglipVisionModel(siglip), directory / "siglip")
    self.generation = self._load(Generation(c), directory / "generation")
    blocks = len(vae["block_channels"])
    vae = AutoencoderKL(
      block_out_channels=vae["block_channels"],
      latent_channels=vae["latent_channels"],
      layers_per_block=vae["layers_per_block"],
      norm_num_groups=vae["norm_groups"],
      down_block_types=("DownEncoderBlock2D",) * blocks,
      up_block_types=("UpDecoderBlock2D",) * blocks,
      sample_size=vision["image_size"],
    )
    self.vae = self._load(vae, directory / "vae").to(memory_format=torch.channels_last)

  def _load(self, module: nn.Module, directory: pathlib.Path) -> nn.Module:
    values = {name: x for file in directory.glob("*.safetensors") for name, x in load_file(file).items()}
    missing, unexpected = module.load_state_dict(values, strict=False)
    assert not missing and not unexpected, (directory, missing[:3], unexpected[:3])
    return module.to(self.device, self.dtype).eval()

  @torch.inference_mode()
  def solve(self, prompts: torch.Tensor, lengths: list[int], z: torch.Tensor, steps: int, guidance: float):
    """The published loop: each step runs prompt, time and patches of both halves through the LLM.

    Args:
      prompts: int64[N, S], BOS first, padded on the left here and at no cost elsewhere.
      lengths: true lengths.
      z: [N, C, h, w] at time 0.
    """
    n, s = prompts.shape
    tokens = torch.zeros_like(prompts)
    mask = torch.ones(2 * n, s + 1 + self.config_patches, dtype=torch.long, device=self.device)
    for i, length in enumerate(lengths):  # left padding: the patches stand at the same slots in every row
      tokens[i, s - length :] = prompts[i, :length]
      mask[i, : s - length] = 0
      mask[n + i, :s] = 0
      mask[n + i, s - length] = 1
    offset = torch.tensor([s - length for length in lengths], device=self.device).repeat(2)[:, None]
    positions = (torch.arange(mask.shape[1], device=self.device)[None] - offset).clamp(min=0)
    embeds = self.llm.get_input_embeddings()(tokens).repeat(2, 1, 1)
    g = self.generation
    for k in range(steps):
      time = torch.full((2 * n,), 1000.0 * k / steps, device=self.device)
      x, embedding = g.vision_gen_enc_model(torch.cat([z, z]).to(self.dtype), time)
      patches = g.vision_gen_enc_aligner(x.flatten(2).transpose(1, 2))
      inputs = torch.cat([embeds, embedding[:, None], patches], dim=1)
      hidden = self.llm.model(
        inputs_embeds=inputs, attention_mask=mask, position_ids=positions, use_cache=False
      ).last_hidden_state[:, -self.config_patches :]
      hidden = g.vision_gen_dec_aligner(g.vision_gen_dec_aligner_norm(hidden))
      v = g.vision_gen_dec_model(hidden, x, embedding).to(z.dtype)
      z = z + (guidance * v[:n] + (1 - guidance) * v[n:]) / steps
    return z

  @property
  def config_patches(self) -> int:
    c = self.config
    latents = c["understanding_encoder"]["image_size"] // 2 ** (len(c["autoencoder"]["block_channels"]) - 1)
    return (latents // c["generation"]["patch_size"]) ** 2

  @torch.inference_mode()
  def decode(self, z: torch.Tensor) -> torch.Tensor:
    """Scaled latents -> pixels [N, 3, H, W]."""
    z = (z / self.config["autoencoder"]["scaling"]).to(self.dtype, memory_format=torch.channels_last)
    return self.vae.decode(z).sample.float()

  @torch.inference_mode()
  def embed(self, tokens: torch.Tensor, starts: list[list[int]], pixels: torch.Tensor) -> torch.Tensor:
    """Prompts with images, [N, S, D]: `starts` says where the slots of a row's images begin, in order."""
    x = self.llm.get_input_embeddings()(tokens)
    if len(pixels):
      features = self.siglip(pixel_values=pixels.to(self.dtype)).last_hidden_state
      slots = self.generation.vision_und_enc_aligner(features)
      start = self.generation.beg_of_und_embed.expand(len(slots), 1, -1)
      slots, used = torch.cat([start, slots], dim=1), 0
      for i, row in enumerate(starts):
        for at in row:
          x[i, at : at + slots.shape[1]] = slots[used]
          used += 1
    return x

  @torch.inference_mode()
  def answer(self, tokens, lengths: list[int], starts, pixels, count: int) -> torch.Tensor:
    """Greedy tokens int64[N, count] by transformers' generate; prompts are moved to the right as it asks."""
    x = self.embed(tokens, starts, pixels)
    n, s = tokens.shape
    padded, mask = torch.zeros_like(x), torch.zeros(n, s, dtype=torch.long, device=self.device)
    for i, length in enumerate(lengths):
      padded[i, s - length :] = x[i, :length]
      mask[i, s - length :] = 1
    return self.llm.generate(
      inputs_embeds=padded, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
