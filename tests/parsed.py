"""The files of the repository as trees of Python."""

import ast
import functools
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


@functools.cache
def tree(file: str) -> ast.Module:
  """The tree of a file, named from the root."""
  return ast.parse((ROOT / file).read_text(encoding="utf-8"))
