"""The one exception that stands for a user's mistake."""


class UserError(Exception):
  """A mistake of the user: a missing file, an unknown field, a wrong shape, an unreadable image.

  The message is one clear line that names the file, field or shape and says what to do. The command
  line prints it on stderr without a traceback and exits with code 2.
  """
