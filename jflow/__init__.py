"""jflow: JanusFlow in JAX and Flax. One LLM that reads images and generates images by rectified flow.

import jflow
model = jflow.load("quickstart/stage3")
model.generate(["a picture of a red circle"], steps=30, guidance=2.0)[0].save("circle.png")
model.understand("What color is the circle?", ["circle.png"])
"""

from typing import Any

__all__ = ["load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
  """Imports jax only once a model is loaded, so that `--help` answers at once."""
  if name == "load":
    from jflow.inference.loading import load

    return load
  raise AttributeError(f"module 'jflow' has no attribute {name!r}")
