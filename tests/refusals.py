"""The check of a refusal: its kind, one line, and the names of field, file and value; not its words."""

import contextlib
from collections.abc import Iterator

import pytest

from jflow.errors import UserError


@contextlib.contextmanager
def refused(*named: object, error: type[BaseException] = UserError) -> Iterator[pytest.ExceptionInfo]:
  """Expects `error` with one line that holds each of `named`."""
  with pytest.raises(error) as caught:
    yield caught
  said = str(caught.value)
  assert all(str(one) in said for one in named) and "\n" not in said, said
