"""Pointers of git-lfs: the few lines that stand in a checkout for a file that was not fetched."""

_START = b"version https://git-lfs.github.com/spec/"
WORDS = "a pointer of git-lfs and not the file itself: run `git lfs pull` where it was cloned, or download it"


def is_pointer(data: bytes) -> bool:
  """Returns whether a file that begins with these bytes is a pointer."""
  return data.startswith(_START)
