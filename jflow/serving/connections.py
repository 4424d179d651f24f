"""Limits of connections, around uvicorn's HTTP/1.1.

They bound the number of connections, the time until the head of a request is complete, the pace of its body and of
the client's reading, and the number of small chunks.
"""

import asyncio
import json
import resource
from typing import Any, NamedTuple

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from jflow.serving.hosts import HEADERS
from jflow.serving.schemas import ApiError

_LONGEST_HEAD = 2**15  # bytes
_OWN_FILES = 64  # open files of the process besides its connections
_MOST = 1000  # connections
_AHEAD = 2**16  # bytes of the next request that are read while one is answered
_SMALL_PIECES = 1000  # chunks of a body that may be small
_LEAST_PIECE = 32  # least mean bytes of the further ones, since each costs time of the event loop


class Limits(NamedTuple):
  """The limits of a connection."""

  connections: int
  backlog: int  # connections accepted at once, before their number is checked
  head: float = 10.0  # seconds from a connection or a first byte to the end of a request's head
  rest: float = 60.0  # seconds for the rest of a body that was answered before it was complete
  idle: int = 5  # seconds between two requests
  window: float = 10.0  # seconds over which the pace of a body and of a reader is measured
  pace: float = 1000.0  # least bytes per second at which a body must arrive and an answer be read
  linger: float = 2.0  # seconds for a client to read why it was refused
  look: float = 1.0  # seconds between two checks of a connection, in tenths

  @classmethod
  def here(cls) -> "Limits":
    """The limits for this process, whose open-file limit bounds the connections."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    files = 2**20 if files == resource.RLIM_INFINITY else files
    backlog = max(1, min(128, files // 8))
    return cls(max(1, min(_MOST, files - backlog - _OWN_FILES)), backlog)


class Reader(h11.Connection):
  """h11's parser, which also refuses a body with two lengths or in too many small chunks."""

  method = b""  # of the last request
  _chunked, _pieces, _bytes = False, 0, 0

  def next_event(self) -> Any:
    """The next event; raises RemoteProtocolError as h11 does."""
    event = super().next_event()
    if isinstance(event, h11.Request):
      self.method = event.method
      names = {name for name, _ in event.headers}
      if len(event.target) + sum(len(name) + len(value) for name, value in event.headers) > _LONGEST_HEAD:
        raise h11.RemoteProtocolError("a head that is too long")
      self._chunked, self._pieces, self._bytes = b"transfer-encoding" in names, 0, 0
      if self._chunked and b"content-length" in names:
        raise h11.RemoteProtocolError("a body with Content-Length and Transfer-Encoding")
    elif isinstance(event, h11.Data) and self._chunked:
      self._pieces, self._bytes = self._pieces + 1, self._bytes + len(event.data)
      if self._pieces > _SMALL_PIECES + self._bytes / _LEAST_PIECE:
        raise h11.RemoteProtocolError("a body in chunks that are too small")
    return event


