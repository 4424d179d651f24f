"""The lanes of the suite, the root on the path, one cache of compiled programs for all tests and their processes."""

import gc
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
sys.path[:0] = [path for path in (str(ROOT), str(TESTS)) if path not in sys.path]

import quick

# Files of laws, whole: one process, no server, seconds each. Their tests are `fast`.
FAST = {
  "chips",
  "data/conversations",
  "data/corpus",
  "data/disk_sort",
  "data/examples",
  "data/importers/llava",
  "data/importers/text",
  "data/mixture",
  "data/order",
  "data/packing",
  "data/store/beam",
  "data/store/cache",
  "data/store/prepare_stores",
  "data/tokenizer",
  "data/validation",
  "evaluation/scorers",
  "evaluation/tables",
  "files",
  "generation/flow",
  "generation/generation",
  "generation/sde",
  "imports",
  "inference/decoding",
  "inference/generate",
  "interop/foreign_decoders",
  "interop/packed",
  "models/attention",
  "models/autoencoders",
  "models/autoencoders/vq",
  "models/flops",
  "models/initial",
  "models/llm",
  "models/siglip",
  "models/unified",
  "objectives/losses",
  "objectives/next_token",
  "perf/hlo",
  "perf/rows",
  "perf/targets",
  "registry",
  "rl/rewards",
  "stores",
  "training/optim",
  "training/remat",
  "training/setup",
  "training/signals",
  "training/spikes",
  "training/step",
  "training/work",
  "world/codec",
  "world/questions",
  "world/scenes",
  "world/source",
}

# Files that start other processes. Their tests are `process`.
PROCESS = {
  "cli/commands",
  "cli/help",
  "data/store/groups",
  "data/store/plans",
  "data/store/prepare",
  "design",
  "evaluation/evaluate",
  "evaluation/lmms",
  "from_raw_data",
  "launch/launch",
  "launch/speed",
  "perf/bench_inference",
  "perf/bench_train",
  "perf/compile",
  "training/distributed",
  "training/mesh",
  "training/train",
  "training/workdir",
}

# Files whose tests wait for what must happen within seconds, or time what they start. Their tests are `alone`.
ALONE = {
  "data/loaders",
  "launch/launch",
  "perf/bench_data",
  "perf/bench_train",
  "serving/serve_hostile",
  "serving/under_load",
  "training/distributed",
  "training/hosts",
  "training/train",
  "training/workdir",
}

MAPS = 35_000  # memory maps of this process after which compiled programs are dropped

# What jax and the processes that tests start read from the environment, unless it is set. `pytest --cache-clear`
# empties the cache.
os.environ.setdefault("XLA_FLAGS", quick.FLAGS)
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


@pytest.fixture(autouse=True, scope="module")
def _room_for_programs() -> Iterator[None]:
  """Frees compiled programs in time: each takes some seven of the 65,530 memory maps of a Linux process.

  The whole suite compiles thousands; without maps there are no more threads, and compilers wait for theirs.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and len(maps.read_bytes().splitlines()) > MAPS:
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _fast_tests_start_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
  def refused(*arguments, **_):
    raise AssertionError(f"a fast test must start no process, got {arguments}")

  if request.node.get_closest_marker("fast"):
    monkeypatch.setattr(subprocess, "Popen", refused)


def _file(name: str) -> pathlib.Path:
  """The file of a name in FAST, PROCESS or ALONE."""
  folder, _, stem = name.rpartition("/")
  return TESTS / folder / f"test_{stem}.py"


def _name(file: pathlib.Path) -> str:
  """The inverse of `_file`."""
  return (file.parent / file.stem.removeprefix("test_")).relative_to(TESTS).as_posix()


def pytest_make_parametrize_id(val, argname):
  """Names bytes by their length: gzip writes the time into its own, and all workers must collect the same names."""
  return f"{argname}_of_{len(val)}_bytes" if isinstance(val, bytes) else None


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
  """True for the files of other lanes in the fast one, so that what they import is not."""
  test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
  return True if test and config.option.markexpr == "fast" and _name(collection_path) not in FAST else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts tests into their lanes; skips those marked `gpu` where jax has none."""
  gone = sorted(name for name in FAST | PROCESS | ALONE if not _file(name).exists())
  if gone:
    raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(gone)}")
  for item in items:
    module = _name(item.path)
    slow = any(item.get_closest_marker(name) for name in ("process", "soak", "kill"))
    if module in FAST and not slow:
      item.add_marker("fast")
    elif module in PROCESS:
      item.add_marker("process")
    if module in ALONE:
      item.add_marker("alone")
  marked = [item for item in items if item.get_closest_marker("gpu")]
  if marked:
    import jax

    if jax.default_backend() != "gpu":
      for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
