"""The setup of a run: checks of the config, the model, the initial parameters."""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow import compilation, registry, sharding
from jflow import config as run_config
from jflow.batch import RowShape
from jflow.config import RunConfig, TrainConfig
from jflow.data.pipeline import Pipeline
from jflow.data.tokenizer import Tokenizer
from jflow.data.validation import HeldOut
from jflow.errors import UserError
from jflow.generation.base import family
from jflow.generation.base import settings as sampling_settings
from jflow.interop import checkpoints
from jflow.interop.checkpoints import Checkpoint, read_checkpoint
from jflow.models import attention, fp8, initial, lora
from jflow.models import build as models
from jflow.models.compaction import Capacity
from jflow.models.config import ModelConfig
from jflow.models.llm.base import ARCHITECTURES
from jflow.models.unified import UnifiedModel, cast_matrices, loss_names
from jflow.sections import refusal
from jflow.training import fresh, hosts, optim, remat, start_model
from jflow.training import workdir as workdirs


def check(config: RunConfig) -> None:
  """Checks all of a config that can be checked without a device.

  Raises:
    UserError: a field does not fit; the message names it, its value, and what is allowed.
  """
  run_config.check(config)
  if config.compute.remat != remat.AUTO:
    _check_remat(config)
  kind, matmul = config.model.language_model.kind, config.compute.matmul
  if matmul not in (known := ARCHITECTURES.get(kind).matmul):
    what = f"must be {' or '.join(map(repr, known))} with model.language_model.kind={kind!r}"
    raise refusal("compute.matmul", matmul, what)
  kernels = attention.IMPLEMENTATIONS
  if config.compute.attention not in kernels:
    raise refusal("compute.attention", config.compute.attention, f"must be one of {', '.join(kernels)}")
  names = loss_names(config.model)
  for name, weight in config.objective.weights.items():
    if weight and name not in names:
      raise refusal(f"objective.weights.{name}", weight, f"must be 0: this model's losses are {', '.join(names)}")
  for name in config.objective.logged:
    if name not in names:
      raise refusal("objective.logged", config.objective.logged, f"must name losses of this model: {', '.join(names)}")
  writes, draws = family(config.model.generation), config.objective.draws
  if config.data.stored and not writes.stored:
    raise refusal(
      "data.stored", True, f"must be False with model.generation.kind={writes.name!r}, which stores nothing"
    )
  try:
    sampling_settings(writes, config.sampling)
  except UserError as error:
    raise UserError(f"config.sampling.{error}") from None
  _check_own("objective.draws", draws, writes.draws, f"with model.generation.kind={writes.name!r}")
  if not config.rl.method:
    _check_own("rl.explore", config.rl.explore, None, "without rl.method")
    return
  if not writes.policy:
    raise refusal(
      "rl.method", config.rl.method, f"must be '' with model.generation.kind={writes.name!r}: it has no policy"
    )
  _check_own("rl.explore", config.rl.explore, writes.explores, f"with model.generation.kind={writes.name!r}")


def _check_own(field: str, given: Mapping[str, Any], kind: type | None, where: str) -> None:
  """Builds a family's own section from its mapping; raises UserError where it holds other names or wrong values."""
  known = [one.name for one in dataclasses.fields(kind)] if kind else []
  if set(given) != set(known):
    raise refusal(field, given, f"must hold {', '.join(known) or 'nothing'} {where}")
  if kind:
    kind(**given)


def _check_remat(config: RunConfig) -> None:
  kind, name = config.model.language_model.kind, config.compute.remat
  known = ARCHITECTURES.get(kind).remat
  if known:
    registry.load(known)(name)
  elif name != "none":
    raise refusal(
      "compute.remat", name, f"must be 'none' with model.language_model.kind={kind!r}, which knows no other"
    )


def build(config: RunConfig, device: jax.Device) -> UnifiedModel:
  """Builds the model of a config, with the attention kernel for `device`.

  `compute.remat="auto"` is the choice that keeps least, "full" with a Llama; a run chooses from `undecided`.

  Raises:
    UserError: a kernel, or products, that the config names cannot run there.
  """
  return remat.candidates(undecided(config, device), device.platform)[-1]


