"""Puts this folder and tests/ on the path: these tests share their models in PyTorch, and may run alone."""

import pathlib
import sys

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
