"""The words of the world: how objects, counts and places are named."""

from jflow.errors import UserError
from jflow.world.scenes import Object

NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = (
  ("at the top left", "at the top", "at the top right"),
  ("on the left", "in the center", "on the right"),
  ("at the bottom left", "at the bottom", "at the bottom right"),
)


def place(thing: Object) -> str:
  """The place of an object in words, to a third of the side."""
  return PLACES[min(2, int(3 * thing.y))][min(2, int(3 * thing.x))]


def noun(shape: str, color: str | None = None) -> str:
  """A noun phrase, as in "an orange ring"."""
  return f"{'an' if color == 'orange' else 'a'} {color + ' ' if color else ''}{shape}"


def plural(shape: str, color: str | None, count: int) -> str:
  """A counted noun phrase, as in "two red crosses"."""
  return f"{NUMBERS[count]} {color + ' ' if color else ''}{plural_noun(shape)}"


def plural_noun(shape: str) -> str:
  """The plural of a shape, as in "crosses"."""
  return shape + ("es" if shape == "cross" else "s")


def join(parts: list[str]) -> str:
  """A list of phrases joined in words, as in "a ring, a star and a heart"."""
  return " and ".join([", ".join(parts[:-1])] * (len(parts) > 1) + parts[-1:])


def check(what: str, name: str, known: tuple[str, ...]) -> None:
  """Raises UserError if a name is not one of `known`."""
  if name not in known:
    raise UserError(f"the world's {what} must be one of {', '.join(known)}, got {name!r}")
