"""What lmms-eval's registry loads by the entry point in pyproject.toml: a name, nothing of jflow's models.

It stands alone because the registry loads it while lmms-eval itself is half imported, for every command of lmms-eval.
"""

from typing import Any


def manifest() -> Any:
  """The model `jflow`; lmms-eval imports its class once it is asked for."""
  from lmms_eval.models.registry_v2 import ModelManifest

  return ModelManifest(model_id="jflow", simple_class_path="jflow.evaluation.lmms.Model")
