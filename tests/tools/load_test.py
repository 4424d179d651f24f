"""Loads a server with mixed requests and checks every answer against the same request made offline.

python tests/tools/load_test.py                                   # 200 requests from 16 clients, a random tiny model
python tests/tools/load_test.py --checkpoint=runs/stage3 --requests=1000 --clients=32

The server runs as a process of its own. Questions (text, one picture or two, several turns, streamed or whole, greedy
or sampled) have to give the text of `Pipeline.understand`, token for token; pictures may differ by one level of 255
where other pictures shared their batch. Then come the bad requests, each of which has to get a 4xx and one line.
Exit code 0 when nothing was lost, nothing wrong and memory flat.
"""

import argparse
import base64
import concurrent.futures
import io
import json
import os
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

root = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(root), str(root / "tests")]

TOKEN = "load-test"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
WORDS = "a red blue ring circle star picture of what color is the left one two why how many near small 世界 🙂".split()


# --- requests ---------------------------------------------------------------------------------------------

_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no part in this


def send(url: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 600) -> tuple[int, bytes]:
  """Posts `body` (bytes, or what becomes JSON), or gets where it is None; returns (status, what came back)."""
  data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
  request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | (headers or {}))
  try:
    with _opener.open(request, timeout=timeout) as answer:
      return answer.status, answer.read()
  except urllib.error.HTTPError as error:
    with error:
      return error.code, error.read()


def data_uri(picture: np.ndarray, kind: str = "PNG") -> str:
  """uint8[H, W, 3] as a data URI."""
  file = io.BytesIO()
  Image.fromarray(picture).save(file, kind, lossless=True)
  return f"data:image/{kind.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def make_request(i: int) -> dict[str, Any]:
  """Request i: its path, its body, and (for the offline run) the pictures that the body holds."""
  rng = random.Random(i)
  words = lambda n: " ".join(rng.choices(WORDS, k=n))
  if i % 4 == 3:
    body = {
      "prompt": words(rng.randint(1, 12)),
      "n": rng.choice((1, 1, 2, 3)),
      "steps": rng.choice((4, 8)),
      "guidance": rng.choice((1.0, 3.0)),
      "seed": rng.randrange(2**31),
    }
    return {"path": "/v1/images/generations", "body": body, "pictures": []}
  pictures = [
    np.random.default_rng(1000 * i + j).integers(0, 256, (rng.randint(8, 40), rng.randint(8, 40), 3), np.uint8)
    for j in range(rng.choice((0, 1, 1, 2)))
  ]
  parts = [{"type": "image_url", "image_url": {"url": data_uri(x, rng.choice(("PNG", "WEBP")))}} for x in pictures]
  turns = [{"role": "user", "content": [*parts, {"type": "text", "text": words(rng.randint(1, 20))}]}]
  if rng.random() < 0.3:
    turns += [{"role": "assistant", "content": words(4)}, {"role": "user", "content": words(5)}]
  body = {
    "messages": turns,
    "max_tokens": rng.randint(1, 24),
    "temperature": rng.choice((0.0, 0.0, 0.8)),
    "top_p": rng.choice((1.0, 0.9)),
    "seed": rng.randrange(2**31),
    "stream": rng.random() < 0.5,
  }
  return {"path": "/v1/chat/completions", "body": body, "pictures": pictures}


def offline(model: Any, requests: list[dict[str, Any]]) -> list[Any]:
  """The same requests made with the pipeline, one at a time: a text, or a list of uint8[H, W, 3]."""
  out, questions = [None] * len(requests), {}
  for i, request in enumerate(tqdm(requests, desc="offline", disable=not sys.stderr.isatty())):
    body = request["body"]
    if request["path"].endswith("generations"):
      options = {name: body[name] for name in ("steps", "guidance", "seed")}
      painted = model.generate([body["prompt"]], num_images=body["n"], batch_size=1, **options)
      out[i] = [np.asarray(x) for x in painted]
      continue
    turns = []
    for message in body["messages"]:
      content = message["content"]
      if not isinstance(content, str):
        shown = len(content) - 1
        content = "<image>" * shown + ("\n" if shown else "") + content[-1]["text"]
      turns.append({"role": message["role"], "content": content})
    options = {name: body[name] for name in ("max_tokens", "temperature", "top_p", "seed")}
    questions[i] = model.request(turns, request["pictures"], **options)
  for i, text in zip(questions, model.understand_batch(list(questions.values()), batch_size=1)):
    out[i] = text
  return out


