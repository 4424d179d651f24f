"""Every command explains itself at once: without jax, with an example to paste."""

import subprocess
import sys

import tiny

_ALL = r"""
import contextlib, io, sys
from jflow.__main__ import COMMANDS, main
asked = [[name] for name in COMMANDS] + [["prepare", "--latents"], ["prepare", "--inspect"], ["prepare", "--report"]]
asked += [["bench", name] for name in ("train", "generate", "understand", "data")]
for words in asked:
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    try:
      code = main([*words, "--help"])
    except SystemExit as end:
      code = end.code
  text = out.getvalue()
  assert code == 0, words
  assert f"\n  python -m jflow {words[0]} " in text, words
  assert "jax" not in sys.modules and "torch" not in sys.modules and "transformers" not in sys.modules, words
print(len(asked))
"""


def test_help_of_every_command_needs_no_jax():
  done = subprocess.run([sys.executable, "-c", _ALL], cwd=tiny.ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout) >= 17
