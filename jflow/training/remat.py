"""`compute.remat="auto"`: what the LLM's blocks keep for the backward pass, by the memory of a device."""

import contextlib
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jflow import compilation, files, memory, registry
from jflow.errors import UserError
from jflow.models import fp8
from jflow.models.llm.base import ARCHITECTURES
from jflow.models.unified import UnifiedModel
from jflow.strict_json import Malformed
from jflow.training import cost, hosts

AUTO = "auto"
FILE = "remat.json"  # in the workdir: what was chosen, and for what
_ALL = "save:query,key,value,attended,gate,up"
_SHARE = 0.95  # of a device's memory that a program may use; the rest is for two batches and the kernels' own


class Fitted(NamedTuple):
  """A choice, compiled."""

  model: UnifiedModel
  program: Any  # see `program.Program`
  compiled: Any
  needed: int  # bytes of a device


def candidates(model: UnifiedModel, platform: str) -> list[UnifiedModel]:
  """The choices for "auto", fastest first; any other choice alone.

  On a GPU a model that keeps everything has no loop over its layers: a loop stacks what it keeps, and copies it.
  """
  if model.remat != AUTO:
    return [model]
  layers = model.config.language_model.num_layers if platform == "gpu" else model.unroll
  choices = [model.clone(remat="none", unroll=layers)]
  if known := ARCHITECTURES.get(model.config.language_model.kind).remat:
    for name in (_ALL, "full"):
      with contextlib.suppress(UserError):  # another architecture's names may be others
        registry.load(known)(name)
        choices.append(model.clone(remat=name))
  return choices


def bytes_of(compiled: Any) -> int:
  """Bytes of a device that a compiled step needs, its arguments included."""
  found = compiled.memory_analysis()
  temporaries = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
  return found.argument_size_in_bytes + temporaries


def kept(model: UnifiedModel, tokens: int) -> int:
  """Bytes that the blocks keep at least for the backward pass of so many tokens on a device."""
  c = model.config.language_model
  everything = (1, 3, 2) if model.matmul == fp8.DTYPE else (1, 2, 1)  # in 8 bits what a product takes is half
  heads, names = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads), {"none": everything, _ALL: (1, 2, 1)}
  of_heads, of_mlp, of_embed = names.get(model.remat, (0, 0, 1))
  each = of_heads * heads + of_mlp * c.mlp_dim + of_embed * c.embed_dim
  return tokens * c.num_layers * each * jnp.dtype(model.dtype).itemsize


