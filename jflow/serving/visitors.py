"""Visitors of the page: their conversations and files, private to each, all within limits."""

import asyncio
import collections
import contextlib
import logging
import os
import pathlib
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

import numpy as np
from starlette.concurrency import run_in_threadpool

from jflow.serving.schemas import ApiError

log = logging.getLogger("jflow.serving")

T = TypeVar("T")

MAX_SESSIONS = 300
MAX_LISTENERS = 3  # connections for the events of one session
MAX_FILES = 200  # of one visitor
MIN_BYTES = 2**26  # least quota of one visitor, so that large images fit
MAX_TOTAL = 2**31  # bytes of all files
LINGER = 300.0  # seconds that a visitor's data is kept after the last request or connection
IDLE = 60.0  # seconds without a request after which a connected visitor makes room for others
_LISTENS = 10.0  # seconds within which a client must connect to the events of its request
_SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Left(Exception):
  """Raised when the client of some work has disconnected."""


class File:
  """A file of the page: an upload of a visitor, or an image generated for one."""

  def __init__(self, path: str, owner: str | None, name: str, kind: str, size: int):
    """Args: `path` by which clients request it, its `name` for the visitor, `kind` its media type."""
    self.path, self.owner, self.name, self.kind, self.size = path, owner, name, kind, size
    self.seen, self.held = time.monotonic(), False  # held: a conversation or a gallery shows it


class Talk:
  """A conversation."""

  def __init__(self) -> None:
    self.turns: list[dict[str, str]] = []
    self.images: list[np.ndarray] = []  # uint8[H, W, 3]
    self.shown: list[dict[str, Any]] = []  # messages of the chat
    self.files: list[File] = []

  def hold(self, files: list[File]) -> None:
    """Keeps files as long as the conversation that shows them."""
    self.files += files
    for file in files:
      file.held = True

  def copy(self) -> "Talk":
    """The same turns in lists of their own."""
    talk = Talk()
    for name, value in vars(self).items():
      setattr(talk, name, list(value))
    return talk


