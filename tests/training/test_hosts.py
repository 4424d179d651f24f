"""Only requests that call the server by a name of its own get in, from pages of its own."""

import asyncio
import socket

import pytest

from jflow.__main__ import main
from jflow.serving.hosts import Guarded, Hosts

HERE = socket.gethostname()


@pytest.fixture(scope="module")
def listeners():
  """Lines that stand for sockets at the loopback, at a wildcard, and at one address."""

  class At:
    def __init__(self, host):
      self._host = host

    def getsockname(self):
      return self._host, 8000

  return {
    "loopback": At("127.0.0.1"),
    "loopback6": At("::1"),
    "wildcard": At("0.0.0.0"),
    "wildcard6": At("::"),
    "one": At("192.0.2.7"),
  }


def answer(hosts, headers, path="/", method="GET", version="1.1"):
  """(status, headers) of an application that says 200 behind `hosts`."""
  sent = []

  async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"X-Frame-Options", b"ALLOWALL")]})
    await send({"type": "http.response.body", "body": b"ok"})

  async def send(message):
    sent.append(message)

  scope = {
    "type": "http",
    "http_version": version,
    "path": path,
    "method": method,
    "headers": [(k.encode(), v.encode("latin-1")) for k, v in headers],
  }
  asyncio.run(Guarded(app, hosts)(scope, None, send))
  start, body = sent
  kept = [(k.lower(), v) for k, v in start["headers"]]
  assert (b"content-security-policy", b"frame-ancestors 'none'") in kept
  assert [v for k, v in kept if k == b"x-frame-options"] == [b"DENY"]
  assert (b"x-content-type-options", b"nosniff") in kept
  if start["status"] != 200:
    assert b"--allowed_host" in body["body"] and b"\n" not in body["body"]
  return start["status"]


LOOPBACK = [
  "127.0.0.1",
  "127.0.0.1:8000",
  "127.1.2.3:1",
  "localhost",
  "LocalHost:9",
  "localhost.",
  "[::1]",
  "[::1]:8000",
]
BAD = [
  "",
  " ",
  "evil.example",
  "evil.example:8000",
  "localhost.evil.example",
  "127.0.0.1.evil.example",
  "evil.localhost",
  "localhost:80:80",
  "localhost:port",
  "localhost:123456",
  "localhost/",
  "a@localhost",
  "localhost@a",
  "localhost,evil",
  "localhost evil",
  "localhost\t",
  "[::1",
  "::1",
  "[::1]x",
  "[127.0.0.1]",
  "l\xf6calhost",
  "localhost..",
  "127.1",
  "0x7f.1",
  "2130706433",
  "http://localhost",
  "*",
  "localhost#",
  "localhost\x00",
  "[::1%25lo]",
  ".",
]


@pytest.mark.parametrize(
  "at, allowed, good, bad",
  [
    ("loopback", [], LOOPBACK, [*BAD, "192.0.2.7", "0.0.0.0", "[::]", "10.0.0.1", HERE]),
    ("loopback6", [], LOOPBACK, BAD),
    (
      "loopback",
      ["Chat.Example.", "192.0.2.9"],
      ["chat.example", "CHAT.example.:443", "192.0.2.9", *LOOPBACK],
      [*BAD, "example", "a.chat.example"],
    ),
    ("loopback", ["*"], [*LOOPBACK, "evil.example"], ["", "localhost@a", "localhost:80:80"]),
    ("wildcard", [], [*LOOPBACK, "192.0.2.7", "[2001:db8::1]:8000", HERE, f"{HERE}:8000", HERE.upper()], BAD),
    ("wildcard6", [], [*LOOPBACK, "192.0.2.7", HERE], BAD),
    ("one", [], ["192.0.2.7", "192.0.2.7:8000", HERE], [*BAD, "127.0.0.1", "localhost", "192.0.2.8"]),
  ],
)
def test_a_host_is_one_that_the_listener_goes_by(listeners, at, allowed, good, bad):
  host = listeners[at].getsockname()[0]
  hosts = Hosts(listeners[at], host, allowed)
  statuses = {name: answer(hosts, [("host", name)]) for name in [*good, *bad]}
  assert statuses == dict.fromkeys(good, 200) | dict.fromkeys(bad, 421)
  assert answer(hosts, [("host", good[0]), ("host", good[0])]) == 421