def fit(
  model: UnifiedModel,
  mesh: jax.sharding.Mesh,
  make: Callable[[UnifiedModel], Any],
  batch: Any,
  tokens: int,
  limit: int | None,
  first: int = 0,
) -> Fitted | None:
  """Compiles the first candidate whose step fits into `limit` bytes of a device; None: none does.

  Args:
    model: with remat "auto"; another choice is taken whether it fits or not.
    mesh: of the run.
    make: a model's program, see `program.make_program`.
    batch: of ShapeDtypeStruct with shardings.
    tokens: that a device holds at once; what would keep more than `limit` of them is not compiled.
    limit: None where it is not known: the first.
    first: place of the candidate to begin with, see `earlier`.
  """
  for candidate in candidates(model, mesh.devices.flat[0].platform)[first:]:
    least = kept(candidate, tokens)
    if model.remat == AUTO and limit is not None and least > limit:
      _say(candidate, "at least ", least, limit, "too much")
      continue
    program = make(candidate)
    try:
      with compilation.said("the training step"):
        compiled = program.step.lower(program.state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
      if model.remat != AUTO or "RESOURCE_EXHAUSTED" not in str(error):
        raise
      hosts.say(f"compute.remat={candidate.remat} needs more memory than a device has, says the compiler")
      continue
    found = Fitted(candidate, program, compiled, bytes_of(compiled))
    fits = limit is None or found.needed <= limit
    if model.remat == AUTO:
      _say(candidate, "", found.needed, limit, "taken" if fits else "too much")
    if fits or model.remat != AUTO:
      return found
  return None


def _say(model: UnifiedModel, least: str, needed: int, limit: int | None, verdict: str) -> None:
  there = "" if limit is None else f" of {limit / 2**30:.1f}"
  hosts.say(
    f"compute.remat={model.remat} with compute.unroll={model.unroll} needs {least}{needed / 2**30:.1f}{there} GiB of a "
    f"device: {verdict}"
  )


def device_limit(mesh: jax.sharding.Mesh, given: float = 0.0) -> int | None:
  """Bytes of a device that a step may use, the same on all hosts; None where the device does not say it.

  `given`: `compute.memory_gib`, which replaces what the device says unless it is 0.
  """
  if given:
    return int(given * 2**30)
  there = memory.of_device(mesh.local_devices[0], len(mesh.local_devices))
  if there is None:
    return None
  (mebibytes,) = hosts.from_first([int(_SHARE * there) >> 20])
  return mebibytes << 20


def layout(model: UnifiedModel, mesh: jax.sharding.Mesh, accumulation: int, given: float) -> dict[str, Any]:
  """The program that a choice is made for, and a limit that is given: another one may need another choice."""
  kind, sizes = mesh.devices.flat[0].device_kind, dict(mesh.shape)
  limited = {"memory_gib": given} if given else {}
  return {"device": kind, "mesh": sizes, "accumulation": accumulation, "attention": model.attention} | limited


def earlier(
  workdir: pathlib.Path, model: UnifiedModel, mesh: jax.sharding.Mesh, accumulation: int, given: float = 0.0
) -> int:
  """The place among the candidates of what the run of this workdir has chosen for the same layout, else 0.

  A continuation begins with it: another choice differs by rounding, and would be compiled in vain where it does not
  fit. `given`: see `device_limit`.
  """
  place, found = 0, {}
  if hosts.is_first():
    try:
      found = files.read_object(workdir / FILE)
    except FileNotFoundError:
      pass
    except Malformed as error:
      hosts.say(f"{workdir / FILE}: {error}: compute.remat is chosen anew")
  names = [(one.remat, one.unroll) for one in candidates(model, mesh.devices.flat[0].platform)]
  chosen = (found.get("remat"), found.get("unroll"))
  if found.get("layout") == layout(model, mesh, accumulation, given) and chosen in names:
    place = names.index(chosen)
    hosts.say(f"compute.remat=auto begins with what {workdir / FILE} says: {chosen[0]}, compute.unroll={chosen[1]}")
  return hosts.from_first([place])[0]


def remember(
  workdir: pathlib.Path, model: UnifiedModel, mesh: jax.sharding.Mesh, accumulation: int, given: float = 0.0
) -> None:
  """Writes the choice, for `earlier`; by process 0."""
  if hosts.is_first():
    chosen = {"remat": model.remat, "unroll": model.unroll, "layout": layout(model, mesh, accumulation, given)}
    files.write_json(workdir / FILE, chosen)


def fit_or_refuse(
  model: UnifiedModel,
  mesh: jax.sharding.Mesh,
  make: Any,
  batch: Any,
  accumulation: int,
  given: float = 0.0,
  first: int = 0,
) -> Fitted:
  """`fit` for the devices of a run, which says what a step takes of them.

  Args:
    model: see `fit`.
    mesh: see `fit`.
    make: see `fit`.
    batch: see `fit`.
    accumulation: microbatches of a step.
    given: see `device_limit`.
    first: see `fit`.

  Raises:
    UserError: nothing fits. On a CPU, whose memory is the machine's, only "auto" and a limit that is given are held to.
  """
  rows, limit = batch.tokens.sharding.shard_shape(batch.tokens.shape), device_limit(mesh, given)
  try:
    found = fit(model, mesh, make, batch, math.prod(rows) // accumulation, limit, first)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    found = None
  if found is None:
    raise UserError(f"compute.remat={model.remat!r}: no step fits the memory of a device: {cost.FEWER}")
  kinds = cost.by_kind(found.program.state, batch, found.needed)
  if given or mesh.devices.flat[0].platform != "cpu":
    cost.check(kinds, found.needed, limit)
    hosts.say(cost.told(kinds, found.needed, limit))
  else:
    hosts.say(cost.told(kinds, found.needed, None))
  return found
