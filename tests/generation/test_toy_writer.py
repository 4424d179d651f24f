"""A way to write images that jflow does not know: the mean color of every patch, by regression, in this file alone.

It trains packed beside reading and text, and `generate` samples from its checkpoint.
"""

import base64
import dataclasses
import io
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import serving
import tiny
from PIL import Image
from refusals import refused

import jflow
from jflow.cli import evaluate, generate, train
from jflow.data.tokenizer import Tokenizer
from jflow.errors import UserError
from jflow.evaluation import benchmarks
from jflow.evaluation.settings import Settings as EvaluationSettings
from jflow.evaluation.tasks import RoundTrip
from jflow.generation.base import FAMILIES, Family, Written, setting
from jflow.interop import checkpoints
from jflow.models.config import ModelConfig
from jflow.models.layers import Linear, parameter
from jflow.perf import generate as generation_speed
from jflow.training.metrics import read_metrics

COLORS = 3


@dataclasses.dataclass(frozen=True)
class Averages:
  """The section `model.generation`."""

  kind: str
  gain: float

  def check(self, model: Any) -> None:
    if model.autoencoder is not None:
      raise UserError("model.autoencoder must be None for patch averages")


class Layout:
  """BOS PROMPT TAG slot*P, a query in every slot; a dropped prompt leaves BOS."""

  loss_from = 0

  def slots(self, patches: int) -> int:
    return patches

  def sequence(self, prompt: np.ndarray, drop: bool, tokenizer: Any, patches: int) -> Written:
    kept = prompt[:1] if drop else prompt
    tokens = np.concatenate([kept, [tokenizer.generation_start], [tokenizer.image] * patches]).astype(np.int32)
    return Written(tokens, np.arange(len(tokens), dtype=np.int32), len(kept) + 1)


@dataclasses.dataclass(frozen=True)
class Settings:
  brightness: float = setting(1.0, "of the picture", most=10.0)


class AveragesWriter(nn.Module):
  config: ModelConfig
  dtype: Any

  losses_made = ("averages",)
  patches_from = 0

  def setup(self) -> None:
    shape = (self.config.patches, self.config.language_model.embed_dim)
    self.query = parameter(self, "averages_query", nn.initializers.normal(1.0), shape, (None, None))
    self.averages_head = Linear(COLORS, ("embed", None), self.dtype, use_bias=True)

  def draw(self, key, batch, objective):
    return None

  def example_draws(self, batch):
    return None

  def slots(self, count: int) -> jax.Array:
    return jnp.broadcast_to(self.query, (count, *self.query.shape))

  def colors(self, hidden_IPD: jax.Array) -> jax.Array:
    return self.config.generation.gain * self.averages_head(hidden_IPD)

  def write(self, pixels_IHWC, stored, draws):
    side = int(self.config.patches**0.5)
    size = pixels_IHWC.shape[1] // side
    averages = pixels_IHWC.reshape(-1, side, size, side, size, COLORS).mean((2, 4))
    return self.slots(len(pixels_IHWC)), averages.reshape(-1, side * side, COLORS)

  def losses(self, hidden_at, context, written):
    error = jnp.mean(jnp.square(self.colors(hidden_at(0, self.config.patches)) - context), (1, 2))
    return {"averages": jnp.sum(jnp.where(written, error, 0.0))}

  def initialise(self) -> None:
    pass