def online(base: str, request: dict[str, Any]) -> Any:
  """The server's answer, as `offline` gives it; raises where it is not a whole and good one."""
  status, answer = send(base + request["path"], request["body"], HEADERS)
  check(status == 200, f"{status} {answer[:300]!r}")
  if request["body"].get("stream"):
    events = [line.removeprefix("data: ") for line in answer.decode().splitlines() if line]
    check(events[-1] == "[DONE]", "the stream has no [DONE]")
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    check(
      [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1),
      "finish_reason before the end",
    )
    check(choices[-1]["finish_reason"] in ("stop", "length"), "no finish_reason at the end")
    return "".join(choice["delta"].get("content", "") for choice in choices)
  if request["path"].endswith("generations"):
    files = [base64.b64decode(x["b64_json"]) for x in json.loads(answer)["data"]]
    return [np.asarray(Image.open(io.BytesIO(file))) for file in files]
  return json.loads(answer)["choices"][0]["message"]["content"]


def check(ok: bool, message: str) -> None:
  if not ok:
    raise RuntimeError(message)


def same(got: Any, want: Any) -> bool:
  """Texts are equal; pictures differ by a level at most."""
  if isinstance(want, str):
    return got == want
  return len(got) == len(want) and all(
    a.shape == b.shape and np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(got, want)
  )


# --- bad requests -----------------------------------------------------------------------------------------


