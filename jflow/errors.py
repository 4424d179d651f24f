"""The exceptions that end a command with one clear line instead of a traceback."""

import importlib.metadata
import importlib.util
import pathlib
import signal
import sys


class UserError(Exception):
  """A mistake of the user: a missing file, an unknown field, a wrong shape, an unreadable image.

  The message is one clear line that names the file, field or shape and says what to do. The command
  line prints it on stderr without a traceback and exits with code 2.
  """


class PromptTooLong(UserError):
  """A prompt longer than its context."""


class CannotGenerate(UserError):
  """A request for an image from a checkpoint without a VAE."""


class Stopped(Exception):
  """A run that cannot continue: the disk is full, too many steps were not finite. Exit code 1.

  The message is one line that says why and names the checkpoint from which the run can continue.
  """


class Unscored(Exception):
  """A batch of pictures without scores: a reward failed. One line names it; the run stops (`Stopped`)."""


class Terminated(KeyboardInterrupt):
  """A signal, in a command that turns it into an exception: SIGTERM in `prepare`, the end of a run that was saved.

  Exit code 128 + signum.
  """

  def __init__(self, signum: int = signal.SIGTERM, message: str = ""):
    super().__init__(message)
    self.signum = signum


def one_line(error: BaseException, most: int = 160) -> str:
  """The message of an error without line breaks, cut to `most` characters."""
  return " ".join(str(error).split())[:most]


def need_text_name(flag: str, path: object) -> None:
  """Checks that a directory has a name that ArrayRecord and TensorStore can open: UTF-8.

  Args:
    flag: that named it, for the message.
    path: its name, in which bytes that are not UTF-8 are lone surrogates, as Python decodes them.

  Raises:
    UserError: the name holds such bytes, or Python reads names in another encoding.
  """
  name, encoding = str(path), sys.getfilesystemencoding()
  if not name.isascii() and encoding.lower() not in ("utf-8", "utf8"):
    raise UserError(f"{flag}={path}: Python reads names as {encoding}, and they are UTF-8: set PYTHONUTF8=1")
  try:
    name.encode("utf-8")
  except UnicodeEncodeError:
    raise UserError(f"{flag}={path} must be a name in UTF-8: ArrayRecord and TensorStore take no other") from None


def need_extra(extra: str, *modules: str) -> None:
  """Checks that the packages of an optional extra of pyproject.toml are installed; imports nothing.

  Raises:
    UserError: a module is missing; the message names it and the command that installs the extra.
  """
  for module in modules:
    if importlib.util.find_spec(module) is None:
      raise UserError(f"this needs the package {module}, of an extra: {install_line(extra)}")


def install_line(extra: str) -> str:
  """Returns the command that installs an extra: by the package's name where jflow is installed, else by its folder."""
  try:
    importlib.metadata.distribution("jflow")
    return f"pip install 'jflow[{extra}]'"
  except importlib.metadata.PackageNotFoundError:
    return f"pip install '{pathlib.Path(__file__).parents[1]}[{extra}]'"