def test_the_name_that_the_listener_was_given_is_its_own(listeners):
  hosts = Hosts(listeners["one"], "server.example")
  assert answer(hosts, [("host", "server.example:8000")]) == 200


def test_without_a_host_only_an_old_probe_of_its_health_is_answered(listeners):
  hosts = Hosts(listeners["wildcard"], "0.0.0.0")
  assert answer(hosts, [], "/health", version="1.0") == 200
  assert answer(hosts, [], "/health") == 421
  assert answer(hosts, [], "/metrics", version="1.0") == 421
  assert answer(hosts, [("host", "evil.example")], "/health", version="1.0") == 421


@pytest.mark.parametrize(
  "at, host, allowed, origin, status",
  [
    ("loopback", "localhost:8000", [], "http://localhost:8000", 200),
    ("loopback", "localhost:8000", [], "http://127.0.0.1:3000", 200),
    ("loopback", "localhost:8000", [], "https://[::1]", 200),
    ("loopback", "localhost:8000", [], "http://evil.example:8000", 403),
    ("loopback", "localhost:8000", [], "null", 403),
    ("loopback", "localhost:8000", [], "", 403),
    ("loopback", "localhost:8000", [], "localhost:8000", 403),
    ("loopback", "localhost:8000", [], "file://localhost", 403),
    ("loopback", "localhost:8000", [], "http://localhost.evil.example", 403),
    ("loopback", "localhost:8000", [], "http://localhost@evil.example", 403),
    ("loopback", "localhost:8000", [], "http://localhost:8000/path", 403),
    ("loopback", "localhost:8000", [], "http://localhost http://evil.example", 403),
    ("loopback", "localhost:8000", [], "chrome-extension://abc", 403),
    ("loopback", "chat.example", ["chat.example"], "https://chat.example", 200),
    ("loopback", "chat.example", ["*"], "null", 200),
    ("wildcard", "192.0.2.7:8000", [], "http://192.0.2.7:8000", 200),
    ("wildcard", "192.0.2.7:8000", [], "http://192.0.2.66:8000", 403),
    ("wildcard", "192.0.2.7:8000", [], f"http://{HERE}", 403 if HERE == "evil.example" else 200),
    ("wildcard", f"{HERE}:8000", [], f"http://{HERE}:8000", 200),
    ("one", "192.0.2.7:8000", [], "http://192.0.2.7:8000", 200),
    ("one", "192.0.2.7:8000", [], "http://192.0.2.8:8000", 403),
  ],
)
def test_an_origin_is_a_page_of_this_server(listeners, at, host, allowed, origin, status):
  hosts = Hosts(listeners[at], listeners[at].getsockname()[0], allowed)
  for method in ("GET", "POST", "OPTIONS"):
    assert answer(hosts, [("host", host), ("origin", origin)], "/v1/chat/completions", method) == status
  assert answer(hosts, [("host", host), ("origin", origin), ("origin", origin)]) == (200 if allowed == ["*"] else 403)


@pytest.mark.parametrize("command", ["serve", "demo"])
@pytest.mark.parametrize("name", ["", "a:80", "http://a", "a b", "*.example", "[::1", "é"])
def test_a_wrong_allowed_host_is_refused_before_anything_is_loaded(capsys, command, name):
  assert main([command, "--checkpoint=nowhere", "--port=0", f"--allowed_host={name}"]) == 2
  error = capsys.readouterr().err
  assert "--allowed_host=" in error and error.count("\n") == 1
