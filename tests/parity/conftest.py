"""Puts tests/ on the path, so that these tests can use its helpers when they run alone."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
