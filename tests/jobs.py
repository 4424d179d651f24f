"""Starts the processes of a training run as a cluster does, and waits for them."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import tiny

WORKER = ("tests/hosts_worker.py",)
TRAIN = ("-m", "jflow", "train")


class Job:
  """Processes that train one model together; use it in a `with`, so that none outlives the test."""

  def __init__(
    self, directory: pathlib.Path, program: tuple[str, ...], *fields: str, processes=2, devices=1, heartbeat=6
  ):
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": str(devices),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    together = (f"--config.distributed.coordinator={address}", f"--config.distributed.processes={processes}")
    together += (f"--config.distributed.heartbeat_seconds={heartbeat}",)
    self._logs = [directory / f"process_{i}.log" for i in range(processes)]
    self.processes = []
    for i, log in enumerate(self._logs):
      more = (*together, f"--config.distributed.process_id={i}") if processes > 1 else ()
      with open(log, "w") as file:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, *program, *fields, *more],
            cwd=tiny.ROOT,
            env=environment,
            stdout=file,
            stderr=file,
          )
        )

  def __enter__(self) -> "Job":
    return self

  def __exit__(self, *_) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def codes(self, seconds: float = 120.0) -> list[int | None]:
    """Exit codes, None for a process that has not ended after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(p.poll() is None for p in self.processes):
      time.sleep(0.05)
    return [p.poll() for p in self.processes]

  def said(self, process: int) -> str:
    """The text that a process has printed, without the lines of the library under the collectives."""
    lines = self._logs[process].read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "[Gloo]" not in line and "connected peer ranks" not in line)

  def wait_for(self, ready, seconds: float = 120.0) -> None:
    """Waits until `ready()` holds or a process has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not ready() and all(p.poll() is None for p in self.processes):
      time.sleep(0.005)
    assert ready(), [self.said(i) for i in range(len(self.processes))]

  def send(self, process: int, signum: int = signal.SIGTERM) -> None:
    self.processes[process].send_signal(signum)
