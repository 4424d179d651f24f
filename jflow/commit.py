"""The commit of the code that runs, for reports and checkpoints."""

import pathlib
import subprocess


def commit() -> str | None:
  """Returns the git commit that jflow runs from, with "+changes" where files differ; None outside a checkout of it."""
  file = pathlib.Path(__file__)

  def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()

  try:
    git("ls-files", "--error-unmatch", file.name)  # an installed copy may lie in a checkout of something else
    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
  except (OSError, subprocess.CalledProcessError):
    return None
