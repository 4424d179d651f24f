"""The tables of jflow/perf/README.md, stage 2 over TPU and GPU meshes of 8 to 256 chips, and of configs/README.md.

  python launch/experiments/compile_table.py launch/experiments/results/compile_table
  python launch/experiments/compile_table.py launch/experiments/results/compile_table_janus_1b janus/stage2:1b
  python launch/experiments/compile_table.py launch/experiments/results/compile_table_janus_7b janus/stage2:pro-7b
  python launch/experiments/compile_table.py fits configs/stage2.py --fits     # one H200: rows and remat, and what fits
  python launch/experiments/compile_table.py launch/experiments/results/tune_memory --tune    # what tuning takes of a GPU

Writes NAME.json and NAME.md, about 3 minutes a row on a free core; an interrupted run resumes. `--tune` with the name of a
recipe compiles that one alone.
"""

import itertools
import json
import pathlib
import subprocess
import sys
import tempfile

from tqdm import tqdm

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root))

from jflow import outputs
from jflow.chips import CHIPS
from jflow.perf.targets import Topology
from jflow.training import config_files

# Topology and rows per device; fsdp stays at 8 or 16 (TPU) or 8 (GPU), data grows. The smallest and the largest of each
# kind come first, since they show whether the cost per chip grows.
ROWS = (
  ("v5e:4x4", 1),
  ("v5e:16x16", 1),
  ("h100:2x8", 4),
  ("h100:32x8", 4),
  ("v5p:2x2x4", 4),
  ("v5p:4x8x8", 4),
  ("v6e:4x4", 2),
  ("v6e:16x16", 2),
  ("v5e:2x4", 1),
  ("h100:1x8", 4),
  ("v5p:2x2x2", 4),
  ("v6e:2x4", 2),
  ("v5e:8x8", 1),
  ("h100:8x8", 4),
  ("v5p:4x4x4", 4),
  ("v6e:8x8", 2),
)

CONFIG = "configs/stage2.py"
# Where Janus-Pro-7B fits: 16 bytes of state per trained parameter, cut over 16 TPU chips or 8 GPUs.
LARGE = (
  ("v5p:2x2x4", 1),
  ("v5p:4x8x8", 1),
  ("h100:2x8", 1),
  ("h100:32x8", 1),
  ("v5e:4x4", 1),
  ("v5e:16x16", 1),
  ("v5p:4x4x4", 1),
  ("h100:1x8", 1),
  ("h100:8x8", 1),
)

# One H200: what is kept for the backward pass, with all layers unrolled for "none" as `auto` has them, and rows.
GPU = "h200:1x1"
KEPT = ("full", "save:query,key,value,attended,gate,up", "none")
FITS = tuple((remat, rows) for rows in (4, 8) for remat in KEPT)
SIZES = {"80 GB": 72.3, "141 GB": 127.4}  # a device -> GiB of it that a program may use

# What tuning takes of one GPU: recipes, and what of each is compiled, remat and rows at once of the step's eight. Bytes are
# linear in rows at once but for buffers that the compiler shares, so the rows between are read off a line.
TUNED = ("tune", "tune:heads", "tune:full", "janus/tune:pro-1b", "janus/tune:pro-7b")
TUNE_ROWS, ENDS = 8, (1, 8)
TUNE_POINTS = tuple((remat, rows) for remat in ("full", "none") for rows in ENDS)
# A device -> GiB that a program may use: 0.92 of what the driver reports; of 24 GB, that is 22.5 GiB on an L4 or A10G.
DEVICES = {"24 GB": 20.7, "40 GB": 36.3, "80 GB": 72.3, "141 GB": 127.4}

# Full effort takes the TPU compiler far longer and changes only the memory of the result; see jflow/perf/README.md.
_EFFORT = {"tpu": -1.0, "gpu": 0.0}
# Fixed for the table; "auto" takes Triton on a GPU, see `attention.choose`.
_ATTENTION = {"tpu": "splash", "gpu": "cudnn"}


def write_table(name: pathlib.Path, config: str = CONFIG) -> int:
  """Compiles every row in its own process; writes NAME.json and NAME.md after each.

  Rows in NAME.json are reused, so that an interrupted run resumes; delete a row from the file to compile it again.
  """
  jobs = {row: lambda row=row: compiled(config, *row) for row in (LARGE if config.endswith("7b") else ROWS)}
  key = lambda report: report["topology"]
  return _written(name, {topology: job for (topology, _), job in jobs.items()}, key, _place, markdown)


