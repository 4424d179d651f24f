"""Cost analysis of a compiled program's text: FLOPs of products, bytes of memory traffic, bytes of collectives.

XLA's own cost analysis counts the body of a loop once, which misses nearly all work of layers under a scan. Here
loops are counted once per iteration. Products inside Pallas and cuDNN calls are invisible: `kernels` counts the calls.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

from jflow.perf.hlo_text import SHAPE, Op, axes_of, dims, full_bytes, main_memory, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "call",
  "conditional",
  "after-all",
  "partition-id",
  "replica-id",
  "iota",
}
_FUSIONS = ("fusion", "fusion-start")
_FP8 = "__cublas$lt$matmul$f8"


@dataclasses.dataclass
class Counts:
  """Totals for one device and one run of the program."""

  flops: float = 0.0  # of dots and convolutions; a multiply-add is 2
  memory_bytes: float = 0.0  # operands and results of every instruction that reaches memory
  collective_bytes: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
  # (kind, mesh axes) -> bytes of the full buffer
  largest_gather: float = 0.0  # bytes of the largest result of one all-gather
  fp8_flops: float = 0.0  # those of `flops` that are in 8 bits
  fp8_products: float = 0.0  # calls that compute them
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)  # custom calls that may multiply -> calls
  launches: float = 0.0  # instructions that run on the device by themselves
  seconds: float = 0.0  # of all launches one after the other, at the `Rates` given
  parts: dict[str, "Part"] = dataclasses.field(default_factory=dict)  # name by `part_of` -> its share of the totals


@dataclasses.dataclass
class Part:
  """The share of a program that belongs to a part of the model."""

  flops: float = 0.0
  memory_bytes: float = 0.0
  launches: float = 0.0
  seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rates:
  """Peaks of a device, for the roofline of each launch: the slowest of its FLOPs, its bytes and the launch itself."""

  products: float  # FLOP/s of matrix products; twice as many in 8 bits
  convolutions: float  # FLOP/s
  bandwidth: float  # bytes per second
  launch: float  # seconds


def count(
  text: str,
  mesh: dict[str, int],
  open_loops: Callable[[str], float],
  rates: Rates | None = None,
  part_of: Callable[[str], str] = lambda name: "all",
) -> Counts:
  """Counts a compiled program.

  Args:
    text: `compiled.as_text()`.
    mesh: mesh axis -> size, in the order of the devices.
    open_loops: text of a while loop whose length depends on data -> the times it is taken to run.
    rates: for `Counts.seconds`; None: they stay 0.
    part_of: an instruction's name in the traced function ("jit(train_step)/...") -> the part it belongs to.
  """
  computations, entry = parse(text)
  out, seen = Counts(), {}
  by_name = {name: {op.name: op for op in ops} for name, ops in computations.items()}
  for name, times, fused in _visits(computations, entry, open_loops):
    ops = by_name[name]
    for op in computations[name]:
      if _multiplies(op):
        one = times * _products(op, ops)
        out.flops += one
        if _FP8 in op.text:
          out.fp8_flops, out.fp8_products = out.fp8_flops + one, out.fp8_products + times
      elif op.code == "custom-call" and (target := re.search(r'custom_call_target="([^"]+)"', op.text)):
        if re.search("tpu_custom_call|triton|fmha", target.group(1)):
          out.kernels[target.group(1)] = out.kernels.get(target.group(1), 0.0) + times
      kind = op.code.removesuffix("-start")
      if kind in COLLECTIVES:
        channel = re.search(r"channel_id=(\d+)", op.text)
        # TPU cuts one into several fusions of the same channel; those that jax itself wrote share a channel.
        shapes = str(SHAPE.findall(op.shape))
        key = (channel.group(1), kind, shapes, *axes_of(op.text, mesh)) if channel else (name, op.name)
        if key not in seen or seen[key][1] < times:
          seen[key] = (op, times, ops)
      if fused or op.code in _FREE or op.code == "async-start" or op.code.endswith(("-done", "-update")):
        continue  # what an asynchronous instruction starts is a computation of its own
      traffic = _traffic(op, ops, computations)
      flops, convolves = _inside(op, ops, computations, by_name)
      one = 0.0
      if rates:
        speed = rates.convolutions if convolves else rates.products * (2 if _FP8 in op.text else 1)
        one = max(flops / speed, traffic / rates.bandwidth, rates.launch)
      named = re.search(r'op_name="([^"]*)"', op.text)
      for total in (out, out.parts.setdefault(part_of(named.group(1) if named else ""), Part())):
        total.memory_bytes += times * traffic
        total.launches += times
        total.seconds += times * one
      out.parts[part_of(named.group(1) if named else "")].flops += times * flops
  totals: dict[tuple[str, str], float] = collections.defaultdict(float)
  for op, times, _ in seen.values():
    axes, group = axes_of(op.text, mesh)
    if group == 1:  # TPU keeps a sum over an axis of one device; nothing travels
      continue
    kind, full = op.code.removesuffix("-start"), full_bytes(op, group)
    totals[kind, axes] += times * full
    if kind == "all-gather":
      out.largest_gather = max(out.largest_gather, full)
  out.collective_bytes = dict(totals)
  return out


def _visits(computations, entry, open_loops) -> Iterator[tuple[str, float, bool]]:
  """Yields (computation, number of runs, whether it is the body of a fusion)."""
  stack = [(entry, 1.0, False)]
  while stack:
    name, times, fused = stack.pop()
    if name not in computations:
      continue
    yield name, times, fused
    for op in computations[name]:
      loop = re.search(r"\bcondition=%?([\w.\-]+), body=%?([\w.\-]+)", op.text)
      if loop:
        stack.append((loop.group(2), times * _trips(op, loop.group(1), computations, open_loops), fused))
        continue
      called = re.search(r"\bcalls=%?([\w.\-]+)", op.text)
      if called:
        stack.append((called.group(1), times, fused or op.code in (*_FUSIONS, "custom-call")))
      elif op.code == "call" and (called := re.search(r"\bto_apply=%?([\w.\-]+)", op.text)):
        stack.append((called.group(1), times, fused))
      branches = re.search(r"branch_computations=\{([^}]*)\}", op.text)
      if branches:  # the last stands for the condition that holds: the fused kernel, not its fallback
        stack.append((branches.group(1).split(",")[-1].strip().lstrip("%"), times, fused))
      elif taken := re.search(r"true_computation=%?([\w.\-]+)", op.text):
        stack.append((taken.group(1), times, fused))


def _trips(op: Op, condition: str, computations, open_loops) -> float:
  known = re.search(r"known_trip_count[^0-9}]*(\d+)", op.text)
  if known:
    return float(known.group(1))
  length = open_loops(op.text)
  if length:
    return length
  constants = [
    int(x)
    for o in computations.get(condition, ())
    if o.code == "constant" and o.shape.startswith(("s32", "u32"))
    for x in re.findall(r"^(\d+)\)", o.text)
  ]
  return float(max(constants, default=1))


def _multiplies(op: Op) -> bool:
  return op.code in ("dot", "convolution") or (op.code == "custom-call" and _library(op.text))


def _inside(op: Op, ops: dict[str, Op], computations, by_name) -> tuple[float, bool]:
  """FLOPs of the products of an instruction, or of what a fusion calls; whether a convolution is among them."""
  called = re.search(r"\bcalls=%?([\w.\-]+)", op.text) if op.code in _FUSIONS else None
  names = (
    [(op, ops)]
    if not called
    else [(o, by_name.get(called.group(1), {})) for o in computations.get(called.group(1), ())]
  )
  flops, convolves = 0.0, False
  for inner, around in names:
    if _multiplies(inner):
      flops += _products(inner, around)
      convolves |= inner.code == "convolution" or "__cudnn$conv" in inner.text
    elif inner.code == "fusion" and inner is not op:
      more, other = _inside(inner, around, computations, by_name)
      flops, convolves = flops + more, convolves | other
  return flops, convolves


def _library(text: str) -> bool:
  return "__cublas" in text or "__cudnn$conv" in text


def _products(op: Op, ops: dict[str, Op]) -> float:
  """FLOPs of a dot, a convolution, or a call of cuBLAS or cuDNN that stands for one."""
  arrays = [dims(ops[name].shape) for name in op.operands[:2] if name in ops]
  if len(arrays) < 2:
    return 0.0
  left, right = arrays
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.text)
  if labels:
    return _convolution(op, left, right, *labels.groups())
  contracting = re.search(r"lhs_contracting_dim(?:s|ensions)[\"=:]*[\[{]([\d,\"]*)[\]}]", op.text)
  over = [int(x) for x in re.findall(r"\d+", contracting.group(1))] if contracting else []
  return 2.0 * math.prod(dims(op.shape)) * math.prod(left[i] for i in over)


def _convolution(op: Op, left: list[int], right: list[int], of_left: str, of_right: str, of_out: str) -> float:
  """FLOPs of a convolution without padding: TPU writes batched dots as convolutions that are mostly padding."""
  out = dims(op.shape)
  window = re.search(r"window=\{([^}]*)\}", op.text)
  fields = dict(x.split("=") for x in window.group(1).split()) if window else {}
  spatial = sorted(c for c in of_out if c.isdigit())
  parts = lambda name, i, default: int(fields[name].split("x")[i]) if name in fields else default
  total = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
  for i, d in enumerate(spatial):
    n_in, n_out, n_k = left[of_left.index(d)], out[of_out.index(d)], right[of_right.index(d)]
    stride, dilate = parts("stride", i, 1), parts("lhs_dilate", i, 1)
    k_dilate, reach = parts("rhs_dilate", i, 1), (n_in - 1) * parts("lhs_dilate", i, 1)
    before = int(fields["pad"].split("x")[i].split("_")[0]) if "pad" in fields else 0
    valid = 0
    for k in range(n_k):
      start = k * k_dilate - before
      hits = (start + o * stride for o in range(n_out))
      valid += sum(1 for at in hits if 0 <= at <= reach and at % dilate == 0)
    total *= valid
  groups = re.search(r"batch_group_count=(\d+)", op.text)
  return total / (int(groups.group(1)) if groups else 1)


def _traffic(op: Op, ops: dict[str, Op], computations: dict[str, list[Op]]) -> float:
  """Bytes that an instruction reads and writes; of buffers that it only slices or updates, the slices."""
  read = lambda name: main_memory(ops[name].shape) if name in ops else 0
  if op.code == "dynamic-slice" or op.code == "gather":
    return 2.0 * main_memory(op.shape)
  if op.code == "dynamic-update-slice":
    return 2.0 * read(op.operands[1])
  called = re.search(r"\bcalls=%?([\w.\-]+)", op.text)
  inner = computations.get(called.group(1), ()) if op.code in _FUSIONS and called else ()
  if not inner:
    return main_memory(op.shape) + sum(map(read, op.operands))
  # The shape of an asynchronous one holds its operands too.
  shape = op.shape if op.code == "fusion" else next(o.shape for o in inner if o.root)
  total, written = 0.0, main_memory(shape)
  parameters = {int(o.text.split(")")[0]): o for o in inner if o.code == "parameter"}
  for i, name in enumerate(op.operands):
    users = _users(parameters[i], inner) if i in parameters else []
    if users and all(o.code in ("dynamic-slice", "gather", "slice") for o in users):
      total += sum(main_memory(o.shape) for o in users)
    elif users and all(o.code == "dynamic-update-slice" and o.operands[0] == parameters[i].name for o in users):
      inside = {o.name: o for o in inner}
      update = sum(main_memory(inside[o.operands[1]].shape) for o in users if o.operands[1] in inside)
      total, written = total + update, written - read(name) + update
    elif users and all(o.code == "scatter" and o.operands[0] == parameters[i].name for o in users):
      inside = {o.name: o for o in inner}
      update = sum(main_memory(inside[o.operands[-1]].shape) for o in users if o.operands[-1] in inside)
      total, written = total + update, written - read(name) + update
    else:
      total += read(name)
  return total + max(written, 0)


def _users(op: Op, inner: Sequence[Op]) -> list[Op]:
  """The instructions that read an instruction, also through a bitcast."""
  direct = [o for o in inner if op.name in o.operands]
  through = [o.name for o in direct if o.code == "bitcast"]
  return [o for o in direct if o.code != "bitcast"] + [o for o in inner if set(through) & set(o.operands)]
