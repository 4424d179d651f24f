"""What all tests share: the root on the path, and one cache of compiled programs for the runs they start."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
  """A directory for `compute.compilation_cache`, so that each program is compiled once."""
  return str(tmp_path_factory.mktemp("compilation_cache"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
  """A checkpoint of the tiny model, as training leaves one."""
  import tiny

  from jflow.data.tokenizer import Tokenizer
  from jflow.training.checkpoint import save_params

  path = tmp_path_factory.mktemp("tiny") / "model"
  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  save_params(path, tiny.params(), config, Tokenizer.load(str(tiny.TOKENIZER)))
  return str(path)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Skips the tests marked `gpu` where jax has none."""
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if marked:
    import jax

    if jax.default_backend() != "gpu":
      for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