def bad_requests(image_size: int, context: int, max_body: int) -> dict[str, tuple[int, dict[str, Any]]]:
  """Fault -> (the status that it gets, its path, body and headers)."""
  chat, paint = "/v1/chat/completions", "/v1/images/generations"
  say = lambda content, **more: dict(path=chat, body={"messages": [{"role": "user", "content": content}], **more})
  show = lambda url: say([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}])
  raw = lambda content, kind="application/json": dict(path=chat, body=content, headers={"Content-Type": kind})
  draw = lambda **body: dict(path=paint, body=body)
  cut = data_uri(np.zeros((32, 32, 3), np.uint8) + np.arange(32, dtype=np.uint8)[:, None])
  bomb = io.BytesIO()
  Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
  return {
    "no token": (401, say("Why?") | {"headers": {"Authorization": ""}}),
    "a wrong token": (401, say("Why?") | {"headers": {"Authorization": "Bearer no"}}),
    "not JSON": (400, raw(b"{'messages': 1}")),
    "JSON of another type": (400, raw(b"[1, 2]")),
    "JSON nested without end": (400, raw(b'{"messages":' + b"[" * 100_000)),
    "not UTF-8": (400, raw(b'{"messages": "\xff\xfe"}')),
    "NaN": (400, raw(b'{"messages": [{"role": "user", "content": "Why?"}], "temperature": NaN}')),
    "another content type": (415, raw(b"messages=1", "application/x-www-form-urlencoded")),
    "a body that is too long": (413, raw(b" " * (max_body + 1))),
    "an unknown path": (404, dict(path="/v1/completions", body={})),
    "an unknown model": (404, say("Why?", model="gpt-nothing")),
    "no messages": (400, dict(path=chat, body={})),
    "an empty conversation": (400, dict(path=chat, body={"messages": []})),
    "an empty question": (400, say("  ")),
    "an unknown role": (400, dict(path=chat, body={"messages": [{"role": "robot", "content": "Why?"}]})),
    "an answer at the end": (400, dict(path=chat, body={"messages": [{"role": "assistant", "content": "So."}]})),
    "a field with a typo": (400, say("Why?", temprature=1)),
    "a lone surrogate": (400, raw(b'{"messages": [{"role": "user", "content": "\\ud800"}]}')),
    "a NUL character": (400, say("a\x00b")),
    "a negative temperature": (400, say("Why?", temperature=-1)),
    "top_p of 0": (400, say("Why?", top_p=0)),
    "max_tokens of 0": (400, say("Why?", max_tokens=0)),
    "a seed that is no number": (400, say("Why?", seed="one")),
    "a prompt longer than the context": (400, say("why " * (2 * context))),
    "two choices": (400, say("Why?", n=2)),
    "a remote image": (400, show("https://example.com/a.png")),
    "an image on the server's disk": (400, show("file:///etc/passwd")),
    "a path as an image": (400, show("/etc/passwd")),
    "an image that is not base64": (400, show("data:image/png;base64,&&&&")),
    "an image that is a text": (400, show("data:image/png;base64," + base64.b64encode(b"no picture").decode())),
    "half an image": (400, show(cut[: len(cut) // 2 // 4 * 4 + 2].rstrip("=")[:-2])),
    "an image bomb": (400, show("data:image/png;base64," + base64.b64encode(bomb.getvalue()).decode())),
    "an empty prompt": (400, draw(prompt=" ")),
    "a prompt longer than its context": (400, draw(prompt="why " * (2 * context))),
    "0 steps": (400, draw(prompt="a ring", steps=0)),
    "steps without end": (400, draw(prompt="a ring", steps=10**9)),
    "guidance between 0 and 1": (400, draw(prompt="a ring", guidance=0.5)),
    "an unknown solver": (400, draw(prompt="a ring", solver="dopri")),
    "too many pictures": (400, draw(prompt="a ring", n=1000)),
    "another size": (400, draw(prompt="a ring", size=f"{image_size + 1}x{image_size + 1}")),
    "a link instead of a picture": (400, draw(prompt="a ring", response_format="url")),
  }


def refused(base: str, status: int, arguments: dict[str, Any]) -> str:
  """Sends a bad request; returns what is wrong with its answer, "" for nothing."""
  headers = HEADERS | arguments.get("headers", {})
  got, answer = send(base + arguments["path"], arguments["body"], headers, timeout=60)
  try:
    line = json.loads(answer)["error"]["message"]
  except (ValueError, KeyError, TypeError):
    return f"no error in JSON: {answer[:100]!r}"
  if got != status:
    return f"{got} in place of {status}: {line}"
  return "" if line and "\n" not in line and len(line) < 300 else f"not one line: {line!r}"


# --- the server -------------------------------------------------------------------------------------------


def random_checkpoint(directory: pathlib.Path) -> pathlib.Path:
  """Writes the tests' tiny model, its weights random, as a checkpoint."""
  import jax
  import tiny

  from jflow.data.tokenizer import Tokenizer
  from jflow.interop.native import save_params

  config = {"model": tiny.CONFIG.to_dict(), "data": {"template": "plain"}}
  save_params(directory, jax.tree.map(np.asarray, tiny.params()), config, Tokenizer.load(str(tiny.TOKENIZER)))
  return directory


def start(checkpoint: pathlib.Path, *flags: str) -> tuple[subprocess.Popen, str]:
  """Starts a server at a free port; returns it and its address once it is ready."""
  command = [sys.executable, "-m", "jflow", "serve", f"--checkpoint={checkpoint}", "--port=0", *flags]
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))}
  log = tempfile.TemporaryFile("w+")
  server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
  address = re.search(r"http://[^;]+", server.stdout.readline())
  ready = server.stdout.readline()
  if address and ready.startswith("serving ") and f"at {address[0]};" in ready:
    return server, address[0]
  log.seek(0)
  raise SystemExit(f"the server ended with code {server.wait()}:\n{log.read()[-2000:]}")


