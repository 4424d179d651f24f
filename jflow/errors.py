"""The exceptions that end a command with one clear line instead of a traceback."""


class UserError(Exception):
  """A mistake of the user: a missing file, an unknown field, a wrong shape, an unreadable image.

  The message is one clear line that names the file, field or shape and says what to do. The command
  line prints it on stderr without a traceback and exits with code 2.
  """


class PromptTooLong(UserError):
  """A prompt that has more tokens than its context holds."""


class Stopped(Exception):
  """A run that cannot go on: the disk is full, too many steps were not finite. Exit code 1.

  The message is one line that says why and names the checkpoint from which the run can go on.
  """


class Terminated(KeyboardInterrupt):
  """SIGTERM came, where a command turns it into an exception (`prepare`). Exit code 143."""
