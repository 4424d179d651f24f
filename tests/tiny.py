"""One tiny model that the tests share, so that each of its programs is compiled once per session.

16 x 16 pixels, P = 16 patches (K = 17 slots), 2 blocks of width 32, grouped-query attention, closed-form
codec. The parameters are random in every leaf, also in those that start at zero: nothing hides behind a zero.
"""

import functools
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from configs import base
from jflow import sharding
from jflow.batch import READ, TASKS, WRITE, Batch, RowShape
from jflow.config import RunConfig
from jflow.data.examples import Sample
from jflow.data.packing import pack
from jflow.data.tokenizer import Tokenizer
from jflow.generation.flow.writer import Draws
from jflow.inference.pipeline import Pipeline
from jflow.models import build
from jflow.models.config import ModelConfig
from jflow.models.unified import UnifiedModel
from jflow.training import optim, setup
from jflow.training.state import TrainState
from jflow.training.step import make_step

ROOT = pathlib.Path(__file__).parent.parent
TOKENIZER = ROOT / "configs" / "tokenizer"
VOCABULARY = 1024
BOS, EOS, IMAGE = 1, 2, 3  # any ids do: the model knows none of them

DICT = dict(
  language_model=dict(
    kind="llama",
    vocab_size=VOCABULARY,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_epsilon=1e-6,
    rope_theta=10_000.0,
    max_length=128,
  ),
  understanding_encoder=dict(
    image_size=16,
    patch_size=4,
    embed_dim=24,
    mlp_dim=32,
    num_layers=1,
    num_heads=2,
    layer_norm_epsilon=1e-6,
    gelu="erf",
  ),
  generation=dict(kind="flow", channels=16, encoder_blocks=1, decoder_blocks=1, patch_size=2, norm_epsilon=1e-6),
  autoencoder=dict(
    kind="patch_pca",
    latent_channels=4,
    scaling=0.5,
    block_channels=(),
    layers_per_block=0,
    norm_groups=0,
    patch_size=2,
    window=4,
  ),
  objectives=dict(alignment=dict(layer=1, hidden_dim=16)),
  reader="siglip",
)
CONFIG = ModelConfig.from_dict(DICT)
# The same LLM and reader, with a writer of codes.
JANUS = ModelConfig.from_dict(
  DICT
  | dict(
    generation=dict(kind="codes", hidden_dim=40, projector_layers=2),
    autoencoder=dict(
      kind="vq",
      channels=8,
      multipliers=(1, 1, 2),
      blocks_per_level=1,
      latent_channels=8,
      codebook_size=64,
      code_dim=4,
      norm_groups=4,
    ),
    objectives={},
    reader=dict(kind="siglip", start="token", layers=2),
  )
)
SHAPE = RowShape(tokens=96, images=3, image_patches=CONFIG.patches, image_size=CONFIG.image_size, writer="flow")
LOSSES = ("text", "flow", "alignment")


def model(config: ModelConfig = CONFIG, remat: str = "none", unroll: int = 1, attention: str = "xla") -> UnifiedModel:
  """The model in f32."""
  return UnifiedModel(config, jnp.dtype("float32"), remat, unroll, attention)


@functools.cache
def shapes(config: ModelConfig = CONFIG):
  """The nested shapes of the parameters."""
  return sharding.unbox(jax.eval_shape(lambda: build.initial_params(model(config), 0)))


@functools.cache
def params(config: ModelConfig = CONFIG):
  """Nested f32 parameters: each leaf is random, a function of its path."""
  return unflatten_dict({path: jnp.asarray(_leaf(path, x.shape)) for path, x in flatten_dict(shapes(config)).items()})


