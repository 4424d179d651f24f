"""The PyTorch side of `bench --versus` against jflow: both do the same work."""

import pathlib

import numpy as np
import pytest

REASON = "PyTorch is not installed: JFLOW_PARITY=1 bash launch/test.sh installs it"
for package in ("torch", "transformers", "diffusers"):
  pytest.importorskip(package, reason=REASON)

import janus
from refusals import refused

from configs import models
from jflow.generation.codes.sampler import CodesSampler
from jflow.generation.codes.settings import Settings as CodesSettings
from jflow.generation.flow.settings import Settings as FlowSettings
from jflow.models.config import ModelConfig
from jflow.perf import inference, versus

WORKER = pathlib.Path(__file__).parent / "torch_worker.py"
FLOW = ModelConfig.from_dict(models.mid())


@pytest.fixture(scope="module")
def sides():
  """The tiny model of configs/, random, in both frameworks."""
  args = inference.Settings(config="stage3:tiny", dtype="float32", versus=WORKER, repeats=1)
  source = inference.open_source(args)
  with versus.torch_side(args, versus.work_of(args, source.config), source, "float32") as torch:
    yield source.pipeline(), torch


def test_generation_prompts_of_two_lengths(sides):
  """The published loop over padded prompts, step by step, ends where one program with kept keys ends."""
  pipeline, torch = sides
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 500, (2, 32)).astype(np.int32)
  tokens[:, 0], lengths = pipeline.tokenizer.bos, np.asarray([7, 12], np.int32)
  c = pipeline.model.config
  noise = rng.standard_normal((2, c.latent_size, c.latent_size, c.autoencoder.latent_channels)).astype(np.float32)
  ours = pipeline.sampler.sample(tokens, lengths, noise, pipeline.settings(steps=4, guidance=2.0))
  torch.give(tokens=tokens[:, :12], lengths=lengths, noise=noise.transpose(0, 3, 1, 2))
  z = torch.result(do="solve", steps=4, guidance=2.0)
  torch.give(written=z)
  theirs = torch.result(do="decode").transpose(0, 2, 3, 1)
  np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


def test_answers_about_pictures_of_two_lengths(sides):
  from jflow.inference.decoding import Decoder, Request

  pipeline, torch = sides
  c = pipeline.model.config
  rng = np.random.default_rng(1)
  tokens = rng.integers(10, 500, (2, 40)).astype(np.int32)
  images = rng.integers(0, 256, (2, c.image_size, c.image_size, 3), np.uint8)
  pixels = images.astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1
  torch.give(tokens=tokens, lengths=np.asarray([40, 29]), starts=np.asarray([[1], [4]]), pixels=pixels)
  theirs = torch.result(do="answer", count=12)
  decoder = Decoder(pipeline, 2, 64, ignore_end=True)
  out = {}
  for i, (length, start) in enumerate(((40, 1), (29, 4))):
    slot = decoder.admit(Request(tokens[i, :length], (start,), images[i : i + 1], 12, 0.0, 1.0, 0))
    out[slot] = (i, [])
  while decoder.busy:
    for slot, new, _ in decoder.step(5):
      out[slot][1].extend(new)
  for i, made in out.values():
    assert made == theirs[i].tolist()


def test_codes_of_transformers_generate_and_their_pixels():
  """The small Janus of the golden files, greedy with guidance, through the exported directory."""
  settings = CodesSettings(guidance=5.0, temperature=0.0)
  source = inference.Source(janus.CONFIG, janus.params, lambda: None)
  args = inference.Settings(versus=WORKER)
  rng, n = np.random.default_rng(0), 9
  tokens, lengths = rng.integers(10, 250, (2, 32)).astype(np.int32), np.full(2, n, np.int32)
  tokens[:, 0] = janus.Ids.bos
  sampler = CodesSampler(*janus.inference(), janus.Ids)
  codes = sampler.write(tokens, lengths, sampler.start([0, 1]), settings)
  work = versus.work_of(args, source.config, settings)
  with versus.torch_side(args, work, source, "float32") as torch:
    torch.give(written=np.asarray(codes), **work.inputs(tokens[:, :n], None, janus.Ids))
    np.testing.assert_array_equal(codes, torch.result(**work.request(settings)))
    theirs = torch.result(do="decode")
  np.testing.assert_allclose(versus.channels_first(sampler.decode(codes)), theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
  "config, settings, named",
  [
    (janus.CONFIG, CodesSettings(guidance=1.0, temperature=0.0), "guidance=1"),
    (janus.CONFIG, CodesSettings(temperature=1.0), "temperature=1"),
    (FLOW, FlowSettings(solver="heun"), "solver=heun"),
    (FLOW, FlowSettings(shift=2.0), "shift=2"),
  ],
)
def test_what_pytorch_does_not_compute_here_is_refused(config, settings, named):
  with refused(named):
    versus.work_of(inference.Settings(versus=WORKER), config, settings)
