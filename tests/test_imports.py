"""Laws of what imports what: the layers of jflow, no circle of files or folders, nothing that reaches up or outside.

Imports inside functions count: they are late, not absent. What a table names as text ("package.module:name") does not.
"""

import ast
import collections
import functools
import pathlib
from collections.abc import Iterable, Mapping

from parsed import tree

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jflow").rglob("*.py"))

# From the ground up: a file imports files of its own layer and of those below. The longest beginning of a path counts.
LAYERS = (
  ("jflow/",),  # files of the top folder: what all stand on
  ("jflow/data/", "jflow/generation/base.py"),
  ("jflow/models/", "jflow/objectives/", "jflow/generation/"),
  ("jflow/interop/",),  # checkpoints of others and of our own
  ("jflow/training/", "jflow/inference/"),
  ("jflow/evaluation/", "jflow/rl/"),
  ("jflow/world/",),
  ("jflow/serving/", "jflow/perf/"),
  ("jflow/cli/", "jflow/__init__.py", "jflow/__main__.py"),
)
# Folders that are one thing in several rooms: a model, its losses and its ways to write images.
TOGETHER = {"models": "model", "objectives": "model", "generation": "model"}
# Folders of the top level; jflow reads a file of theirs only where a user names it.
OUTSIDE = ("configs", "launch", "tests")


@functools.cache
def graph() -> dict[str, frozenset[str]]:
  """File -> the files of jflow that it imports, at the top or inside a function."""
  modules = {file[:-3].replace("/", ".").removesuffix(".__init__"): file for file in FILES}
  out = {}
  for file in FILES:
    found = set()
    for node in ast.walk(tree(file)):
      names = []
      if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      elif isinstance(node, ast.ImportFrom):
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      for name in names:
        while name and name not in modules:
          name = name.rpartition(".")[0]
        if name and not (isinstance(node, ast.ImportFrom) and name == "jflow"):
          found.add(modules[name])
    out[file] = frozenset(found - {file})
  return out


def layer(file: str) -> int:
  found = [(len(start), number) for number, starts in enumerate(LAYERS) for start in starts if file.startswith(start)]
  return max(found)[1]


def folder(file: str) -> str:
  """The room of a file; one of the top folder is a room of its own."""
  parts = file.split("/")
  return TOGETHER.get(parts[1], parts[1])


def circles(edges: Mapping[str, Iterable[str]]) -> set[tuple[str, ...]]:
  """Groups of nodes that reach each other (Tarjan's strongly connected components of two nodes at least)."""
  number: dict[str, int] = {}
  least: dict[str, int] = {}
  stack: list[str] = []
  out = set()

  def visit(node: str) -> None:
    number[node] = least[node] = len(number)
    stack.append(node)
    for other in sorted(edges.get(node, ())):
      if other not in number:
        visit(other)
        least[node] = min(least[node], least[other])
      elif other in stack:
        least[node] = min(least[node], number[other])
    if least[node] == number[node]:
      group = stack[stack.index(node) :]
      del stack[stack.index(node) :]
      if len(group) > 1:
        out.add(tuple(sorted(group)))

  for node in sorted(edges):
    if node not in number:
      visit(node)
  return out


def test_circles_are_found():
  assert circles({"a": "b", "b": "c", "c": "ad", "d": "e", "e": ""}) == {("a", "b", "c")}
  assert circles({"a": "bc", "b": "d", "c": "d", "d": ""}) == set()
  assert "jflow/inference/pipeline.py" in graph()["jflow/cli/train.py"]  # inside a function


def test_no_files_import_each_other_in_a_circle():
  assert not circles(graph())


def test_no_folders_import_each_other_in_a_circle():
  rooms = collections.defaultdict(set)
  for file, others in graph().items():
    for other in others:
      if folder(file) != folder(other):
        rooms[folder(file)].add(folder(other))
  assert circles(rooms) == set()


def test_nothing_imports_what_stands_above_it():
  up = {(file, other) for file, others in graph().items() for other in others if layer(other) > layer(file)}
  assert not up


def test_jflow_reads_nothing_beside_it_by_path():
  """No path into the folders beside jflow is put together, so that an installed copy lacks nothing.

  The configs that it ships are found by one file alone.
  """

  def beside(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split("/")[0] in OUTSIDE

  def joins(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
      return beside(node.left) or beside(node.right)
    if not isinstance(node, ast.Call):
      return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("open", "Path", "join", "joinpath") and any(map(beside, node.args))

  assert joins(ast.parse('root / "tests/parity"').body[0].value)
  bad = {file for file in FILES for node in ast.walk(tree(file)) if joins(node)}
  assert bad == {"jflow/training/config_files.py"}


def test_argparse_goes_no_deeper_than_the_commands():
  users = {file for file in FILES for node in ast.walk(tree(file)) if _imports(node, "argparse")}
  assert not [file for file in users if not file.startswith("jflow/cli/")]


def test_one_bar_shows_progress():
  users = {file for file in FILES for node in ast.walk(tree(file)) if _imports(node, "tqdm")}
  assert users == {"jflow/progress.py"}


def _imports(node: ast.AST, module: str) -> bool:
  if isinstance(node, ast.Import):
    return any(alias.name.split(".")[0] == module for alias in node.names)
  return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == module
