"""Laws of the source: what may import what, and what stands nowhere."""

import ast
import functools
import importlib.util
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable

import pytest
from parsed import tree

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ("jflow", "configs", "launch", "tests")
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jflow").rglob("*.py"))

# Files (by the beginning of their path) -> modules that they import nowhere, not even inside a function.
NEVER = {
  "jflow/": ("torch", "diffusers", "configs", "pickle", "marshal", "shelve", "flax.nnx"),
  "jflow/data/": (
    "jax",
    "flax",
    "optax",
    "orbax",
    "jflow.models",
    "jflow.training",
    "jflow.inference",
    "jflow.interop",
    "jflow.objectives",
    "jflow.sharding",
  ),
  "jflow/world/": ("jflow.serving", "jflow.perf"),
  **{  # loader processes draw the world, and the judge counts as data does: without jax
    f"jflow/world/{name}.py": ("jax", "flax", "jflow.models", "jflow.training", "jflow.inference")
    for name in (
      *("config", "scenes", "words", "questions", "source", "importer", "judge", "features"),
      *("prompts", "rewards"),
    )
  },
  "jflow/models/": ("jflow.data", "jflow.training", "jflow.inference", "jflow.interop", "jflow.evaluation"),
  "jflow/training/": ("jflow.inference", "jflow.evaluation"),  # but for EXCEPT
}
# The command stands above both: it hands the loop a function that paints sample pictures.
EXCEPT = {("jflow/training/", "jflow/cli/train.py")}
# The world is a leaf: by these doors alone does the rest of jflow reach it.
WORLD = {
  "jflow/config.py",
  "jflow/models/autoencoders/base.py",
  "jflow/data/sources.py",
  "jflow/data/importers/__init__.py",
  "jflow/evaluation/benchmarks/__init__.py",
  "jflow/training/fresh.py",
  "jflow/rl/pairs.py",
  "jflow/rl/prompts.py",
  "jflow/rl/rewards/__init__.py",
}
PURE = (  # of jflow they import only each other
  "batch",
  "config",
  "errors",
  "files",
  "git_lfs",
  "memory",
  "registry",
  "sections",
  "sharding",
  "strict_json",
  "values",
)


@functools.cache
def imports(file: str) -> frozenset[str]:
  """Every module, and every name of a module, that a file imports: "a", "a.b"."""
  out = set()
  for node in ast.walk(tree(file)):
    if isinstance(node, ast.Import):
      out |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{file} imports relatively"
      out |= {f"{node.module}.{alias.name}" for alias in node.names}
  return frozenset(out)


def of(module: str, name: str) -> bool:
  return name == module or name.startswith(module + ".")


def test_the_walk_sees_what_is_there():
  assert len(FILES) > 40
  assert "jflow.models.cache.Cache" in imports("jflow/generation/flow/sampler.py")
  assert "jflow.training.loop.train" in imports("jflow/cli/train.py")  # inside a function


@pytest.mark.parametrize("folder", NEVER)
def test_what_is_never_imported(folder):
  bad = {
    f"{file}: {name}"
    for file in FILES
    if file.startswith(folder) and (folder, file) not in EXCEPT
    for name in imports(file)
    if any(of(module, name) for module in NEVER[folder])
  }
  assert not bad


def test_the_world_is_a_leaf():
  named = lambda file: {
    x.value for x in ast.walk(tree(file)) if isinstance(x, ast.Constant) and isinstance(x.value, str)
  }
  users = {file for file in FILES if any(of("jflow.world", name.split(":")[0]) for name in imports(file) | named(file))}
  assert {file for file in users if not file.startswith("jflow/world/")} == WORLD
  special = {
    file for file in FILES if {"shapes", "patch_pca", "patch_codes"} & named(file)
  }  # cases for it anywhere else
  assert {file for file in special if not file.startswith("jflow/world/")} <= WORLD


def test_linen_lives_in_the_models_and_the_table_of_axes():
  users = {file for file in FILES if any(of("flax.linen", name) for name in imports(file))}
  folders = ("jflow/models/", "jflow/generation/", "jflow/objectives/")
  others = {file for file in users if not file.startswith(folders)}
  assert others == {"jflow/sharding.py", "jflow/world/codec.py", "jflow/world/patch_codes.py"}


def test_pure_modules_stand_below_all_others():
  for module in PURE:
    for name in imports(f"jflow/{module}.py"):
      assert not of("jflow", name) or name.split(".")[1] in PURE, f"{module} imports {name}"


# Package in requirements.txt or an extra -> the module that it brings, where the names differ.
MODULES = {
  "pillow": "PIL",
  "absl-py": "absl",
  "orbax-checkpoint": "orbax",
  "jax[tpu]": "libtpu",
  "scikit-image": "skimage",
}
# Folder or file -> the extra whose modules it may import as it is loaded, after `errors.need_extra`.
OF_EXTRA = {"jflow/serving/": "serve", "jflow/serving/demo.py": "demo", "jflow/serving/theme.py": "demo"}
LAZY = ("transformers", "huggingface_hub")  # seconds to import
PLUGIN = "jflow/evaluation/lmms"  # loaded by lmms-eval alone


