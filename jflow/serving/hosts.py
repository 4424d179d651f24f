"""Checks of a request's Host and Origin, and the headers that isolate pages of other origins.

To a browser, a page at evil.example whose name resolves to 127.0.0.1 (DNS rebinding) has the server's own origin; only
its Host differs. So the Host must be a name or address of the listener, or one of `--allowed_host`.
"""

import ipaddress
import json
import re
import socket
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jflow.errors import UserError
from jflow.serving.schemas import ApiError

ANY = "*"
HEADERS = (
  (b"content-security-policy", b"frame-ancestors 'none'"),
  (b"x-frame-options", b"DENY"),
  (b"x-content-type-options", b"nosniff"),
)
_ONCE = {name for name, _ in HEADERS[1:]}  # must not be repeated, unlike policies, which add up
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{0,5})?")
_NAME = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]|[0-9A-Fa-f:.]+")
_ORIGIN = re.compile(r"https?://([^/?#@\\\s]+)", re.IGNORECASE)
_MORE = "start it with --allowed_host=NAME for one more"
_PROBED = "/health"  # may be asked without a Host in HTTP/1.0, as load balancers do; no browser can

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Hosts:
  """The names and addresses of a listener."""

  def __init__(self, listener: socket.socket, host: str, allowed: Sequence[str] = ()):
    """Args: the bound `listener`, its `host` from the flag, further `allowed` names; "*" allows any."""
    self._any = ANY in allowed
    self._bound = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    named = [name for name in (host, *allowed) if name and name != ANY]
    self._names = {_host(name) for name in named}
    if self._bound.is_loopback:
      self._names.add("localhost")
    elif self._bound.is_unspecified:
      self._names |= {"localhost", *_own_names()}
    else:
      self._names |= {self._bound, *_own_names()}

  def serves(self, name: str | Address | None) -> bool:
    """Whether a name from `parse` is one of these."""
    if self._any or name in self._names:
      return True
    if name is None or isinstance(name, str):
      return False
    return name.is_loopback if self._bound.is_loopback else self._bound.is_unspecified or name == self._bound

  def check(self, scope: Scope) -> None:
    """Checks a request's Host and, where there is one, its Origin.

    Raises:
      ApiError: 421 for the Host, 403 for the Origin.
    """
    given, origins = ([v.decode("latin-1") for k, v in scope["headers"] if k == x] for x in (b"host", b"origin"))
    host = parse(given[0]) if len(given) == 1 else None
    probe = not given and scope["http_version"] == "1.0" and scope["path"] == _PROBED
    if not probe and (host is None or not self.serves(host)):
      shown = repr(given[0][:80]) if given else "none"
      raise ApiError(421, f"the Host must be one that this server goes by, got {shown}: {_MORE}")
    if origins and not self._any:
      match = _ORIGIN.fullmatch(origins[0]) if len(origins) == 1 else None
      origin = parse(match[1]) if match else None
      # A wildcard listens at every address of this machine: the request's own destination is one of them.
      known = origin in self._names or origin == host or not self._bound.is_unspecified
      if origin is None or not (known and self.serves(origin)):
        raise ApiError(403, f"a page of another origin ({origins[0][:80]!r}) may not use this server: {_MORE}")


class Guarded:
  """An application behind `Hosts`, whose answers forbid framing by other pages and guessing of types."""

  def __init__(self, inner: ASGIApp, hosts: Hosts):
    self._inner, self._hosts = inner, hosts

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
      return await self._inner(scope, receive, send)

    async def kept_apart(message: Message) -> None:
      if message["type"] == "http.response.start":
        rest = [(k, v) for k, v in message.get("headers", ()) if k.lower() not in _ONCE]
        message = message | {"headers": [*rest, *HEADERS]}
      await send(message)

    try:
      self._hosts.check(scope)
    except ApiError as error:
      body = json.dumps(error.body()).encode()
      headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # a body that follows is not read
      ]
      await kept_apart({"type": "http.response.start", "status": error.status, "headers": headers})
      await send({"type": "http.response.body", "body": body})
    else:
      await self._inner(scope, receive, kept_apart)


def parse(authority: str) -> str | Address | None:
  """The host of HOST or HOST:PORT: an address, a name in lower case without its last dot, or None if malformed."""
  match = _AUTHORITY.fullmatch(authority)
  return _host(match[1]) if match else None


def check_name(name: str) -> None:
  """Raises UserError unless a value of --allowed_host is a name, an address or "*"."""
  if name != ANY and (not _NAME.fullmatch(name) or _host(name) is None):
    raise UserError(f"--allowed_host={name} must be a host's name or address without a port, or * for any")


def _host(text: str) -> str | Address | None:
  bracketed = text.startswith("[")
  try:
    address = ipaddress.ip_address(text[1:-1] if bracketed else text.removesuffix("."))
  except ValueError:
    return None if bracketed or ":" in text else text.lower().removesuffix(".") or None
  return None if bracketed and address.version == 4 else address


def _own_names() -> set[str]:
  """The host names of this machine."""
  name = socket.gethostname().lower().removesuffix(".")
  short = name.partition(".")[0]
  return {name, short, f"{short}.local"} - {"", ".local"}