def undecided(config: RunConfig, device: jax.Device) -> UnifiedModel:
  """As `build`, with "auto" left for `remat.fit`: such a model computes nothing."""
  compute, model = config.compute, config.model
  width = model.language_model.head_dim
  kernel = attention.choose(compute.attention, device, compute.dtype, width)
  if compute.matmul == fp8.FP8:
    if why := fp8.obstacle(device):
      raise UserError(f"config.compute.matmul='fp8' {why}; use 'dtype'")
    if device.platform == "cpu":
      hosts.say("compute.matmul=fp8 is emulated on a CPU: the rounding of 8 bits, and no speed")
  return UnifiedModel(model, jnp.dtype(compute.dtype), compute.remat, compute.unroll, kernel, matmul=compute.matmul)


def initial_params(config: RunConfig, model: UnifiedModel) -> Any:
  """The initial parameters of a run, with its adapters and the types of its frozen matrices; boxed, to be traced.

  The VAE or VQ keeps float32 whatever `lora.frozen_dtype` is: images encoded ahead are known by its very numbers.
  """
  params, own = models.initial_params(model, config.train.seed), config.lora
  if own.rank:
    params = lora.added(params, own.patterns, own.rank, own.alpha, config.train.seed)
  if own.frozen_dtype == "float32":
    return params
  trained, frozen = optim.partition(params, config.optimizer.trained, config.optimizer.frozen)
  stored = family(config.model.generation).stored
  exact = {part: frozen[part] for part in frozen if stored and part == stored.part}
  return optim.merge(trained, cast_matrices(frozen, jnp.dtype(own.frozen_dtype), config.model) | exact)


def with_room(model: UnifiedModel, most: Sequence[int]) -> UnifiedModel:
  """The model with room for what the data holds.

  `most`: images to read, to write, and of both on one device at once; samples of a row.
  """
  return model.clone(capacity=Capacity(*most), attention=attention.with_segments(model.attention, most[-1]))


def row_shape(config: RunConfig, model: ModelConfig) -> RowShape:
  """Returns the sizes of a config's packed rows."""
  data, writes = config.data, family(model.generation)
  return RowShape(
    data.row_tokens,
    data.row_images,
    model.patches,
    model.image_size,
    writes.name,
    writes.layout.slots(model.written_patches),
    writes.stored.shape(model) if data.stored and writes.stored else (0,),
    writes.stored.dtype if writes.stored else "bfloat16",
    model.written_patches,
  )


def open_data(config: RunConfig, tokenizer: Tokenizer | None = None, share: Sequence[int] | None = None) -> Pipeline:
  """The packed batches of a run.

  Args:
    config: of the run.
    tokenizer: that of `data.tokenizer`, where it is loaded.
    share: places of the rows of a batch that are wanted; None: all.
  """
  tokenizer = tokenizer or Tokenizer.load(config.data.tokenizer)
  shape = row_shape(config, config.model)
  return Pipeline(config.data, tokenizer, shape, config.train.batch_size, config.train.seed, share)


def with_tokenizer(config: RunConfig, workdir: pathlib.Path) -> RunConfig:
  """Returns the config with a tokenizer where `data.tokenizer` names none: the run's own, or that of `train.init_from`.

  A run that has begun needs its beginning no more, which may have changed or gone.
  """
  if config.data.tokenizer:
    return config
  found = workdirs.own_tokenizer(workdir) or checkpoints.tokenizer_of(config.train.init_from)
  return config.replace(data=dict(tokenizer=str(found)))