class Session:
  """One open page of a visitor.

  Attributes:
    owner: of the session, None for a client that keeps no cookies.
    talk: the conversation.
    painted: files in the gallery.
    events: identifiers of the requests that Gradio has queued for it.
  """

  def __init__(self, owner: str | None):
    self.owner, self.talk, self.painted = owner, Talk(), list[File]()
    self.events: collections.deque[str] = collections.deque(maxlen=64)
    self.seen, self.open = time.monotonic(), 0  # connections that stay
    self._listeners, self._listened, self._left = 0, asyncio.Event(), asyncio.Event()
    self._beat: object = None  # the connection that says that the page is open
    self._busy: set[str] = set()

  @contextlib.contextmanager
  def connected(self, listens: bool) -> Iterator[None]:
    """Counts a connection while it is open; one that `listens` gets the events. Raises ApiError for too many."""
    if listens and self._listeners >= MAX_LISTENERS:
      raise ApiError(429, f"{MAX_LISTENERS} connections listen to this session, as many as may")
    self.open += 1
    if listens:
      self._listeners += 1
      self._listened.set()
      self._left.clear()
    try:
      yield
    finally:
      self.open, self.seen = self.open - 1, time.monotonic()
      if listens:
        self._listeners -= 1
        if not self._listeners:
          self._listened.clear()

  async def beats(self) -> AsyncIterator[None]:
    """Yields once per second, until a later heartbeat connection of the session replaces this one."""
    mine = self._beat = object()
    while self._beat is mine:
      yield
      await asyncio.sleep(1)

  def end(self) -> None:
    """Ends the beats and the work."""
    self._beat = None
    self._left.set()

  @property
  def empty(self) -> bool:
    """Whether the session holds no data."""
    return not (self.talk.turns or self.talk.files or self.painted or self._busy)

  @property
  def idle(self) -> bool:
    """Whether the session has no running work and no recent request."""
    return not self._busy and self.seen <= time.monotonic() - IDLE

  def leave(self) -> None:
    """Ends the work whose listener closed the connection."""
    if not self._listeners:
      self._left.set()

  @contextlib.contextmanager
  def working(self, kind: str) -> Iterator[None]:
    """Holds the session's only place for work of a kind; raises ApiError while it is taken."""
    if kind in self._busy:
      raise ApiError(409, f"{kind} is under way here: stop it first, or wait for its end")
    self._busy.add(kind)
    try:
      yield
    finally:
      self._busy.discard(kind)

  async def listened(self) -> None:
    """Waits until the client listens; raises Left when it does not in time."""
    try:
      await asyncio.wait_for(self._listened.wait(), _LISTENS)
    except TimeoutError:
      raise Left from None

  async def while_here(self, work: Coroutine[Any, Any, T]) -> T:
    """The result of work; raises Left when the client disconnects first."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(self._left.wait())
    try:
      await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
      if not task.done():
        raise Left
      return task.result()
    finally:
      task.cancel()
      left.cancel()


class Visitors:
  """Sessions by the name that their client chose, and files by path; for use on the event loop only."""

  def __init__(self, folder: pathlib.Path, max_upload: int):
    """Args: `folder` for the files, `max_upload` largest upload in bytes."""
    self.max_upload, self.max_bytes = (
      max_upload,
      max(8 * max_upload, MIN_BYTES),
    )  # of one file, of one visitor
    self._folder = folder
    self._sessions: collections.OrderedDict[str, Session] = collections.OrderedDict()  # the latest last
    self._files: dict[str, File] = {}  # the oldest first
    self._swept: asyncio.TimerHandle | None = None

  def session(self, name: object, owner: str | None, new: bool = False) -> Session:
    """A session of this visitor.

    Args:
      name: from the client.
      owner: the visitor; a session created without a cookie belongs to whoever knows its name.
      new: whether to create it where there is none.

    Raises:
      ApiError: 400 for an invalid name, 404 where there is none or another visitor's, 503 when too many are open.
    """
    if not isinstance(name, str) or not _SESSION.fullmatch(name):
      raise ApiError(400, "session_hash must be 1 to 64 letters and digits", "session_hash")
    session = self._sessions.get(name)
    if session is None and new:
      self._make_place()
      session = self._sessions[name] = Session(owner)
      self._sweep_later()
    if session is None or session.owner not in (None, owner):
      raise ApiError(404, "there is no such session", "session_hash")
    session.seen = time.monotonic()
    self._sessions.move_to_end(name)
    return session

  def file(self, path: object, owner: str | None) -> File | None:
    """A file of this visitor by its exact path; one created without a cookie belongs to whoever knows its path."""
    file = self._files.get(path) if isinstance(path, str) else None
    if file is None or file.owner not in (None, owner):
      return None
    file.seen = time.monotonic()
    return file

  async def keep(self, owner: str | None, name: str, kind: str, data: bytes) -> File:
    """Writes a file under an unguessable name.

    Raises:
      ApiError: 413 for a visitor over the quota, 507 when there is no room.
    """
    self._make_room(owner, len(data))
    folder = self._folder / secrets.token_urlsafe(18)
    file = File(str(folder / plain(name)), owner, name, kind, len(data))
    self._files[file.path] = file
    self._sweep_later()
    try:
      await run_in_threadpool(_write, folder, file.path, data)
    except OSError as error:
      self.drop([file])
      log.warning("a file of %d bytes cannot be kept: %s", len(data), error)
      raise ApiError(507, "the server has no room for the file") from None
    except BaseException:
      self.drop([file])
      raise
    return file

  def drop(self, files: list[File]) -> None:
    """Deletes files."""
    for file in files:
      if self._files.pop(file.path, None):
        shutil.rmtree(pathlib.Path(file.path).parent, ignore_errors=True)

  def sweep(self, linger: float = LINGER) -> None:
    """Deletes the sessions and files of visitors who left more than `linger` seconds ago."""
    limit = time.monotonic() - linger
    for name in [name for name, x in self._sessions.items() if not x.open and x.seen <= limit]:
      self._forget(name)
    here = self._here()
    self.drop([x for x in self._files.values() if not x.held and x.owner not in here and x.seen <= limit])

  def _sweep_later(self) -> None:
    """Schedules sweeps while there is any session or file."""
    if self._swept is None:
      self._swept = asyncio.get_running_loop().call_later(LINGER / 4, self._sweep_again)

  def _sweep_again(self) -> None:
    self._swept = None
    self.sweep()
    if self._sessions or self._files:
      self._sweep_later()

  def _here(self) -> set[str | None]:
    """Visitors with an open connection."""
    return {x.owner for x in self._sessions.values() if x.open} - {None}

  def _forget(self, name: str) -> None:
    session = self._sessions.pop(name)
    session.end()
    self.drop(session.talk.files + session.painted)

  def _make_place(self) -> None:
    """Makes room for a session by removing the longest unused one that is not open, or is empty, or is idle."""
    if len(self._sessions) >= MAX_SESSIONS:
      away = [name for name, x in self._sessions.items() if not x.open]
      away = away or [name for name, x in self._sessions.items() if x.empty]
      away = away or [name for name, x in self._sessions.items() if x.idle]
      if not away:
        raise ApiError(503, f"{MAX_SESSIONS} pages are in use, as many as may be: try again later")
      self._forget(away[0])

  def _make_room(self, owner: str | None, size: int) -> None:
    """Makes room for a file, deleting this visitor's files that are not shown, or files of visitors who are gone, then
    those not requested lately."""
    mine = lambda: [x for x in self._files.values() if x.owner == owner]
    full = lambda files: len(files) >= MAX_FILES or sum(x.size for x in files) + size > self.max_bytes
    if full(mine()):
      for file in [x for x in mine() if not x.held]:
        self.drop([file])
        if not full(mine()):
          break
      else:
        raise ApiError(413, f"{len(mine())} files of yours are here, as many as may be: begin a new conversation")
    total = lambda: sum(x.size for x in self._files.values()) + size
    if total() > MAX_TOTAL:
      here, limit = self._here(), time.monotonic() - IDLE
      others = [x for x in self._files.values() if x.owner != owner]
      gone = [x for x in others if x.owner not in here]
      for file in gone + [x for x in others if x.owner in here and x.seen <= limit]:
        self.drop([file])
        if total() <= MAX_TOTAL:
          break
      else:
        raise ApiError(507, "the server has no room for the file: try again later")


def plain(name: str) -> str:
  """A file name of letters, digits, dots and dashes only, safe in any address."""
  stem, suffix = os.path.splitext(re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._"))
  return (stem[:60] or "file") + suffix[:8]


def _write(folder: pathlib.Path, path: str, data: bytes) -> None:
  folder.mkdir(mode=0o700)
  pathlib.Path(path).write_bytes(data)
