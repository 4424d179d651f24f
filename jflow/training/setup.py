"""What comes before the first step: the config's checks, the model, the parameters to start from."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow import config as run_config
from jflow import sharding
from jflow.batch import RowShape, empty
from jflow.config import RunConfig, TrainConfig
from jflow.data.pipeline import Pipeline
from jflow.errors import UserError
from jflow.interop.checkpoints import Checkpoint, read_checkpoint
from jflow.models import attention
from jflow.models.config import JanusFlowConfig
from jflow.models.llm.llama import remat_policy
from jflow.models.unified import Draws, JanusFlow, Sums
from jflow.sections import refusal
from jflow.training import fresh, hosts
from jflow.training.start_model import PART_OF


def check(config: RunConfig) -> None:
  """Checks all that can be checked before a device is touched.

  Raises:
    UserError: naming the field, its value, and what is allowed.
  """
  run_config.check(config)
  remat_policy(config.compute.remat)
  kernels = attention.IMPLEMENTATIONS
  if config.compute.attention not in kernels:
    raise refusal("compute.attention", config.compute.attention, f"must be one of {', '.join(kernels)}")
  weights = config.objective.weights
  if not set(weights) <= set(Sums._fields):
    raise refusal("objective.weights", weights, f"must hold losses of {', '.join(Sums._fields)}")
  weight = weights.get("alignment", 0.0)
  if weight and not config.model.alignment_width:
    raise refusal("objective.weights.alignment", weight, "must be 0 where model.alignment_width=0")


def build(config: RunConfig, device: jax.Device) -> JanusFlow:
  """The model of a config, with the attention kernel for `device`.

  Raises:
    UserError: a kernel that the config names cannot run there.
  """
  compute, model = config.compute, config.model
  width = model.language_model.head_width
  kernel = attention.choose(compute.attention, device, compute.dtype, width)
  return JanusFlow(model, jnp.dtype(compute.dtype), compute.remat, compute.unroll, kernel)


def row_shape(config: RunConfig, model: JanusFlowConfig) -> RowShape:
  """The packed rows that a config asks for."""
  data = config.data
  moments = (model.latent_size, model.latent_size, 2 * model.autoencoder.latent_channels)
  return RowShape(
    data.row_tokens,
    data.row_images,
    model.patches,
    model.image_size,
    moments if data.latents else (0,),
  )


def initial_params(model: JanusFlow, seed: int) -> Any:
  """Fresh parameters, boxed with their logical axes; to be traced by `sharding.create` or `eval_shape`."""
  c = model.config
  shape = RowShape(2 * (1 + c.patches), 1, c.patches, c.image_size)
  batch = jax.tree.map(jnp.asarray, empty(1, shape))
  latents = jnp.zeros((1, 1, c.latent_size, c.latent_size, c.autoencoder.latent_channels))
  draws = Draws(jnp.full((1, 1), 0.5), latents, latents)
  params = model.init(jax.random.key(seed), batch, draws, method="initialise")["params"]
  if c.reader == "separate":  # equal at the start, trained apart (paper section 4.5)
    params["latent_encoder"] = params["generation_encoder"]
  return params


def start_params(
  config: RunConfig, model: JanusFlow, mesh: jax.sharding.Mesh, open_pipeline: Callable[[], Pipeline]
) -> Any:
  """Parameters of step 0: fresh, or those of `train.init_from`, each on its shards.

  `open_pipeline` opens the data of all processes, for fresh parts that are fitted to it.
  """
  train = config.train
  initial = lambda: initial_params(model, train.seed)
  if not train.init_from:
    params = sharding.create(initial, mesh)
    put = lambda x, old: jax.device_put(np.asarray(x, old.dtype), old.sharding)
    for part, fitted in fresh.fit(config, open_pipeline).items():
      params[part] = jax.tree.map(put, fitted, params[part])
    return params
  read = {path: read_checkpoint(path, weights=train.init_weights, whole=False) for path in _paths(train)}
  source, origin = _chosen(train, read)
  boxed = jax.eval_shape(initial)
  where = flatten_dict(sharding.shardings(mesh, boxed), sep="/")
  wanted = flatten_dict(sharding.unbox(boxed), sep="/")
  differing = _differences(model.config, {path: loaded.config for path, loaded in read.items()}, origin)
  _check_fits(train, source, wanted, origin, differing)
  for made, field, before, value in differing:
    if field == "alignment_width":  # a head of training alone: dropped, or fresh
      continue
    hosts.say(
      f"{made} was made with model.{field}={before!r}, this run has {value!r}: the same weights compute something "
      f"else (--config.model.{field}={before} keeps it as it was)"
    )
  missing = set(wanted) - set(source)
  only_missing = lambda: {p: x for p, x in flatten_dict(initial(), sep="/").items() if p in missing}
  new = sharding.create(only_missing, mesh) if missing else {}
  flat = {
    path: new[path] if path in missing else jax.device_put(np.asarray(source[path], like.dtype), where[path])
    for path, like in wanted.items()
  }
  return unflatten_dict(flat, sep="/")


def _paths(train: TrainConfig) -> list[str]:
  """The checkpoints that a run starts from, each once."""
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


_SHAPELESS = ("gelu", "epsilon", "rope_theta", "scaling")  # fields that change what is computed and no shape


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
    if path not in wanted and not path.startswith(dropped):
      refuse(path, "is there, and this model has it not (train.init_dropped lists what may be left behind)")
    if path not in source and not path.startswith(new):
      refuse(path, "is missing (train.init_fresh lists what may start fresh)")
    if path in wanted and path in source and wanted[path].shape != source[path].shape:
      refuse(path, f"has shape {tuple(source[path].shape)}, this model needs {wanted[path].shape}")


def _differences(
  ours: JanusFlowConfig, theirs: Mapping[str, JanusFlowConfig], origin: Callable[[str], str]
) -> list[tuple[str, str, Any, Any]]:
  """Returns (checkpoint, field of the model, value there, value here) where the two differ.

  Args:
    ours: this run's model.
    theirs: checkpoint -> its model.
    origin: parameter path -> the checkpoint that it comes from.
  """
  flat = {path: flatten_dict(config.to_dict(), sep=".") for path, config in theirs.items()}
  here = flatten_dict(ours.to_dict(), sep=".")
  harmless = ("alignment_layer", "language_model.context")
  found = []
  for field in sorted(set(here).union(*flat.values())):
    source = origin(PART_OF.get(field.split(".")[0], "language_model"))
    if field not in flat[source]:  # of another kind of autoencoder
      continue
    value, before = here.get(field), flat[source][field]
    new = field == "alignment_width" and not before  # there is no such head yet
    if value != before and field not in harmless and not new:
      found.append((source, field, before, value))
  return found
