"""The entry point of lmms-eval's registry (pyproject.toml): the model's name and class path.

Must not import the model: the registry loads this file for every command of lmms-eval, while lmms-eval is only partly
imported.
"""

from typing import Any


def manifest() -> Any:
  """The manifest of the model `jflow`; lmms-eval imports its class on first use."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(model_id="jflow", simple_class_path="jflow.evaluation.lmms.Model")
