"""The launchers: each starts the same command, starts it again after a failure, and not after a mistake.

Slurm, gcloud and the trainer are stand-ins here that write down how they were called.
"""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny
import yaml

from jflow.training import config_files

LAUNCH = tiny.ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
FIELDS = ("--config=configs/stage2.py", "--workdir=/runs/two words", "--config.mesh.data=4")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
  subprocess.run(["bash", "-n", script], check=True)


class Stage:
  """Stand-ins on the PATH; `calls` is what they were called with, `codes` how the trainer ends each time."""

  def __init__(self, directory: pathlib.Path, codes: tuple[int, ...], trainer: str = ""):
    self._directory = directory
    self._log = directory / "calls"
    (directory / "codes").write_text("\n".join(map(str, codes)) + "\n")
    bin = directory / "venv" / "bin"
    bin.mkdir(parents=True)
    note = f'printf "%s\\n" "$(basename "$0") $(printf "[%s]" "$@")" >> {self._log}'
    train = (
      f'[ "$1" = -c ] && exec {sys.executable} "$@"\n{note}\n{trainer}\n'
      f"exec 9>{directory}/turn; flock 9; code=$(head -n1 {directory}/codes); sed -i 1d {directory}/codes\n"
      f'exit "${{code:-0}}"'
    )
    for name, body in {
      "python": train,
      "srun": f'{note}\nwhile [[ "$1" == --* ]]; do shift; done; exec "$@"',
      "scontrol": note,
      "gcloud": note,
    }.items():
      (bin / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
      (bin / name).chmod(0o755)
    self.environment = os.environ | {
      "PATH": f"{bin}:{os.environ['PATH']}",
      "JFLOW_VENV": str(directory / "venv"),
      "SLURM_JOB_ID": "17",
      "SLURM_SUBMIT_DIR": str(tiny.ROOT),
    }

  def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", LAUNCH / script, *arguments]
    return subprocess.run(command, env=self.environment | environment, capture_output=True, text=True, timeout=60)

  def calls(self, name: str) -> list[str]:
    lines = self._log.read_text().splitlines() if self._log.exists() else []
    return [line.removeprefix(name + " ") for line in lines if line.startswith(name + " ")]


ARGUMENTS = "".join(f"[{field}]" for field in FIELDS)
TRAIN = f"[-m][jflow][train]{ARGUMENTS}"


def test_local_starts_n_processes_that_know_each_other(tmp_path):
  stage = Stage(tmp_path, (0, 0, 0))
  done = stage.run("local.sh", "3", "--", *FIELDS)
  assert done.returncode == 0, done.stderr
  calls = stage.calls("python")
  assert len(calls) == 3 and all(call.startswith(TRAIN) for call in calls)
  assert all("[--config.distributed.processes=3]" in call for call in calls)
  ids = sorted(call.split("process_id=")[1] for call in calls)
  assert ids == ["0]", "1]", "2]"]
  assert len({call.split("coordinator=")[1].split("]")[0] for call in calls}) == 1


def test_local_gives_each_process_one_of_the_gpus_that_it_may_see(tmp_path):
  note = f'echo "$CUDA_VISIBLE_DEVICES" >> {tmp_path}/gpus'
  stage = Stage(tmp_path, (0, 0, 0, 0), note)
  seen = lambda: sorted((tmp_path / "gpus").read_text().split())
  assert stage.run("local.sh", "2", "--", *FIELDS, CUDA_VISIBLE_DEVICES="5,7,6").returncode == 0
  assert seen() == ["5", "7"]
  assert stage.run("local.sh", "2", "--", *FIELDS, CUDA_VISIBLE_DEVICES="").returncode == 0
  assert seen() == ["0", "1", "5", "7"]
  done = stage.run("local.sh", "2", "--", *FIELDS, CUDA_VISIBLE_DEVICES="3", JAX_PLATFORMS="")
  assert done.returncode == 2 and "names fewer GPUs than 2 processes" in done.stderr
  done = stage.run("local.sh", "2", "--", *FIELDS, CUDA_VISIBLE_DEVICES="-1", JAX_PLATFORMS="cpu")
  assert done.returncode == 0, done.stderr


def test_local_starts_again_after_a_failure_and_not_after_a_mistake(tmp_path):
  stage = Stage(tmp_path, (0, 1, 0, 0))
  assert stage.run("local.sh", "2", "--", *FIELDS, JFLOW_RESTARTS="2").returncode == 0
  assert len(stage.calls("python")) == 4
  (tmp_path / "other").mkdir()
  stage = Stage(tmp_path / "other", (2, 2, 0))
  assert stage.run("local.sh", "2", "--", *FIELDS, JFLOW_RESTARTS="2").returncode == 2
  assert len(stage.calls("python")) == 2
  done = stage.run("local.sh", "two", "--", *FIELDS)
  assert done.returncode == 2 and "bash launch/local.sh 2 --" in done.stderr
  done = subprocess.run(["bash", "local.sh"], cwd=LAUNCH, capture_output=True, text=True)
  assert done.returncode == 2 and "bash launch/local.sh 2 --" in done.stderr


def test_slurm_runs_one_task_per_gpu_and_requeues_a_failed_job(tmp_path):
  stage = Stage(tmp_path, (1, 0))
  stage.run("slurm.sh", *FIELDS)
  assert stage.calls("python") == [f"{TRAIN}[--config.distributed.cluster=auto]"]
  assert stage.calls("srun")[0].startswith("[--kill-on-bad-exit=1]")
  assert stage.calls("scontrol") == ["[requeue][17]"]
  assert stage.run("slurm.sh", *FIELDS).returncode == 0
  assert len(stage.calls("scontrol")) == 1


@pytest.mark.parametrize("code, restarts", [(2, "0"), (1, "10")])
def test_slurm_gives_up_on_a_mistake_and_after_ten_starts(tmp_path, code, restarts):
  stage = Stage(tmp_path, (code,))
  assert stage.run("slurm.sh", *FIELDS, SLURM_RESTART_COUNT=restarts).returncode == code
  assert stage.calls("scontrol") == []


def test_slurm_saves_before_the_time_limit_and_goes_back_into_the_queue(tmp_path):
  """Slurm sends USR1 to the script two minutes ahead; the trainer gets SIGTERM and ends with 143."""
  trainer = f"trap 'touch {tmp_path}/saved; exit 143' TERM; touch {tmp_path}/up; while :; do sleep 0.05; done"
  stage = Stage(tmp_path, (), trainer)
  process = subprocess.Popen(
    ["bash", LAUNCH / "slurm.sh", *FIELDS], env=stage.environment, stderr=subprocess.PIPE, text=True
  )
  until = time.monotonic() + 60
  while not (tmp_path / "up").exists() and time.monotonic() < until:
    time.sleep(0.02)
  process.send_signal(signal.SIGUSR1)
  process.communicate(timeout=60)
  assert (tmp_path / "saved").exists()
  assert stage.calls("scontrol") == ["[requeue][17]"]


@pytest.mark.parametrize("folder", ["", "/opt/my flow"])
def test_tpu_starts_the_same_command_on_every_vm(tmp_path, folder):
  stage = Stage(tmp_path, (134, 0))
  done = stage.run("tpu.sh", *FIELDS, TPU="pod", ZONE="us-east5-a", JFLOW_DIR=folder)
  assert done.returncode == 0, done.stderr
  (call,) = stage.calls("gcloud")
  assert "[pod][--zone=us-east5-a][--worker=all]" in call
  enter, remote = call.split("[--command=")[1].removesuffix("]").split("&& ", 1)
  entered = subprocess.run(["bash", "-c", f'cd() {{ echo "$#:$1"; }}; {enter}'], capture_output=True, text=True)
  assert entered.stdout == f"1:{folder or os.environ['HOME'] + '/jflow'}\n"
  remote = remote.replace("launch/tpu.sh", str(LAUNCH / "tpu.sh"))  # what a VM is asked to do
  (tmp_path / "venv" / "bin" / "sleep").symlink_to("/bin/true")
  done = subprocess.run(
    ["bash", "-c", remote],
    env=stage.environment,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 0 and "ended with code 134" in done.stderr
  assert stage.calls("python") == [f"{TRAIN}[--config.distributed.cluster=auto]"] * 2
  assert stage.run("tpu.sh", *FIELDS).returncode != 0  # no name


def _flags(platform: str, **environment: str) -> dict[str, str]:
  command = f"source {LAUNCH}/xla_flags.sh && jflow_xla_flags {platform} && env -0"
  clean = {"PATH": os.environ["PATH"]} | environment
  done = subprocess.run(["bash", "-euc", command], env=clean, capture_output=True, text=True)
  return dict(line.split("=", 1) for line in done.stdout.split("\0") if "=" in line) if not done.returncode else {}


def test_xla_knows_the_flags_and_a_users_own_wins():
  flags = _flags("gpu", XLA_FLAGS="--xla_gpu_all_gather_combine_threshold_bytes=7")["XLA_FLAGS"]
  assert flags.count("xla_gpu_all_gather_combine_threshold_bytes") == 1 and "threshold_bytes=7 " in flags
  code = "import jax; jax.jit(lambda x: x + 1)(1)"  # XLA ends the process over a flag that it does not know
  run = lambda flags: (
    subprocess.run(
      [sys.executable, "-c", code],
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
      capture_output=True,
    ).returncode
  )
  assert run(flags) == 0 and run(flags + " --xla_gpu_no_such_flag=1") != 0
  assert "windowed_einsum" in _flags("tpu")["LIBTPU_INIT_ARGS"]
  assert "hugetlb=1" in _flags("cpu")["GLIBC_TUNABLES"]
  assert _flags("cpu", GLIBC_TUNABLES="glibc.malloc.check=1")["GLIBC_TUNABLES"] == "glibc.malloc.check=1"
  assert not _flags("abacus")


# --- GKE --------------------------------------------------------------------------------------------------

# Of the JobSet API (jobset.x-k8s.io/v1alpha2) and of Job and Pod: what must be there, and what may be.
MUST = {
  "": {"apiVersion", "kind", "metadata", "spec"},
  "spec": {"replicatedJobs"},
  "spec.replicatedJobs": {"name", "template"},
  "spec.replicatedJobs.template.spec": {"template"},
  "spec.replicatedJobs.template.spec.template.spec": {"containers", "restartPolicy"},
  "spec.replicatedJobs.template.spec.template.spec.containers": {"name", "image", "command"},
}
MAY = {
  "metadata": {"name", "annotations"},
  "spec": {
    "replicatedJobs",
    "network",
    "successPolicy",
    "failurePolicy",
    "startupPolicy",
    "suspend",
    "coordinator",
    "managedBy",
    "ttlSecondsAfterFinished",
  },
  "spec.network": {"enableDNSHostnames", "subdomain", "publishNotReadyAddresses"},
  "spec.failurePolicy": {"maxRestarts", "rules", "restartStrategy"},
  "spec.failurePolicy.rules": {"name", "action", "targetReplicatedJobs", "onJobFailureReasons"},
  "spec.replicatedJobs": {"name", "template", "replicas", "groupName", "dependsOn"},
  "spec.replicatedJobs.template.spec": {
    "parallelism",
    "completions",
    "completionMode",
    "backoffLimit",
    "podFailurePolicy",
    "template",
    "activeDeadlineSeconds",
  },
}


def _objects(node: object, path: str = ""):
  """(path, object) of every mapping; lists share the path of their field."""
  if isinstance(node, list):
    for item in node:
      yield from _objects(item, path)
  if isinstance(node, dict):
    yield path, node
    for name, value in node.items():
      yield from _objects(value, f"{path}.{name}".strip("."))


@pytest.mark.parametrize("file", sorted((LAUNCH / "gke").glob("*.yaml")), ids=lambda path: path.name)
def test_a_manifest_is_a_jobset_that_starts_the_command(file, tmp_path):
  manifest = yaml.safe_load(file.read_text())
  assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  seen = dict.fromkeys(MUST, False)
  for path, node in _objects(manifest):
    if path in MUST:
      seen[path] = True
      assert MUST[path] <= set(node), path
    assert set(node) <= MAY.get(path, set(node)), path
  assert all(seen.values())
  spec = manifest["spec"]
  assert spec["failurePolicy"]["maxRestarts"] > 0
  assert {rule["action"] for rule in spec["failurePolicy"]["rules"]} <= {"FailJobSet", "RestartJobSet"}
  (job,) = spec["replicatedJobs"]
  job_spec = job["template"]["spec"]
  assert job_spec["parallelism"] == job_spec["completions"] and job_spec["completionMode"] == "Indexed"
  pod = job_spec["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # JobSet starts all again together; podFailurePolicy asks for it too
  (container,) = pod["containers"]
  assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
  (chips,) = container["resources"]["limits"].values()

  stage = Stage(tmp_path, (0,))
  (script,) = container["args"]
  script = script.replace(".venv/", f"{tmp_path}/venv/")
  done = subprocess.run(
    [*container["command"], script],
    cwd=tiny.ROOT,
    env=stage.environment | {"JOB_COMPLETION_INDEX": "3"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (call,) = stage.calls("python")
  assert call.startswith("[-m][jflow][train][--config=configs/stage2.py]")
  fields = dict(part.split("=", 1) for part in call.strip("[]").split("][") if "=" in part)
  mesh = int(fields["--config.mesh.data"]) * int(fields["--config.mesh.fsdp"])
  assert mesh == job.get("replicas", 1) * job_spec["parallelism"] * chips
  assert all(fields[f"--config.data.sources.{task}"] for task in ("understanding", "generation", "text"))
  # As many rows at once on each chip as launch/experiments/results/compile_table.md shows to fit.
  parts = [part for part in call.strip("[]").split("][") if part.startswith("--config")]
  config = config_files.load(parts[0].removeprefix("--config="), parts[1:])
  fit = {"nvidia.com/gpu": 4, "google.com/tpu": 1}[next(iter(container["resources"]["limits"]))]
  assert config.train.batch_size == fit * mesh * int(fields["--config.train.accumulation"])
  if "nvidia.com/gpu" in container["resources"]["limits"]:
    name = f"{manifest['metadata']['name']}-{job['name']}-0-0.{manifest['metadata']['name']}:"
    assert fields["--config.distributed.coordinator"].startswith(name)
    assert fields["--config.distributed.process_id"] == "3"
    assert int(fields["--config.distributed.processes"]) == job_spec["parallelism"]
  else:
    assert fields["--config.distributed.cluster"] == "auto"


@pytest.mark.parametrize("nodes", [1, 3])
def test_skypilot_starts_the_command_on_every_machine(tmp_path, nodes):
  """SkyPilot gives each machine the addresses of all, a line each, and its own number."""
  task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  assert set(task) == {"name", "num_nodes", "resources", "workdir", "file_mounts", "setup", "run"}
  assert set(task["resources"]) <= {"accelerators", "disk_size"} and task["file_mounts"]["/runs"]["mode"] == "MOUNT"
  subprocess.run(["bash", "-n", "-c", task["setup"]], check=True)
  stage = Stage(tmp_path, (0,))
  given = {
    "SKYPILOT_NUM_NODES": nodes,
    "SKYPILOT_NODE_RANK": nodes - 1,
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3",
  }
  done = subprocess.run(
    ["bash", "-c", task["run"].replace(".venv/", f"{tmp_path}/venv/")],
    cwd=tiny.ROOT,
    env=stage.environment | {name: str(value) for name, value in given.items()},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  (call,) = stage.calls("python")
  parts = [part for part in call.strip("[]").split("][") if part.startswith("--config")]
  config = config_files.load(parts[0].removeprefix("--config="), parts[1:])
  assert config.data.sources.generation == (("/runs/data/mine", 1.0),)
  found = config.distributed
  assert (found.processes, found.process_id) == (nodes, nodes - 1)
  assert found.coordinator == ("10.0.0.1:8476" if nodes > 1 else "")
