"""The exceptions that end a command with one clear line instead of a traceback."""

import importlib.metadata
import importlib.util
import pathlib
import sys


class UserError(Exception):
  """A mistake of the user: a missing file, an unknown field, a wrong shape, an unreadable image.

  The message is one clear line that names the file, field or shape and says what to do. The command
  line prints it on stderr without a traceback and exits with code 2.
  """


class PromptTooLong(UserError):
  """A prompt that has more tokens than its context holds."""


class CannotPaint(UserError):
  """A picture is asked of a checkpoint without a VAE."""


class Stopped(Exception):
  """A run that cannot go on: the disk is full, too many steps were not finite. Exit code 1.

  The message is one line that says why and names the checkpoint from which the run can go on.
  """


class Terminated(KeyboardInterrupt):
  """SIGTERM came, where a command turns it into an exception (`prepare`). Exit code 143."""


def need_text_name(flag: str, path: object) -> None:
  """Refuses the name of a directory that ArrayRecord and TensorStore can neither write into nor read from.

  Args:
    flag: that named it, for the message.
    path: its name; bytes that are no UTF-8 stand in it as Python's lone surrogates.

  Raises:
    UserError: the name holds such bytes, or Python reads names in another encoding.
  """
  name, encoding = str(path), sys.getfilesystemencoding()
  if not name.isascii() and encoding.lower() not in ("utf-8", "utf8"):
    raise UserError(f"{flag}={path}: Python reads names as {encoding}, and they are UTF-8: set PYTHONUTF8=1")
  try:
    name.encode("utf-8")
  except UnicodeEncodeError:
    raise UserError(f"{flag}={path} must be a name in UTF-8: what writes and reads there knows no other") from None


def need_extra(extra: str, *modules: str) -> None:
  """Checks that what an optional extra of pyproject.toml brings is installed; imports nothing.

  Raises:
    UserError: naming the first module that is missing, and how to install the extra.
  """
  for module in modules:
    if importlib.util.find_spec(module) is None:
      raise UserError(f"this needs the package {module}, of an extra: {install_line(extra)}")


def install_line(extra: str) -> str:
  """The command that installs an extra: of jflow where it is installed, else of the folder that this code is in."""
  try:
    importlib.metadata.distribution("jflow")
    return f"pip install 'jflow[{extra}]'"
  except importlib.metadata.PackageNotFoundError:
    return f"pip install '{pathlib.Path(__file__).parents[1]}[{extra}]'"
