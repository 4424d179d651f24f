"""The table of the README: stage 2 at 384 over TPU and GPU meshes of 8 to 256 chips."""

import json
import pathlib
import subprocess
import sys
import tempfile

from tqdm import tqdm

# Topology and rows per device; fsdp stays at 16 (TPU) or 8 (GPU), data grows.
ROWS = (
  ("v5e:2x4", 1), ("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 1),
  ("v5p:2x2x2", 4), ("v5p:2x2x4", 4), ("v5p:4x4x4", 4), ("v5p:4x8x8", 4),
  ("v6e:2x4", 2), ("v6e:4x4", 2), ("v6e:8x8", 2), ("v6e:16x16", 2),
  ("h100:1x8", 4), ("h100:2x8", 4), ("h100:8x8", 4), ("h100:32x8", 4),
)  # fmt: skip


def write_table(name: pathlib.Path) -> int:
  """Compiles every row in a process of its own; writes NAME.json after each, and NAME.md."""
  reports = []
  for topology, rows in tqdm(ROWS, unit="mesh"):
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / "report.json"
      command = [
        sys.executable, "-m", "jflow", "compile", "--config=configs/stage2.py", f"--topology={topology}",
        f"--rows_per_device={rows}", f"--json={file}",
      ]  # fmt: skip
      done = subprocess.run(command, capture_output=True, text=True)
      if file.exists():
        reports.append(json.loads(file.read_text(encoding="utf-8")))
      else:
        reports.append({"topology": topology, "error": (done.stderr.strip().splitlines() or ["?"])[-1]})
        print(f"{topology}: {reports[-1]['error']}", file=sys.stderr)
    name.with_suffix(".json").write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
  name.with_suffix(".md").write_text(markdown(reports), encoding="utf-8")
  print(f"table: {name.with_suffix('.md')}", file=sys.stderr)
  return 1 if any("error" in report for report in reports) else 0


def markdown(reports: list[dict]) -> str:
  """The table for people."""
  lines = [
    "| topology | data x fsdp | rows per chip | state + temporaries, GiB | fits | TFLOP | collectives, GB "
    "| compute / memory / network, ms | bound by | MFU at most | compile, s |",
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
  ]
  for r in reports:
    if "seconds" not in r:
      why = r.get("error") or f"{r['memory_gib']['total']:.1f} GiB of {r['memory_gib']['limit']:.1f}"
      lines.append(f"| {r['topology']} | | | | no | {why} | | | | | |")
      continue
    m, s = r["memory_gib"], r["seconds"]
    state = m["total"] - m["temporaries"]
    lines.append(
      f"| {r['topology']} | {r['mesh']['data']} x {r['mesh']['fsdp']} | {r['rows_per_device']} "
      f"| {state:.1f} + {m['temporaries']:.1f} | {'yes' if r['fits'] else 'no'} "
      f"| {(r['flops']['program'] + r['flops']['kernels']) / 1e12:.0f} | {r['collective_bytes_total'] / 1e9:.1f} "
      f"| {1e3 * s['compute']:.0f} / {1e3 * s['memory']:.0f} / {1e3 * s['network']:.0f} | {r['bound']} "
      f"| {100 * r['mfu_at_most']:.0f} % | {r['compile_seconds']:.0f} |"
    )
  return "\n".join(lines) + "\n"