def _leaf(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
  x = np.random.default_rng(zlib.crc32("/".join(path).encode())).standard_normal(shape).astype(np.float32)
  if path[-1] == "scale" and path[-2] != "response_norm":
    return 1.0 + 0.1 * x
  if path[-1].endswith("kernel"):
    inputs = shape[-4:-1] if len(shape) == 4 else shape[-2:-1]  # a convolution's, or a matrix's
    return x / np.sqrt(49.0 if "depthwise" in path[-1] else float(np.prod(inputs)))
  return 0.5 * x if path[-1] == "embed" else 0.1 * x


def _sample(tokens, learned, starts, kind, rng) -> Sample:
  tokens, learned = np.asarray(tokens, np.int32), np.asarray(learned, bool)
  size = CONFIG.image_size
  return Sample(
    tokens=tokens,
    targets=np.append(tokens[1:], 0).astype(np.int32),
    loss_mask=np.append(learned[1:], False),
    positions=np.arange(len(tokens), dtype=np.int32),
    image_starts=tuple(starts),
    image_kinds=(kind,) * len(starts),
    images=tuple(rng.integers(0, 256, (size, size, 3), np.uint8) for _ in starts),
  )


def _ids(rng: np.random.Generator, count: int) -> list[int]:
  return rng.integers(10, VOCABULARY, count).tolist()


def reading(seed: int, question: int = 4, answer: int = 3) -> Sample:
  """BOS <image> QUESTION ANSWER EOS, the answer learned."""
  rng = np.random.default_rng(seed)
  tokens = [BOS] + [IMAGE] * (2 + CONFIG.patches) + _ids(rng, question + answer) + [EOS]
  learned = [i >= len(tokens) - answer - 1 for i in range(len(tokens))]
  return _sample(tokens, learned, [1], READ, rng)


def writing(seed: int, prompt: int = 5) -> Sample:
  """BOS PROMPT T z*P."""
  rng = np.random.default_rng(seed)
  tokens = [BOS] + _ids(rng, prompt) + [IMAGE] * (1 + CONFIG.patches)
  return _sample(tokens, [False] * len(tokens), [1 + prompt], WRITE, rng)


def text(seed: int, length: int = 12) -> Sample:
  """BOS DOCUMENT EOS, all learned."""
  rng = np.random.default_rng(seed)
  return _sample([BOS] + _ids(rng, length) + [EOS], [True] * (length + 2), [], READ, rng)


def batch(*rows: list[Sample], shape: RowShape = SHAPE) -> Batch:
  """Packs each list of samples into a row."""
  return jax.tree.map(lambda *x: np.stack(x), *[pack(row, shape) for row in rows])


def mixed() -> Batch:
  """Four rows: all three kinds packed together, then each of them."""
  return batch(
    [reading(1), writing(2), text(3)],
    [reading(4, 7, 2), reading(5)],
    [writing(6), writing(7, 9)],
    [text(8, 40), text(9)],
  )


def draws(rows: int, seed: int = 0) -> Draws:
  """Times, noise and posterior noise for rows of SHAPE."""
  rng = np.random.default_rng(seed)
  shape = (rows, SHAPE.images, CONFIG.latent_size, CONFIG.latent_size, CONFIG.autoencoder.latent_channels)
  return Draws(
    time=rng.uniform(0.05, 0.95, shape[:2]).astype(np.float32),
    noise=rng.standard_normal(shape).astype(np.float32),
    posterior=rng.standard_normal(shape).astype(np.float32),
  )


@functools.partial(jax.jit, static_argnames=("model", "wanted"))
def loss_sums(model, params, batch, draws, wanted=LOSSES):
  """The loss sums of a batch."""
  return model.apply({"params": params}, batch, draws, wanted, method="losses")


@functools.partial(jax.jit, static_argnames=("model",))
def loss_and_gradient(model, params, batch, draws):
  """The sum of all three loss sums and its gradient."""
  total = lambda p: sum(model.apply({"params": p}, batch, draws, LOSSES, method="losses").values())
  return jax.value_and_grad(total)(params)


MUON = ("language_model/layers", "generation_(encoder|decoder)/blocks_.*")  # as configs/base.py has it for :shapes


def values() -> dict:
  """The plain values of a whole config: those of configs/base.py where a test has no reason for others."""
  c = base.base("tiny")
  c.size, c.model = "", ConfigDict(CONFIG.to_dict())
  c.train.update(steps=4, batch_size=4, seed=3, ema=0.9, max_skipped=3, spike_window=8)
  c.train.watchdog_seconds = 0.0
  c.world.fit_images = 20
  c.optimizer.update(learning_rate=1e-2, warmup_steps=2)
  c.optimizer.trained = ("language_model", "generation_.*", "alignment_head", "understanding_(projector|start)")
  c.optimizer.frozen = ("understanding_encoder", "vae")
  c.data.update(row_tokens=SHAPE.tokens, row_images=SHAPE.images, sources=dict.fromkeys(TASKS, ()))
  c.compute.compilation_cache = ""
  c.distributed.update(start_seconds=60, heartbeat_seconds=10)
  c.checkpoint.update(interval=2, keep=2)
  c.log.sample_prompts, c.sampling = ("a red ring",), dict(steps=2)
  return c.to_dict()


@functools.cache
def _default() -> RunConfig:
  return RunConfig.from_dict(values(), ModelConfig.from_dict)


def configuration(**sections) -> RunConfig:
  """A whole config for this model; keywords replace fields of a section."""
  return _default().replace(**sections)


def janus(**sections) -> RunConfig:
  """A whole config for `JANUS`, which trains LLM, aligners and head; keywords replace fields of a section."""
  trained = ("language_model", "generation_.*", "understanding_projector")
  fields = dict(
    optimizer=dict(trained=trained, frozen=("understanding_encoder", "vq")),
    objective=dict(weights=dict(text=1.0, codes=1.0), draws={}),
    sampling={},
  )
  for name, section in sections.items():
    fields[name] = fields.get(name, {}) | section
  return configuration(**fields).replace(model=JANUS)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
  """The likeness of images in [-1, 1], in dB."""
  return float(10 * np.log10(4 / np.mean((np.clip(a, -1, 1) - b) ** 2)))


def adam(state: TrainState):
  """The state of Adam in that of the optimizer: `mu`, `nu`."""
  is_adam = lambda x: hasattr(x, "mu")
  return next(filter(is_adam, jax.tree.leaves(state.optimizer, is_leaf=is_adam)))


def pipeline() -> Pipeline:
  """The model, ready to answer and to write, as a checkpoint of it loads."""
  return Pipeline(model(), params(), Tokenizer.load(str(TOKENIZER)), "plain")


def training(config: RunConfig):
  """(the state of step 0 of a config's model, with `params`; its compiled step)."""
  model, optimizer = setup.build(config, jax.devices()[0]), optim.make_optimizer(config.optimizer)
  parts = optim.partition(params(model.config), config.optimizer.trained, config.optimizer.frozen)
  return TrainState.create(*parts, optimizer), jax.jit(make_step(model, optimizer, config))