def memory(pid: int) -> float:
  """Resident memory of a process in MiB."""
  pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(base: str, pid: int, wanted: list[tuple[dict, Any]], clients: int) -> dict[str, Any]:
  """Sends every request once, `clients` at a time; returns what came back and what it cost."""
  lost, wrong, seconds, sizes = [], [], [], []

  def one(i: int) -> None:
    started = time.monotonic()
    try:
      got = online(base, wanted[i][0])
    except Exception as error:
      lost.append(f"request {i}: {type(error).__name__}: {error}")
      return
    seconds.append(time.monotonic() - started)
    if not same(got, wanted[i][1]):
      wrong.append(i)
    sizes.append(memory(pid))

  started = time.monotonic()
  with concurrent.futures.ThreadPoolExecutor(clients) as pool:
    answers = pool.map(one, range(len(wanted)))
    list(tqdm(answers, total=len(wanted), unit="request", disable=not sys.stderr.isatty()))
  wall = time.monotonic() - started
  return {
    "requests": len(wanted),
    "clients": clients,
    "lost": lost,
    "wrong": wrong,
    "wall_seconds": round(wall, 2),
    "requests_per_second": round(len(wanted) / wall, 2),
    "seconds": seconds,
    "memory": sizes,
  }


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--checkpoint", type=pathlib.Path, help="default: a tiny model with random weights")
  p.add_argument("--requests", type=int, default=200)
  p.add_argument("--clients", type=int, default=16)
  p.add_argument(
    "--rounds",
    type=int,
    default=4,
    help="times that all are sent; the first half compiles (default %(default)s)",
  )
  p.add_argument("--json", type=pathlib.Path, metavar="FILE")
  args = p.parse_args()

  import jflow

  with tempfile.TemporaryDirectory() as directory:
    checkpoint = args.checkpoint or random_checkpoint(pathlib.Path(directory) / "tiny")
    model = jflow.load(checkpoint)
    requests = [make_request(i) for i in range(args.requests)]
    wanted = list(zip(requests, offline(model, requests)))
    max_body = 1
    server, base = start(checkpoint, f"--token={TOKEN}", f"--max_body={max_body}", f"--queue={2 * args.clients}")
    try:
      rounds = [run(base, server.pid, wanted, args.clients) for _ in range(args.rounds)]
      c = model.model.config
      bad = bad_requests(c.image_size, c.language_model.max_length, max_body * 2**20)
      answers = {name: refused(base, *request) for name, request in bad.items()}
    finally:
      server.send_signal(signal.SIGTERM)
      code = server.wait(60)
  report = summary(rounds, answers, code)
  if args.json:
    args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
  print(line(report))
  for problem in [
    *report["lost"],
    *(f"request {i}: a wrong answer" for i in report["wrong"]),
    *report["bad_wrong"],
    *(["memory grows from request to request"] if report["memory_grows"] else []),
  ]:
    print(" ", problem)
  return 0 if report["ok"] else 1


def summary(rounds: list[dict], answers: dict[str, str], code: int) -> dict[str, Any]:
  """All rounds as one report.

  Memory is judged over the second half, since batches of new sizes compile in the first; a single round is not judged.
  """
  last, later = rounds[-1], [size for r in rounds[len(rounds) // 2 :] for size in r["memory"]]
  slope = float(np.polyfit(np.arange(len(later)), later, 1)[0]) if len(later) > 1 else 0.0
  report = {
    "requests": sum(r["requests"] for r in rounds),
    "clients": last["clients"],
    "lost": [x for r in rounds for x in r["lost"]],
    "wrong": sorted({x for r in rounds for x in r["wrong"]}),
    "wall_seconds": [r["wall_seconds"] for r in rounds],
    "requests_per_second": last["requests_per_second"],
    "seconds": {"median": statistics.median(last["seconds"] or [0]), "max": max(last["seconds"], default=0)},
    "memory_mib": {
      "first": round(later[0], 1),
      "last": round(later[-1], 1),
      "slope_mib_per_100_requests": round(100 * slope, 3),
    },
    "bad_requests": len(answers),
    "bad_wrong": [f"{name}: {x}" for name, x in answers.items() if x],
    "exit_code": code,
  }
  report["memory_grows"] = len(rounds) > 1 and slope * len(later) >= 0.02 * later[-1]
  report["ok"] = not (report["lost"] or report["wrong"] or report["bad_wrong"] or code or report["memory_grows"])
  return report


def line(report: dict[str, Any]) -> str:
  """The report in one line."""
  r, m = report, report["memory_mib"]
  return (
    f"{'ok' if r['ok'] else 'FAILED'}: {r['requests']} requests from {r['clients']} clients, {len(r['lost'])} lost, "
    f"{len(r['wrong'])} wrong, {r['requests_per_second']:.1f}/s, median {r['seconds']['median']:.2f} s, "
    f"max {r['seconds']['max']:.2f} s; memory {m['last']:.0f} MiB, {m['slope_mib_per_100_requests']:+.2f} MiB per 100 "
    f"requests; {r['bad_requests'] - len(r['bad_wrong'])} of {r['bad_requests']} bad requests refused in one line; "
    f"exit code {r['exit_code']}"
  )


if __name__ == "__main__":
  sys.exit(main())
