"""The PyTorch side of `bench --versus` against jflow: both do the same work."""

import pathlib

import numpy as np
import pytest

REASON = "PyTorch is not installed: JFLOW_PARITY=1 bash launch/test.sh installs it"
for package in ("torch", "transformers", "diffusers"):
  pytest.importorskip(package, reason=REASON)

from jflow.perf import inference

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def sides():
  """The tiny model of configs/, random, in both frameworks."""
  args = inference.Settings(
    config="stage3:tiny", dtype="float32", versus=ROOT / "tests" / "parity" / "torch_worker.py", repeats=1
  )
  pipeline = inference.open_pipeline(args)
  with inference.torch_side(args, pipeline) as torch:
    yield pipeline, torch


def test_generation_prompts_of_two_lengths(sides):
  """The published loop over padded prompts, step by step, ends where one program with kept keys ends."""
  pipeline, torch = sides
  rng = np.random.default_rng(0)
  tokens = rng.integers(10, 500, (2, 32)).astype(np.int32)
  tokens[:, 0], lengths = pipeline.tokenizer.bos, np.asarray([7, 12], np.int32)
  c = pipeline.model.config
  noise = rng.standard_normal((2, c.latent_size, c.latent_size, c.autoencoder.latent_channels)).astype(np.float32)
  ours = pipeline.sampler.sample(tokens, lengths, noise, pipeline.settings(steps=4, guidance=2.0))
  torch.load(tokens=tokens[:, :12], lengths=lengths, noise=noise.transpose(0, 3, 1, 2))
  z = torch.result(do="solve", steps=4, guidance=2.0)
  torch.load(latents=z)
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
  torch.load(tokens=tokens, lengths=np.asarray([40, 29]), starts=np.asarray([[1], [4]]), pixels=pixels)
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