def packages(lines: Iterable[str]) -> set[str]:
  """The modules of requirements."""
  names = (re.split(r"[<>=~ ]", line)[0] for line in lines if line and not line.startswith("#"))
  return {MODULES.get(name, name.replace("-", "_")) for name in names}


def requirements() -> tuple[set[str], dict[str, list[str]]]:
  """The modules that the core may import, and the requirements of each extra."""
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  return packages((ROOT / "requirements.txt").read_text().splitlines()), extras


def of_others(file: str, at_load: bool) -> set[str]:
  """The third-party modules that a file imports, only as it is loaded or at all."""
  body = tree(file).body
  nodes = body if at_load else [node for part in body for node in ast.walk(part)]
  names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
  names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
  return {name.split(".")[0] for name in names} - {"jflow", "configs"} - set(sys.stdlib_module_names)


def test_what_the_core_imports_is_what_it_requires():
  """Modules of an extra are imported where that extra was asked for; what is slow to import, inside functions."""
  required, extras = requirements()
  assert packages(extras["serve"]) < packages(extras["demo"])
  seen = set()
  for file in FILES:
    at_load = of_others(file, at_load=True)
    seen |= at_load | of_others(file, at_load=False)
    allowed = set().union(*(packages(extras[extra]) for place, extra in OF_EXTRA.items() if file.startswith(place)))
    unknown = at_load - required - allowed - {"pydantic_core"}  # comes with pydantic
    assert not unknown or file.startswith(PLUGIN), f"{file} imports {sorted(unknown)}"
    assert not at_load & set(LAZY), file
  assert required <= seen | {"jaxlib"}, f"nothing imports {sorted(required - seen)}"


def test_models_keep_no_state_but_their_parameters():
  """No other collection and no randomness inside: every method is a pure function of its arguments."""
  for file in FILES:
    for node in ast.walk(tree(file)):
      if isinstance(node, ast.Attribute):
        assert node.attr not in ("variable", "make_rng", "Dropout", "sow", "put_variable"), file


def test_nothing_is_evaluated_or_unpickled():
  for file in FILES:
    for node in ast.walk(tree(file)):
      if isinstance(node, ast.Call):
        assert not (isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec")), file
        for keyword in node.keywords:
          assert keyword.arg != "allow_pickle" or keyword.value.value is False, file


def test_files_are_short_and_say_what_they_are():
  configs = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "configs").rglob("*.py"))]
  for file in FILES + configs:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 410, file
    assert not lines or ast.get_docstring(tree(file)), file
    assert not [line for line in lines if line.lstrip().startswith('"""What ')], file
    assert pathlib.Path(file).name not in ("utils.py", "helpers.py", "common.py", "misc.py")
    assert not [line for line in lines if "TODO" in line or "FIXME" in line or "XXX" in line], file


def test_links_lead_somewhere():
  """Each link of a page to a file of the tree, and to a heading of a page."""
  pages = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
  assert len(pages) > 10
  for page in pages:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
      if "://" not in link:
        path, _, heading = link.partition("#")
        file = page.parent / path if path else page
        assert file.exists() and (not heading or heading in headings(file)), f"{page}: {link}"


def headings(page: pathlib.Path) -> set[str]:
  """The anchors that GitHub gives a page's headings."""
  titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.smoke
def test_what_an_import_really_brings_along():
  """Loader processes and `--help` start without jax, no module needs PyTorch, and the core none of the extras."""
  page = {"jflow/serving/demo.py", "jflow/serving/theme.py"}  # of an extra
  without = set() if importlib.util.find_spec("gradio") else page
  modules = [file[:-3].replace("/", ".").removesuffix(".__init__") for file in FILES if file not in without]
  data = [m for m in modules if of("jflow.data", m)] + ["jflow", "jflow.__main__", "jflow.batch"]
  core = [m for m in modules if not m.startswith(("jflow.serving", PLUGIN.replace("/", ".")))]
  required, extras = requirements()
  optional = sorted(set().union(*(packages(x) for name, x in extras.items() if name != "test")) - required)
  code = f"""
import importlib, sys
for name in {optional!r}: sys.modules[name] = None  # as if it were not installed
for name in {data!r}: importlib.import_module(name)
assert "jax" not in sys.modules and "flax" not in sys.modules
for name in {core!r}: importlib.import_module(name)
for name in {optional!r}: del sys.modules[name]
for name in {modules!r}: importlib.import_module(name)
assert "jax" in sys.modules
print([name for name in ("torch", "diffusers", "transformers", "configs") if name in sys.modules])
"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "[]\n"


def test_test_files_share_by_helpers_alone():
  tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
  for path in (ROOT / "tests").rglob("*.py"):
    for name in imports(path.relative_to(ROOT).as_posix()):
      assert not tests & set(name.split(".")), f"{path} imports {name}"