class AveragesSampler:
  def __init__(self, model, params, tokenizer):
    self.model, self.params = model, params

  def evaluations(self, settings):
    return 1

  def start(self, seeds):
    return np.zeros(len(seeds))

  def given(self, noise, count):
    raise UserError("noise must be left out: patch averages start from none")

  def sample(self, tokens_IS, lengths_I, start, settings, on_step=None):
    side, size = int(self.model.config.patches**0.5), self.model.config.image_size
    pixels = []
    for tokens, length in zip(tokens_IS, lengths_I):
      bound = self.model.bind({"params": self.params})
      prompt = np.append(tokens[:length], TAG)[None]
      x = jnp.concatenate([bound.embed(prompt), bound.writer.slots(1)], axis=1)
      hidden = bound.backbone(x, jnp.arange(x.shape[1])[None], jnp.ones(x.shape[:2], jnp.int32)).hidden
      colors = settings.brightness * np.asarray(bound.writer.colors(hidden[:, len(prompt[0]) :]))
      pixels.append(colors.reshape(side, side, COLORS).repeat(size // side, 0).repeat(size // side, 1))
    return np.stack(pixels)

  def prepare(self, rows, slots, settings, compile=True):
    return True


AVERAGES = Family("averages", Averages, Layout(), Settings, AveragesWriter, AveragesSampler)
# --- what jflow makes of it; the lines above are all that a way to write takes ------------------------------

TAG = Tokenizer.load(str(tiny.TOKENIZER)).generation_start


@pytest.fixture(scope="module", autouse=True)
def registered():
  FAMILIES.register("averages", AVERAGES)
  yield
  FAMILIES.unregister("averages")


CONFIG = """
from configs import stage2


def get_config():
  c = stage2.get_config("tiny")
  c.model.generation = dict(kind="averages", gain=1.0)
  c.model.autoencoder, c.model.objectives = None, {}
  c.objective.weights, c.objective.draws = dict(text=1.0, averages=1.0), {}
  c.optimizer.trained = ("language_model", "averages_.*", "understanding_(projector|start)")
  c.optimizer.frozen, c.optimizer.learning_rate = ("understanding_encoder",), 1e-2
  c.train.steps, c.data.mixture = 25, ((0, (1, 2, 1)),)
  return c
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Of some steps over packed rows of the built-in world."""
  folder = tmp_path_factory.mktemp("averages")
  (folder / "config.py").write_text(CONFIG)
  assert not train.main([f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"])
  return folder / "run"


def test_it_learns_packed_beside_reading_and_text(workdir):
  rows = read_metrics(workdir)
  assert {name for name in rows[0] if name.startswith("loss")} == {"loss", "loss_text", "loss_averages"}
  first, last = (np.mean([row["loss_averages"] for row in some]) for some in (rows[:5], rows[-5:]))
  assert last < 0.7 * first
  assert rows[-1]["loss_text"] < rows[0]["loss_text"]


def test_generate_samples_from_its_checkpoint(workdir, tmp_path):
  flags = [f"--checkpoint={workdir}", "--prompt=a picture of a red circle"]
  assert not generate.main([*flags, f"--output={tmp_path / 'a'}"])
  assert not generate.main([*flags, f"--output={tmp_path / 'b'}", "--brightness=0"])
  picture, gray = (np.asarray(Image.open(tmp_path / name / "0000_00.png"), int) for name in "ab")
  assert picture.shape == (32, 32, 3) and picture.std() > 0 and gray.std() == 0
  assert picture.reshape(4, 8, 4, 8, 3).std((1, 3)).max() == 0  # one color in each of 4 x 4 patches
  with refused("steps=3", "averages", "brightness"):
    generate.main([*flags, f"--output={tmp_path / 'c'}", "--steps=3"])


def test_evaluate_generates_and_sweeps_its_settings(workdir, tmp_path):
  row = {"tag": "colors", "include": [{"class": "cow", "count": 1}], "prompt": "a red cow"}
  (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
  flags = ["--benchmark=geneval", f"--checkpoint={workdir}", f"--data={tmp_path}", "--pictures=1"]
  assert not evaluate.main([*flags, f"--output={tmp_path / 'a'}", "--sweep_brightness=0,1"])
  deviation = {}
  for value, named in ((0, {"brightness": 0.0}), (1, {})):
    folder = tmp_path / f"a/brightness{value}"
    made = json.loads((folder / "settings.json").read_text())
    assert {name: made[name] for name in ("brightness", "steps") if name in made} == named
    deviation[value] = np.asarray(Image.open(folder / "pictures/00000/samples/00000.png")).std()
  assert deviation[0] == 0 < deviation[1]
  with refused("--steps=3", "averages", "brightness"):
    evaluate.main([*flags, f"--output={tmp_path / 'b'}", "--steps=3"])
  assert not (tmp_path / "b").exists()
  world = benchmarks.get("shapes")(EvaluationSettings("shapes", "x", tmp_path, limit=2))
  for config, trips in ((tiny.model().config, 2), (checkpoints.read_config(workdir), 0)):
    world.meet(config)  # there is no ceiling where nothing is encoded
    assert sum(isinstance(task, RoundTrip) for task in world.tasks()) == trips


def test_serve_takes_its_settings_as_fields(workdir):
  with serving.serving(jflow.load(workdir)) as (base, _), serving.client(base) as client:
    ask = lambda **more: client.post("/v1/images/generations", json={"prompt": "a red circle", "n": 2} | more)
    drawn = ask(brightness=0).json()
    assert drawn["brightness"] == 0 and "steps" not in drawn
    for one in drawn["data"]:
      assert np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))).std() == 0
    for field, value in (("brightness", 11), ("brightness", "1"), ("steps", 3)):
      refused = ask(**{field: value})
      assert refused.status_code == 400 and refused.json()["error"]["param"] == field
    assert "averages" in refused.json()["error"]["message"]


def test_bench_times_its_pictures(workdir):
  settings = generation_speed.Settings(checkpoint=str(workdir), repeats=1, batch_size=1, sampling={"brightness": 0.5})
  report = generation_speed.run(settings)
  assert report["pictures"] == 1 and report["brightness"] == 0.5 and report["images_per_second"] > 0


def test_the_next_stage_starts_from_its_checkpoint(workdir, tmp_path):
  flags = [f"--config={workdir.parent / 'config.py'}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=1"]
  assert not train.main([*flags, f"--config.train.init_from={workdir}"])
  assert read_metrics(tmp_path / "run")[0]["loss_averages"] < read_metrics(workdir)[0]["loss_averages"]
