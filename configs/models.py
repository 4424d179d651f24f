"""The sizes of the models, as plain dicts for the section `model` of a config.

janusflow_384, janusflow_256: the paper's (paper section 4.1, appendix A; sizes of the release where it is silent).
janus_1b, janus_pro_7b: Janus-1.3B, which Janus-Pro-1B equals in all sizes, and Janus-Pro-7B.
tiny, janus_tiny: for tests. shapes, janus_shapes: learn the built-in world in minutes on two cores. quick, janus_quick: at
  a third of the time per picture. janus_world: all kinds of scenes by codes.
mid, janus_mid: the paper's parts at a width where the parts' shares of the time on a CPU are those on an accelerator; for `bench`.
"""


def janusflow_384() -> dict:
  """JanusFlow-1.3B at 384 x 384: 24 x 24 = 576 patches."""
  return dict(
    language_model=dict(  # DeepSeek-LLM "1.3B"
      kind="llama",
      vocab_size=102_400,
      embed_dim=2048,
      mlp_dim=5632,
      num_layers=24,
      num_heads=16,
      num_kv_heads=16,
      head_dim=128,
      rms_norm_epsilon=1e-6,
      rope_theta=10_000.0,
      max_length=4096,
    ),
    understanding_encoder=dict(  # SigLIP-Large-Patch16-384
      image_size=384,
      patch_size=16,
      embed_dim=1024,
      mlp_dim=4096,
      num_layers=24,
      num_heads=16,
      layer_norm_epsilon=1e-6,
      gelu="erf",
    ),
    generation=dict(kind="flow", channels=768, encoder_blocks=2, decoder_blocks=2, patch_size=2, norm_epsilon=1e-6),
    autoencoder=dict(  # SDXL-VAE
      kind="autoencoder_kl",
      latent_channels=4,
      scaling=0.13025,
      block_channels=(128, 256, 512, 512),
      layers_per_block=2,
      norm_groups=32,
      patch_size=0,
      window=0,
    ),
    objectives=dict(alignment=dict(layer=6, hidden_dim=2048)),
    reader=dict(kind="siglip", start="learned", layers=1),
  )


def janusflow_256() -> dict:
  """JanusFlow at 256 x 256 (paper appendix A): SigLIP-Large-Patch16-256, 16 x 16 = 256 patches."""
  model = janusflow_384()
  model["understanding_encoder"]["image_size"] = 256
  return model


def tiny() -> dict:
  """A tiny JanusFlow with every part of the full one, 32 x 32 pixels, 16 patches."""
  return dict(
    language_model=dict(
      kind="llama",
      vocab_size=1024,
      embed_dim=64,
      mlp_dim=176,
      num_layers=4,
      num_heads=4,
      num_kv_heads=2,
      head_dim=16,
      rms_norm_epsilon=1e-6,
      rope_theta=10_000.0,
      max_length=512,
    ),
    understanding_encoder=dict(
      image_size=32,
      patch_size=8,
      embed_dim=48,
      mlp_dim=96,
      num_layers=2,
      num_heads=4,
      layer_norm_epsilon=1e-6,
      gelu="erf",
    ),
    generation=dict(kind="flow", channels=32, encoder_blocks=2, decoder_blocks=2, patch_size=2, norm_epsilon=1e-6),
    autoencoder=dict(
      kind="autoencoder_kl",
      latent_channels=4,
      scaling=1.0,
      block_channels=(8, 16, 16),
      layers_per_block=1,
      norm_groups=4,
      patch_size=0,
      window=0,
    ),
    objectives=dict(alignment=dict(layer=2, hidden_dim=64)),
    reader=dict(kind="siglip", start="learned", layers=1),
  )


def shapes() -> dict:
  """The model of the built-in world: 48 x 48 pixels, 64 patches, latents of a closed-form codec.

  48 pixels are the least that the judge accepts. A patch is one latent of 12 channels, which a small model learns to
  denoise from far fewer pictures than 2 x 2 latents of 8 channels.
  """
  return dict(
    language_model=dict(
      kind="llama",
      vocab_size=1024,
      embed_dim=96,
      mlp_dim=256,
      num_layers=4,
      num_heads=3,
      num_kv_heads=3,
      head_dim=32,
      rms_norm_epsilon=1e-6,
      rope_theta=10_000.0,
      max_length=512,
    ),
    understanding_encoder=dict(
      image_size=48,
      patch_size=6,
      embed_dim=96,
      mlp_dim=256,
      num_layers=3,
      num_heads=4,
      layer_norm_epsilon=1e-6,
      gelu="erf",
    ),
    generation=dict(kind="flow", channels=96, encoder_blocks=2, decoder_blocks=2, patch_size=1, norm_epsilon=1e-6),
    autoencoder=dict(
      kind="patch_pca",
      latent_channels=12,
      scaling=1.0,
      block_channels=(),
      layers_per_block=0,
      norm_groups=0,
      patch_size=6,
      window=6,
    ),
    objectives=dict(alignment=dict(layer=2, hidden_dim=96)),
    reader=dict(kind="siglip", start="learned", layers=1),
  )


