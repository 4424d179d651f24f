"""Instructions of a compiled program, read from its text, and the devices that its collectives run over."""

import dataclasses
import math
import re

import numpy as np

_BYTES = {
  "pred": 1,
  "s4": 1,
  "u4": 1,
  "s8": 1,
  "u8": 1,
  "f8e4m3fn": 1,
  "f8e5m2": 1,
  "s16": 2,
  "u16": 2,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"^(\(.*?\)|[a-z0-9]+\[[^ ]*)\s+([a-z][\w\-]*)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Op:
  """An HLO instruction."""

  name: str
  shape: str
  code: str
  operands: tuple[str, ...]
  text: str
  root: bool


def dims(text: str) -> list[int]:
  """The dimensions of the first array shape in a text."""
  found = SHAPE.search(text)
  return [int(x) for x in found.group(2).split(",") if x] if found else []


def size(text: str) -> int:
  """Bytes of all array shapes in a text."""
  arrays = ((_BYTES.get(kind, 0), d) for kind, d in SHAPE.findall(text))
  return sum(k * math.prod(int(x) for x in d.split(",") if x) for k, d in arrays)


def main_memory(text: str) -> int:
  """Bytes of the array shapes in a text, without those that TPU keeps in its on-chip memory (S(1))."""
  return size(re.sub(r"\b[a-z]+[0-9]*[a-z0-9]*\[[0-9,]*\]\{[^}]*S\(1\)[^}]*\}", "", text))


def parse(text: str) -> tuple[dict[str, list[Op]], str]:
  """The instructions of each computation of a module, and the name of its entry."""
  computations: dict[str, list[Op]] = {}
  current, entry = None, ""
  for line in text.splitlines():
    if not line.startswith(" "):
      start = re.match(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(.*->.*\{\s*$", line)
      if start:
        current = computations.setdefault(start.group(2), [])
        entry = start.group(2) if start.group(1) else entry
      elif line.rstrip() == "}":
        current = None
    elif current is not None and (found := _LINE.match(line)):
      root, name, rest = found.groups()
      parts = _OPCODE.match(re.sub(r"/\*.*?\*/", "", rest))
      if parts:
        shape, code, tail = parts.groups()
        inside = tail[: _closing(tail)]
        current.append(Op(name, shape, code, tuple(re.findall(r"%([\w.\-]+)", inside)), tail, bool(root)))
  return computations, entry


def _closing(text: str) -> int:
  depth = 1
  for i, c in enumerate(text):
    depth += (c == "(") - (c == ")")
    if not depth:
      return i
  return len(text)


def full_bytes(op: Op, group: int) -> float:
  """Bytes of the whole buffer of a collective: gathered, reduced, or before it is scattered."""
  shapes = [f"{k}[{d}]" for k, d in SHAPE.findall(op.shape)]
  total, start = size(op.shape), op.code.endswith("-start")
  if op.code.startswith("all-gather"):
    return total * group / (group + 1) if start else total
  if op.code.startswith("reduce-scatter"):
    return total * group / (group + 1) if start else total * group
  return max(total / 2, max(map(size, shapes), default=0)) if start and len(shapes) > 1 else total


def axes_of(text: str, mesh: dict[str, int]) -> tuple[str, int]:
  """The mesh axes that a collective runs over ("data+fsdp"), and the number of devices that take part."""
  names, sizes = list(mesh), list(mesh.values())
  members = _group(text)
  places = []
  for device in members:
    place = []
    for n in reversed(sizes):
      device, at = divmod(device, n)
      place.append(at)
    places.append(place[::-1])
  axes = [a for i, a in enumerate(names) if len({p[i] for p in places}) > 1]
  return "+".join(axes) or "none", len(members)


def _group(text: str) -> list[int]:
  """The devices of the first replica group, or of the first pair of a permute."""
  pair = re.search(r"source_target_pairs=\{\{([\d,]+)\}", text)
  if pair:
    return [int(x) for x in pair.group(1).split(",")]
  named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? ?\{([^}]*)\}", text)
  if named:
    sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
    used = [i for i, name in enumerate(sizes) if f"'{name}'" in named.group(3)]
    ids = _iota(named.group(2)) if named.group(2) else np.arange(math.prod(sizes.values()))
    ids = ids.reshape(list(sizes.values()))
    first = tuple(slice(None) if i in used else 0 for i in range(len(sizes)))
    return ids[first].ravel().tolist()
  plain = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
  if plain:
    return [int(x) for x in plain.group(1).split(",")]
  iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", text)
  return _iota(iota.group(1))[0].tolist() if iota else [0]


def _iota(text: str) -> np.ndarray:
  """Devices in XLA's short form: [SHAPE]<=[DIMS]T(PERMUTATION) or, counting from 0 through DIMS permuted,
  [DIMS]T(...)."""
  shape, dims, order = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text).groups()
  ints = lambda s: [int(x) for x in s.split(",")]
  ids = np.arange(math.prod(ints(dims or shape))).reshape(ints(dims or shape))
  ids = ids.transpose(ints(order)) if order else ids
  return ids.reshape(ints(shape)) if dims else ids
