"""Serves `bench --versus`: runs torch_reference.py or janus_reference.py in a process of its own, a line per request.

python tests/parity/torch_worker.py DIR DTYPE

A request {"do": "load", "file": NPZ} takes the inputs of the following runs; {"do": "solve" | "draw" | "decode" |
"answer", "save": NPZ or null, ...} runs them and replies once it is done. The process waits without using a core in
between.
"""

import json
import os
import pathlib
import sys
import time

import numpy as np
import torch
from janus_reference import JanusReference
from torch_reference import Reference


def main() -> None:
  directory, dtype = pathlib.Path(sys.argv[1]), getattr(torch, sys.argv[2])
  torch.set_num_threads(len(os.sched_getaffinity(0)))  # a barrier over more threads than cores waits
  device = "cuda" if torch.cuda.is_available() else "cpu"
  kind = JanusReference if (directory / "janus").is_dir() else Reference
  reference, given = kind(directory, device, dtype), {}
  put = lambda name: torch.from_numpy(given[name]).to(device)

  def run(request: dict) -> torch.Tensor:
    if request["do"] == "solve":
      return reference.solve(
        put("tokens").long(), given["lengths"].tolist(), put("noise"), request["steps"], request["guidance"]
      )
    if request["do"] == "draw":
      return reference.draw(put("tokens").long(), given["ids"].tolist(), request["guidance"])
    if request["do"] == "decode":
      return reference.decode(put("written"))
    starts = [[int(at) for at in row if at >= 0] for row in given["starts"]]
    return reference.answer(put("tokens").long(), given["lengths"].tolist(), starts, put("pixels"), request["count"])

  say = lambda body: print(json.dumps(body), flush=True)
  say({"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "torch": torch.__version__})
  for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "load":
      given = dict(np.load(request["file"]))
      say({})
      continue
    start, cpu = time.perf_counter(), time.process_time()
    out = run(request)
    if device == "cuda":
      torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if request.get("save"):
      np.savez(request["save"], out=out.float().cpu().numpy() if out.is_floating_point() else out.cpu().numpy())
    say({"seconds": seconds, "cpu_seconds": cpu})


if __name__ == "__main__":
  main()
