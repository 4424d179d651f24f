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
from jflow.inference.pipeline import Pipeline, padded, to_image
from jflow.world import features, judge, source

PROMPTS, EACH, GUIDANCE, NOISE = 120, 4, 3.0, 0.7
BATCH = 60  # pictures at once
STEPS = (100, 30, 10, 6)


def by_ode(model: Pipeline, texts: list[str], steps: int, seed: int) -> np.ndarray:
  """Pictures as `generate` makes them: uint8[I, H, W, 3], each from noise of its own."""
  seeds = [seed * len(texts) + i for i in range(len(texts))]
  images = model.generate(texts, steps=steps, guidance=GUIDANCE, seeds=seeds, batch_size=BATCH)
  return np.stack([np.asarray(image) for image in images])


def by_sde(model: Pipeline, texts: list[str], steps: int, seed: int) -> np.ndarray:
  """Pictures as reinforcement learning draws them: uint8[I, H, W, 3], each from noise of its own."""
  explored = FlowExploration(steps=steps, noise=NOISE, window=0, guidance=GUIDANCE, normalised=1)
  policy = FlowPolicy(model.model, explored)
  ids = [model.generation_prompt(text) for text in texts]
  tokens, lengths = padded(ids, model.tokenizer.pad)

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
  strict = np.mean([judge.strict(one, about) for one, about in zip(found, asked, strict=True)])
  return features.stacked(("tex", "state"), pictures, found) | {"strict": float(strict)}


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--checkpoint", default="world", help="a flow model of the built-in world (default %(default)s)")
  p.add_argument("--output", type=pathlib.Path, required=True)
  args = p.parse_args()
  model = jflow.load(args.checkpoint)
  prompts = [one for one in source.evaluation_prompts("val", PROMPTS, 0) for _ in range(EACH)]
  texts, asked = [text for text, _ in prompts], [about for _, about in prompts]
  target, rows = measured(by_ode(model, texts, STEPS[0], seed=0), asked), []
  for steps in STEPS:
    for name, of in (("ODE", by_ode), ("SDE", by_sde)):
      found = measured(of(model, texts, steps, seed=1), asked)
      row = {"steps": steps, "by": name, "strict": round(found["strict"], 4)}
      for kind, least in (("tex", 1e-6), ("state", features.LEAST_STATE)):
        a, b = (distances.normalised(x[kind], target[kind], least) for x in (found, target))
        row[f"FD-{kind}"] = round(distances.frechet(a, b), 3)
      rows.append(row)
      print(json.dumps(row), flush=True)
  body = {"commit": commit(), "checkpoint": args.checkpoint, "guidance": GUIDANCE, "noise": NOISE}
  body |= {"pictures": len(texts), "target": f"the ODE with {STEPS[0]} steps and other noise", "rows": rows}
  outputs.replace(args.output, json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
  main()
