"""Compares pictures drawn by the SDE of reinforcement learning with those of the ODE, on a model of the built-in world.

  python launch/experiments/marginals.py --checkpoint=world --output=launch/experiments/results/marginals.json

The SDE has the ODE's marginals at every time (jflow/generation/flow/sde.py), so with many steps its pictures must be as far
from the ODE's as the ODE's with other noise are, its floor. Distances are Frechet distances between equal numbers of
pictures of the same prompts, of the features of `evaluate --benchmark=shapes`; strict is the judge's. Five minutes of one core.
"""

import argparse
import json
import pathlib
import sys

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import jflow
from jflow import outputs
from jflow.commit import commit
from jflow.evaluation import distances
from jflow.generation.flow.config import FlowExploration
from jflow.generation.flow.policy import FlowPolicy
from jflow.inference.pipeline import Pipeline, to_image
from jflow.world import features, judge, source

PROMPTS, EACH, GUIDANCE = 120, 4, 3.0
BATCH = 60  # pictures at once
DRAWN = ((200, 0.0), (200, 0.7), (30, 0.0), (30, 0.7), (6, 0.0), (6, 0.7))  # steps, noise


def draw(model: Pipeline, tokens: np.ndarray, lengths: np.ndarray, steps: int, noise: float, seed: int) -> np.ndarray:
  """Pictures by the policy: uint8[I, H, W, 3], each from noise of its own."""
  explored = FlowExploration(steps=steps, noise=noise, window=0, guidance=GUIDANCE, normalised=1)
  policy = FlowPolicy(model.model, explored)

  @jax.jit
  def of(params, tokens, lengths, key):
    latents, _ = policy.sample(params, tokens, lengths, key, group=1)
    return policy.decode(params, latents)

  out = []
  for number, at in enumerate(range(0, len(tokens), BATCH)):
    key = jax.random.fold_in(jax.random.key(seed), number)
    pixels = of(model.params, tokens[at : at + BATCH], lengths[at : at + BATCH], key)
    out += [np.asarray(to_image(x)) for x in np.asarray(pixels)]
  return np.stack(out)


def measured(pictures: np.ndarray, asked: list[dict]) -> dict:
  """Both kinds of features, and the share that the judge accepts."""
  found = [judge.detect(picture) for picture in pictures]
  return {
    "tex": np.stack([features.texture(picture) for picture in pictures]),
    "state": np.stack([features.state(one) for one in found]),
    "strict": float(np.mean([judge.strict(one, about) for one, about in zip(found, asked, strict=True)])),
  }


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--checkpoint", default="world", help="a flow model of the built-in world (default %(default)s)")
  p.add_argument("--output", type=pathlib.Path, required=True)
  args = p.parse_args()
  model = jflow.load(args.checkpoint)
  prompts = [one for one in source.evaluation_prompts("val", PROMPTS, 0) for _ in range(EACH)]
  ids = [model.generation_prompt(text) for text, _ in prompts]
  tokens = np.full((len(ids), max(map(len, ids))), model.tokenizer.pad, np.int32)
  for row, one in zip(tokens, ids):
    row[: len(one)] = one
  lengths = np.asarray([len(one) for one in ids], np.int32)
  asked = [about for _, about in prompts]
  target = measured(draw(model, tokens, lengths, *DRAWN[0], seed=0), asked)
  rows = []
  for steps, noise in DRAWN:
    found = measured(draw(model, tokens, lengths, steps, noise, seed=1), asked)
    row = {"steps": steps, "noise": noise, "strict": round(found["strict"], 4)}
    for kind, least in (("tex", 1e-6), ("state", features.LEAST_STATE)):
      a, b = (distances.normalised(x[kind], target[kind], least) for x in (found, target))
      row[f"FD-{kind}"] = round(distances.frechet(a, b), 3)
    rows.append(row)
    print(json.dumps(row), flush=True)
  body = {"commit": commit(), "checkpoint": args.checkpoint, "guidance": GUIDANCE, "pictures": len(ids)}
  body |= {"target": "the ODE with 200 steps and other noise", "strict of the target": target["strict"], "rows": rows}
  outputs.replace(args.output, json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
  main()