def write_fits(name: pathlib.Path, config: str = CONFIG) -> int:
  """Compiles the step of one GPU for every number of rows and choice of what is kept, as `write_table` does its
  rows."""
  jobs = {}
  for remat, rows in FITS:
    fields = [f"--config.compute.remat={remat}"]
    if remat == "none":
      fields.append(f"--config.compute.unroll={config_files.load(config, ()).model.language_model.num_layers}")
    made = {"remat": remat, "rows_per_device": rows}
    jobs[remat, rows] = lambda made=made, fields=fields: made | compiled(config, GPU, made["rows_per_device"], *fields)
  key = lambda report: (report["remat"], report["rows_per_device"])
  return _written(name, jobs, key, lambda report: FITS.index(key(report)), fits)


def write_tune(name: pathlib.Path, *recipes: str) -> int:
  """Compiles the step of one H100 for every recipe, choice of what is kept and rows at once, as `write_table` its rows."""
  jobs = {}
  for recipe, (remat, rows) in itertools.product(recipes or TUNED, TUNE_POINTS):
    fields = [
      f"--config.compute.remat={remat}",
      f"--config.train.accumulation={TUNE_ROWS // rows}",
      "--config.compute.attention=auto",
    ]
    if remat == "none":
      fields.append(f"--config.compute.unroll={config_files.load(recipe, ()).model.language_model.num_layers}")
    made = {"recipe": recipe, "remat": remat, "rows": rows}
    jobs[recipe, remat, rows] = lambda made=made, fields=fields: (
      made | compiled(made["recipe"], "h100:1x1", made["rows"], *fields)
    )
  key = lambda report: (report["recipe"], report["remat"], report["rows"])
  place = lambda report: (TUNED.index(report["recipe"]), TUNE_POINTS.index((report["remat"], report["rows"])))
  return _written(name, jobs, key, place, tune)


def _written(name: pathlib.Path, jobs: dict, key, place, table) -> int:
  """Runs the jobs that NAME.json lacks, and writes NAME.json and NAME.md after each; returns 1 where one failed.

  Args:
    name: of the files, without their ending.
    jobs: key of a report -> what makes it.
    key: report -> its key.
    place: report -> its place in the table.
    table: reports -> Markdown.
  """
  file = name.with_suffix(".json")
  known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
  reports, failed = {key(report): report for report in known if "error" not in report}, {}
  for wanted, job in tqdm(jobs.items(), unit="program"):
    if wanted in reports:
      continue
    report = job()
    (failed if "error" in report else reports)[wanted] = report
    order = sorted((reports | failed).values(), key=place)
    file.parent.mkdir(parents=True, exist_ok=True)
    outputs.replace(file, json.dumps(order, indent=1) + "\n")
    outputs.replace(name.with_suffix(".md"), table(order))
  print(f"table: {name.with_suffix('.md')}", file=sys.stderr)
  return 1 if failed else 0