def quick() -> dict:
  """`shapes` with 16 patches of 12 x 12 pixels in place of 64: a third of the time per picture.

  The judge accepts all of 75 true pictures of a large object after this codec, and 0.987 of all kinds.
  """
  model = shapes()
  model["understanding_encoder"]["patch_size"] = 12
  model["generation"]["channels"] = 64
  model["autoencoder"] |= dict(latent_channels=32, patch_size=12, window=12)
  return model


def mid() -> dict:
  """A mid-size model: 192 x 192 pixels, 144 patches, an LLM of 57M parameters without its embedding and head."""
  return dict(
    language_model=dict(
      kind="llama",
      vocab_size=16_384,
      embed_dim=768,
      mlp_dim=2048,
      num_layers=8,
      num_heads=12,
      num_kv_heads=12,
      head_dim=64,
      rms_norm_epsilon=1e-6,
      rope_theta=10_000.0,
      max_length=1024,
    ),
    understanding_encoder=dict(
      image_size=192,
      patch_size=16,
      embed_dim=384,
      mlp_dim=1536,
      num_layers=6,
      num_heads=6,
      layer_norm_epsilon=1e-6,
      gelu="erf",
    ),
    generation=dict(kind="flow", channels=256, encoder_blocks=2, decoder_blocks=2, patch_size=2, norm_epsilon=1e-6),
    autoencoder=dict(
      kind="autoencoder_kl",
      latent_channels=4,
      scaling=0.13025,
      block_channels=(64, 128, 256, 256),
      layers_per_block=2,
      norm_groups=32,
      patch_size=0,
      window=0,
    ),
    objectives=dict(alignment=dict(layer=2, hidden_dim=768)),
    reader=dict(kind="siglip", start="learned", layers=1),
  )


def janus_mid() -> dict:
  """A mid-size Janus: the LLM and SigLIP of `mid`, 144 codes of a VQ of half of VQ-16's channels."""
  model, whole = mid(), janus_1b()
  return whole | dict(
    language_model=model["language_model"],
    understanding_encoder=model["understanding_encoder"],
    generation=whole["generation"] | dict(hidden_dim=768),
    autoencoder=whole["autoencoder"] | dict(channels=64),
  )


def janus_1b() -> dict:
  """Janus-1.3B and Janus-Pro-1B: the LLM and SigLIP of JanusFlow, MLP aligners, 576 codes of VQ-16."""
  model = janusflow_384()
  model["language_model"]["max_length"] = 16_384  # of config.json; the trained context is 4,096
  return model | dict(
    generation=dict(kind="codes", hidden_dim=2048, projector_layers=2),
    autoencoder=dict(  # LlamaGen's VQ-16
      kind="vq",
      channels=128,
      multipliers=(1, 1, 2, 2, 4),
      blocks_per_level=2,
      latent_channels=256,
      codebook_size=16_384,
      code_dim=8,
      norm_groups=32,
    ),
    objectives={},
    reader=dict(kind="siglip", start="token", layers=2),
  )


def janus_pro_7b() -> dict:
  """Janus-Pro-7B: DeepSeek-LLM 7B."""
  model = janus_1b()
  model["language_model"] |= dict(embed_dim=4096, mlp_dim=11_008, num_layers=30, num_heads=32, num_kv_heads=32)
  model["generation"]["hidden_dim"] = 4096
  return model


def janus_tiny() -> dict:
  """A tiny Janus with every part of the full one, 32 x 32 pixels, 16 codes."""
  return tiny() | dict(
    generation=dict(kind="codes", hidden_dim=96, projector_layers=2),
    autoencoder=dict(
      kind="vq",
      channels=8,
      multipliers=(1, 1, 2, 2),
      blocks_per_level=1,
      latent_channels=16,
      codebook_size=128,
      code_dim=8,
      norm_groups=4,
    ),
    objectives={},
    reader=dict(kind="siglip", start="token", layers=2),
  )


def janus_shapes() -> dict:
  """`shapes` with codes: 64 of 1,024 patches of 6 x 6 pixels.

  The judge accepts 0.947 of all kinds of true pictures after this tokenizer, fitted to 1,500 of them (512 patches:
  0.887; without a tokenizer: 0.987).
  """
  return shapes() | dict(
    generation=dict(kind="codes", hidden_dim=192, projector_layers=2),
    autoencoder=dict(kind="patch_codes", codebook_size=1024, code_dim=16, patch_size=6),
    objectives={},
    reader=dict(kind="siglip", start="token", layers=2),
  )


def janus_world() -> dict:
  """`janus_shapes` with 2,048 patches in place of 1,024.

  The judge accepts 0.968 of 400 true pictures of one or two kinds of objects after this tokenizer, fitted to 4,000
  others, and 0.946 of those of held-out combinations (1,024 patches, of the same pictures: 0.934 and 0.935).
  """
  model = janus_shapes()
  model["autoencoder"]["codebook_size"] = 2048
  return model


def janus_quick() -> dict:
  """`quick` with codes: 16 of 4,096 patches of 12 x 12 pixels.

  The judge accepts 0.98 of 150 true pictures of a large object after this tokenizer, fitted to 6,000 of them (1,024
  patches: 0.78; without a tokenizer: all).
  """
  codes = janus_shapes()
  return quick() | dict(
    generation=codes["generation"],
    autoencoder=dict(kind="patch_codes", codebook_size=4096, code_dim=32, patch_size=12),
    objectives={},
    reader=codes["reader"],
  )