class Connection(H11Protocol):
  """A connection; `look` is called every `Limits.look` seconds."""

  def __init__(self, *args: Any, limits: Limits, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self.conn = Reader(h11.SERVER, _LONGEST_HEAD)
    self._limits = limits
    self._received = 0  # bytes
    # Start of a request or of the wait for one, and the bytes received by then.
    self._since, self._before = self.loop.time(), 0
    # Time of the refusal; later input is received and discarded, so that the answer reaches the client.
    self._refused: float | None = None
    self._body_since: tuple[float, int] | None = None  # start of a window, and the bytes received by then
    self._write_since: tuple[float, int] | None = None  # start of a window, and the bytes still to be sent then

  # --- of the protocol --------------------------------------------------------------------------------------

  def connection_made(self, transport: asyncio.Transport) -> None:
    """Accepts a connection, making room where there are too many (`_make_room`), or refuses it."""
    super().connection_made(transport)
    if len(self.connections) > self._limits.connections and not self._make_room():
      self.refuse(503, "too many connections are open: try again")

  def data_received(self, data: bytes) -> None:
    if self.transport.is_closing() or self._refused is not None:
      return
    if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
      self._since, self._before = self.loop.time(), self._received
    self._received += len(data)
    super().data_received(data)
    # While a request is answered, uvicorn stops reading what follows it and does not notice a disconnect.
    if self.flow.read_paused and self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) < _AHEAD:
      self.flow.resume_reading()

  def on_response_complete(self) -> None:
    self._since, self._before = self.loop.time(), self._received
    super().on_response_complete()

  def shutdown(self) -> None:
    try:
      super().shutdown()
    except h11.LocalProtocolError:  # no answer can be sent any more
      self.transport.close()

  def send_400_response(self, msg: str) -> None:
    """Answers input that is not HTTP with an error, unless an answer has begun."""
    self.refuse(400, "the request must be HTTP/1.1")

  # --- of this server ---------------------------------------------------------------------------------------

  def waits(self) -> bool:
    """Whether no request is pending: none is complete, or the last one has its answer."""
    answered = self.cycle is not None and self.cycle.response_complete
    return answered or self.conn.their_state is h11.IDLE or self._refused is not None

  def pace(self) -> float:
    """Bytes received per second since this request began."""
    return (self._received - self._before) / (self.loop.time() - self._since + 0.1)

  def _make_room(self) -> bool:
    """Ends the connection that has been idle longest, or else the one whose body arrives slowest."""
    others = [x for x in self.connections if x is not self and not x.transport.is_closing()]
    if waiting := [x for x in others if x.waits()]:
      min(waiting, key=lambda other: other._since).end()
    elif bodies := [x for x in others if x.conn.their_state is h11.SEND_BODY]:
      min(bodies, key=lambda other: other.pace()).refuse(503, "the body came slower than others: try again")
    return bool(waiting or bodies)

  def end(self) -> None:
    """Closes at once; unsent data is lost."""
    self.transport.abort()

  def refuse(self, status: int, message: str) -> None:
    """Answers with an error where no answer has begun; closes when the client does, or after `Limits.linger`."""
    if not self.transport.is_closing() and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
      body = json.dumps(ApiError(status, message).body()).encode()
      headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *HEADERS,
      ]
      head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
      bodiless = self.conn.our_state is h11.SEND_RESPONSE and self.conn.method == b"HEAD"
      for event in (head, h11.Data(data=b"" if bodiless else body), h11.EndOfMessage()):
        self.transport.write(self.conn.send(event))
      if self.cycle is not None and not self.cycle.response_complete:
        self.cycle.scope["state"]["refused"] = status
    if self.cycle is not None and not self.cycle.response_complete:  # its handler sees a disconnected client
      self.cycle.disconnected, self.cycle.waiting_for_100_continue = True, False
      self.cycle.message_event.set()
    if not self.transport.is_closing():
      self._refused = self.loop.time()
      self.flow.resume_reading()
      self.transport.write_eof()

  def look(self) -> None:
    """Ends this connection if it is too slow."""
    now, state = self.loop.time(), self.conn.their_state
    if self._unread(now):
      self.end()
    elif self.transport.is_closing():
      pass
    elif self._refused is not None:
      if now - self._refused > self._limits.linger:
        self.end()
    elif self.waits():
      self._body_since = None
      rest = state is not h11.IDLE  # the rest of a body that no handler reads
      if now - self._since > (self._limits.rest if rest else self._limits.head):
        if self.conn.trailing_data[0] and not rest:
          self.refuse(408, f"the head of the request did not arrive within {self._limits.head:g} s")
        else:
          self.end()
    elif state is h11.SEND_BODY and self._slow_body(now):
      self.refuse(408, f"the body came with less than {self._limits.pace:g} bytes per second")

  def _slow_body(self, now: float) -> bool:
    """Whether a body arrived too slowly over a whole window in which it was being read."""
    wanted = not (self.flow.read_paused or self.cycle.waiting_for_100_continue)
    if self._body_since is None or not wanted:
      self._body_since = now, self._received
      return False
    began, before = self._body_since
    if now - began < self._limits.window:
      return False
    self._body_since = now, self._received
    return self._received - before < self._limits.pace * (now - began)

  def _unread(self, now: float) -> bool:
    """Whether the client read too slowly over a whole window in which the answer did not grow."""
    size = self.transport.get_write_buffer_size()
    if not size:
      self._write_since = None
      return False
    if self._write_since is None:
      self._write_since = now, size
    began, before = self._write_since
    if now - began < self._limits.window:
      return False
    grows = self.cycle is not None and not (self.cycle.response_complete or self.flow.write_paused)
    self._write_since = now, size
    return not grows and before - size < self._limits.pace * (now - began)