def compiled(config: str, topology: str, rows: int, *fields: str) -> dict:
  """The report of a row, or its error, from its own process, so that the compiler's memory is freed."""
  platform = Topology.parse(topology).chip.platform
  effort, attention = _EFFORT[platform], _ATTENTION[platform]
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "report.json"
    command = [
      sys.executable,
      "-m",
      "jflow",
      "compile",
      f"--config={config}",
      f"--topology={topology}",
      f"--rows_per_device={rows}",
      f"--effort={effort}",
      f"--json={file}",
      f"--config.compute.attention={attention}",  # one of `fields` comes after it, and counts
      *(fields or ("--config.compute.remat=full",)),  # the same for all, and soon compiled
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    if file.exists():
      return json.loads(file.read_text(encoding="utf-8"))
  error = (done.stderr.strip().splitlines() or ["?"])[-1]
  print(f"{topology}: {error}", file=sys.stderr)
  return {"topology": topology, "error": error}


def _place(report: dict) -> tuple[int, int]:
  """The sort key of a report: kinds in the order of CHIPS, small meshes first."""
  topology = Topology.parse(report["topology"])
  return list(CHIPS).index(topology.kind), topology.chips


def markdown(reports: list[dict]) -> str:
  """The table as Markdown."""
  lines = [
    "| topology | data x fsdp | rows per chip | state + temporaries, GiB | fits | TFLOP | collectives, GB "
    "| compute / memory / network, ms | bound by | MFU at most | predicted by launch, ms | compile, s |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for r in reports:
    if "seconds" not in r:
      why = r.get("error") or f"{r['memory_gib']['total']:.1f} GiB of {r['memory_gib']['limit']:.1f}"
      lines.append(f"| {r['topology']} | | | | no | {why} | | | | | | |")
      continue
    m, s, launched = r["memory_gib"], r["seconds"], r.get("seconds_by_launch")
    state = m["total"] - m["temporaries"]
    lines.append(
      f"| {r['topology']} | {r['mesh']['data']} x {r['mesh']['fsdp']} | {r['rows_per_device']} "
      f"| {state:.1f} + {m['temporaries']:.1f} | {'yes' if r['fits'] else 'no'} "
      f"| {(r['flops']['program'] + r['flops']['kernels']) / 1e12:.0f} | {r['collective_bytes_total'] / 1e9:.1f} "
      f"| {1e3 * s['compute']:.0f} / {1e3 * s['memory']:.0f} / {1e3 * s['network']:.0f} | {r['bound']} "
      f"| {100 * r['mfu_at_most']:.0f} % | {f'{1e3 * launched:.0f}' if launched else ''} | {r['compile_seconds']:.0f} |"
    )
  return "\n".join(lines) + "\n"


def fits(reports: list[dict]) -> str:
  """The memory of a device and the time of its step, by what is kept and rows, as Markdown; attention's time
  included."""
  lines = [
    f"| remat | rows | GiB of a device | executed TFLOP | predicted ms of 4 rows | {' | '.join(f'fits {n}' for n in SIZES)} |",
    "| --- | ---: | ---: | ---: | ---: " + "| --- " * len(SIZES) + "|",
  ]
  for r in reports:
    start = f"| {r['remat']} | {r['rows_per_device']} |"
    if "error" in r:
      lines.append(f"{start} {r['error']} | | |" + " |" * len(SIZES))
      continue
    total = r["memory_gib"]["total"]
    verdicts = " | ".join("yes" if total <= room else "no" for room in SIZES.values())
    work = f"{r['executed_flops'] / 1e12:.0f}" if "executed_flops" in r else ""
    time = f"{4e3 * r['seconds_by_launch'] / r['rows_per_device']:.0f}" if "seconds_by_launch" in r else ""
    lines.append(f"{start} {total:.1f} | {work} | {time} | {verdicts} |")
  return "\n".join(lines) + "\n"


def tune(reports: list[dict]) -> str:
  """The memory of a step by recipe, remat and rows at once, and the most rows at once that fit a device, as Markdown."""
  lines = [
    f"| | recomputed | GiB at 1 row | at {ENDS[-1]} | s a step, predicted | {' | '.join(DEVICES)} |",
    "| --- | --- | ---: | ---: | ---: " + "| --- " * len(DEVICES) + "|",
  ]
  found = {(r["recipe"], r["remat"], r["rows"]): r for r in reports}
  for recipe, remat in itertools.product(TUNED, ("full", "none")):
    points = [found.get((recipe, remat, rows)) for rows in ENDS]
    points = [point for point in points if point and "error" not in point]
    if not points or points[0]["rows"] > 1:
      continue
    total = {point["rows"]: point["memory_gib"]["total"] for point in points}
    each = (total[max(total)] - total[1]) / max(1, max(total) - 1)
    takes = {rows: total[1] + each * (rows - 1) for rows in (1, 2, 4, 8) if rows <= max(total)}
    most = [max((rows for rows, needed in takes.items() if needed <= room), default="no") for room in DEVICES.values()]
    most = [f"{rows} at least" if len(points) == 1 and rows == 1 else rows for rows in most]
    seconds = " to ".join(f"{point['seconds_by_launch']:.2f}" for point in points)
    kept = "all" if remat == "full" else "nothing"
    sizes = " | ".join(f"{total[rows]:.1f}" if rows in total else "" for rows in ENDS)
    lines.append(f"| `{recipe}` | {kept} | {sizes} | {seconds} | {' | '.join(map(str, most))} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  words = [word for word in sys.argv[1:] if word not in ("--fits", "--tune")]
  if len(words) not in (1, 2) or words[0].startswith("-"):
    sys.exit(__doc__)
  write = write_fits if "--fits" in sys.argv else write_tune if "--tune" in sys.argv else write_table
  sys.exit(write(pathlib.Path(words[0]), *words[1:]))
