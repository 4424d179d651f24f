"""The lanes of the suite, the root on the path, one cache of compiled programs for all tests and their processes."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

# Less time to compile, the same program in every process.
QUICK = "--xla_backend_optimization_level=0"

# Files of laws, whole: one process, no server, seconds each. Their tests are `fast`.
FAST = {
  "attention",
  "autoencoders",
  "codec",
  "conversations",
  "decoding",
  "examples",
  "flow",
  "generate",
  "generation",
  "golden",
  "head_loss",
  "importers_llava",
  "importers_text",
  "janusflow",
  "kl",
  "llm",
  "losses",
  "mixture",
  "optim",
  "packing",
  "questions",
  "scenes",
  "scorers",
  "setup",
  "siglip",
  "source",
  "speed",
  "spikes",
  "step",
  "tables",
  "tokenizer",
}

# Files that start other processes. Their tests are `process`.
PROCESS = {
  "bench_inference",
  "bench_train",
  "commands",
  "compile",
  "design",
  "distributed",
  "evaluate",
  "from_raw_data",
  "launch",
  "lmms",
  "mesh",
  "plans",
  "prepare",
  "train",
  "workdir",
}


# What jax and the processes that tests start read from the environment, unless it is set. `pytest --cache-clear`
# empties the cache.
os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "d" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


@pytest.fixture(scope="session")
def compilation_cache() -> str:
  """The directory for `compute.compilation_cache`, so that each program is compiled once."""
  return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
  """A checkpoint of the tiny model, as training leaves one."""
  import tiny

  from jflow.data.tokenizer import Tokenizer
  from jflow.interop.native import save_params

  path = tmp_path_factory.mktemp("tiny") / "model"
  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  save_params(path, tiny.params(), config, Tokenizer.load(str(tiny.TOKENIZER)))
  return str(path)


@pytest.fixture(autouse=True)
def _fast_tests_start_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
  def refused(*arguments, **_):
    raise AssertionError(f"a fast test must start no process, got {arguments}")

  if request.node.get_closest_marker("fast"):
    monkeypatch.setattr(subprocess, "Popen", refused)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts tests into their lanes; skips those marked `gpu` where jax has none."""
  for item in items:
    module = item.path.stem.removeprefix("test_")
    slow = any(item.get_closest_marker(name) for name in ("process", "soak", "kill"))
    if module in FAST and not slow:
      item.add_marker("fast")
    elif module in PROCESS:
      item.add_marker("process")
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if marked:
    import jax

    if jax.default_backend() != "gpu":
      for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