def open_held_out(config: RunConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> HeldOut | None:
  """The held-out records of a run in batches as large as a step's; None where their loss is not wanted."""
  if not config.train.validation_every:
    return None
  rows = config.train.batch_size
  share = sharding.local_rows(mesh, rows)
  return HeldOut(config.data, tokenizer, row_shape(config, config.model), rows, config.train.seed, share)


def with_steps(config: RunConfig, pipeline: Pipeline) -> tuple[RunConfig, list[str]]:
  """Returns the config with the steps of `train.epochs`, where `train.steps` is 0, and a line that says so.

  Raises:
    UserError: the number of steps does not fit another field.
  """
  train = config.train
  if not train.epochs:
    return config, []
  one, rows = pipeline.steps_of(1.0), train.batch_size
  if train.steps:
    return config, [f"train.steps={train.steps} of {rows} rows are {train.steps / one:.1f} passes over the data"]
  steps = pipeline.steps_of(train.epochs)
  config = config.replace(train=dict(steps=steps))
  run_config.check(config)
  said = f"train.epochs={train.epochs:g} are {steps} steps of {rows} rows"
  warmup = config.optimizer.warmup_steps
  if steps < 2 * warmup:
    said += (
      f", and the rate rises for the first {warmup} (optimizer.warmup_steps): so little data wants more train.epochs"
    )
  return config, [said]


def start_params(
  config: RunConfig, model: UnifiedModel, mesh: jax.sharding.Mesh, open_pipeline: Callable[[], Pipeline]
) -> Any:
  """Returns the parameters of step 0, fresh or from `train.init_from`, each on its shards.

  `open_pipeline` opens the data of all processes, for fresh parts that are fitted to it.
  """
  train = config.train
  make = lambda: initial_params(config, model)
  if not train.init_from:
    ready = fresh.fit(config, open_pipeline)
    if model.config.image_size >= _PUBLISHED:
      _check_autoencoder(config, sharding.unbox(jax.eval_shape(make)), ready)
    with compilation.said("the initialisation"):
      params = initial.create(make, mesh)
    put = lambda x, old: jax.device_put(np.asarray(x, old.dtype), old.sharding)
    for part, fitted in ready.items():
      params[part] = jax.tree.map(put, fitted, params[part])
    flat = flatten_dict(params, sep="/")
    return unflatten_dict(flat | fresh.derived(model.config, flat, flat), sep="/")
  read = {path: read_checkpoint(path, weights=train.init_weights, whole=False) for path in _paths(train)}
  _check_template(config, read)
  source, origin = _chosen(train, read)
  boxed = jax.eval_shape(make)
  where = flatten_dict(sharding.shardings(mesh, boxed), sep="/")
  wanted: dict[str, Any] = flatten_dict(sharding.unbox(boxed), sep="/")
  differing = _differences(model.config, {path: loaded.config for path, loaded in read.items()}, train)
  _check_autoencoder(config, unflatten_dict(wanted, sep="/"), {path.split("/")[0] for path in source})
  _check_fits(train, source, wanted, origin, differing)
  for made, field, before, value in differing:
    section = field.split(".")[0]
    if section == "objectives" or _starts_fresh(section, source, wanted):  # a head that only training uses is either
      continue
    hosts.say(
      f"{made} was made with model.{field}={before!r}, this run has {value!r}: the same weights compute something "
      f"else (--config.model.{field}={before} keeps it as it was)"
    )
  missing = set(wanted) - set(source)
  only_missing = lambda: {p: x for p, x in flatten_dict(make(), sep="/").items() if p in missing}
  new = initial.create(only_missing, mesh) if missing else {}
  flat = {
    path: new[path] if path in missing else jax.device_put(np.asarray(source[path], like.dtype), where[path])
    for path, like in wanted.items()
  }
  return unflatten_dict(flat | fresh.derived(model.config, flat, missing), sep="/")


def _starts_fresh(section: str, source: Collection[str], wanted: Collection[str]) -> bool:
  """Whether this run has parameters of a section of the model, and `source` none of them."""
  parts = (start_model.PARTS | {"reader": ("understanding_projector",)}).get(section, ())
  own = [path for path in wanted if path.split("/")[0] in parts]
  return bool(own) and not any(path in source for path in own)


def _paths(train: TrainConfig) -> list[str]:
  """The checkpoints that a run starts from, without duplicates."""
  return list(dict.fromkeys([train.init_from, *(path for _, path in train.init_parts)]))


def _chosen(train: TrainConfig, read: Mapping[str, Checkpoint]) -> tuple[dict[str, Any], Callable[[str], str]]:
  """Returns the flat parameters of `init_from` with the parts of `init_parts`, and parameter path -> checkpoint."""
  parts = dict(train.init_parts)
  origin = lambda path: parts.get(path.split("/")[0], train.init_from)
  flat = {path: flatten_dict(loaded.params, sep="/") for path, loaded in read.items()}
  for part, path in parts.items():
    if not any(name.split("/")[0] == part for name in flat[path]):
      raise UserError(f"train.init_parts: {path} has no part {part!r}")
  return {name: x for path in flat for name, x in flat[path].items() if origin(name) == path}, origin


_PUBLISHED = 256  # pixels: the smallest published model; below, models for tests may have a random VAE or VQ


def _check_autoencoder(config: RunConfig, params: dict[str, Any], ready: Collection[str]) -> None:
  """Raises UserError where the VAE or VQ is frozen at random values; `ready`: parts that are read or fitted."""
  stored = family(config.model.generation).stored
  if stored is None or stored.part in ready or stored.part not in params:
    return
  part, (_, frozen) = stored.part, optim.partition(params, config.optimizer.trained, config.optimizer.frozen)
  if part in frozen:
    raise UserError(
      f"{part} must come from a checkpoint: optimizer.frozen would keep the random values of a fresh one; name one that "
      f"holds it as train.init_from, or beside it with --config.train.init_parts=\"(('{part}','CHECKPOINT'),)\""
    )


def _check_template(config: RunConfig, read: Mapping[str, Checkpoint]) -> None:
  """Raises UserError where the LLM was trained with the role words of another template; "plain" has none."""
  source = start_model.origin(config.train, "language_model")
  theirs, ours = read[source].template, config.data.template
  if ours != theirs and "plain" not in (ours, theirs):
    raise refusal("data.template", ours, f"must be {theirs!r}, that of {source}, whose role words the model knows")


_SHAPELESS = (
  "gelu",
  "epsilon",
  "scaling",
  "rope_theta",
  "rope_factor",
  "rope_low",
  "rope_high",
  "rope_original_length",
)  # fields that change the computation and no shape


def _check_fits(
  train: TrainConfig,
  source: Mapping[str, Any],
  wanted: Mapping[str, Any],
  origin: Callable[[str], str],
  differing: Sequence[tuple[str, str, Any, Any]],
) -> None:
  """Raises UserError where parameters are missing, left over or of another shape; it lists the fields to set."""

  def refuse(path: str, what: str) -> None:
    made = {field: before for checkpoint, field, before, _ in differing if checkpoint == origin(path)}
    explained = not all(field.endswith(_SHAPELESS) for field in made)
    flags = " ".join(shlex.quote(f"--config.model.{field}={before}") for field, before in made.items())
    raise UserError(f"{origin(path)}: {path} {what}" + (f"; it was made with {flags}" if explained else ""))

  dropped, new = (tuple(part + "/" for part in parts) for parts in (train.init_dropped, train.init_fresh))
  for path in sorted(set(source) | set(wanted)):
    if path not in wanted and not f"{path}/".startswith(dropped):
      refuse(path, "does not belong to this model (train.init_dropped lists the parts to leave out)")
    if path not in source and not f"{path}/".startswith(new) and not lora.is_adapter(path):
      refuse(path, "is missing (train.init_fresh lists the parts to initialise)")
    if path in wanted and path in source and wanted[path].shape != source[path].shape:
      refuse(path, f"has shape {tuple(source[path].shape)}, this model needs {wanted[path].shape}")


def _differences(
  ours: ModelConfig, theirs: Mapping[str, ModelConfig], train: TrainConfig
) -> list[tuple[str, str, Any, Any]]:
  """Returns (checkpoint, field of the model, value there, value here) where the two differ.

  Args:
    ours: this run's model.
    theirs: checkpoint -> its model.
    train: names the checkpoint of each part.
  """
  flat = {path: flatten_dict(config.to_dict(), sep=".") for path, config in theirs.items()}
  here = flatten_dict(ours.to_dict(), sep=".")
  harmless = ("objectives.alignment.layer", "language_model.max_length")
  found = []
  for field in sorted(set(here).union(*flat.values())):
    source = start_model.origin(train, field.split(".")[0])
    if field not in flat[source] or field.startswith("objectives.") and field not in here:
      continue  # of another kind of autoencoder, or a head of training that this run does not have
    value, before = here.get(field), flat[source][field]
    if value != before and field not in harmless:
      found.append((source, field, before, value))
  return found
