"""Scalars and sample images for TensorBoard and Weights & Biases, beside metrics.jsonl; each an optional extra."""

import contextlib
import io
import pathlib
import re
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from jflow import files, png
from jflow.config import RunConfig


class TensorBoard:
  """An event file in workdir/tensorboard, written with TensorBoard's own writer (no TensorFlow)."""

  def __init__(self, workdir: pathlib.Path):
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    self._writer = EventFileWriter(str(workdir / "tensorboard"))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._add(step, [self._summary.Value(tag=tag, simple_value=x) for tag, x in values.items()])

  def pictures(self, step: int, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
    values = []
    for prompt, image in zip(prompts, images, strict=True):
      out = io.BytesIO()
      image.save(out, "PNG")
      sized = dict(height=image.height, width=image.width, colorspace=3, encoded_image_string=out.getvalue())
      values.append(self._summary.Value(tag=f"samples/{prompt}", image=self._summary.Image(**sized)))
    self._add(step, values)

  def _add(self, step: int, values: list[Any]) -> None:
    self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

  def close(self) -> None:
    self._writer.close()


class WeightsAndBiases:
  """A run of the Weights & Biases project `log.wandb`; a restart continues the same run."""

  def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any]):
    import wandb

    self._wandb = wandb
    self._run = wandb.init(
      project=project,
      name=workdir.resolve().name,
      id=_run_id(workdir / "wandb_id"),
      resume="allow",
      dir=str(workdir),
      config=dict(config),
    )

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def pictures(self, step: int, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
    made = [self._wandb.Image(image, caption=prompt) for prompt, image in zip(prompts, images, strict=True)]
    self._run.log({"samples": made}, step=step)

  def close(self) -> None:
    self._run.finish()


def _run_id(path: pathlib.Path) -> str:
  """The id of the run in Weights & Biases, kept in a file, since the name of a folder is not unique."""
  with contextlib.suppress(FileNotFoundError):
    text = files.read_bytes(path).strip()
    if re.fullmatch(rb"[A-Za-z0-9_.-]{1,64}", text):
      return text.decode()
    print(f"jflow: {path} is damaged: Weights & Biases gets a new run", file=sys.stderr)
  made = uuid.uuid4().hex
  files.write_text(path, made + "\n")
  return made


class Files:
  """Sample images as workdir/samples/STEP_NUMBER.png, in the order of the prompts."""

  def __init__(self, workdir: pathlib.Path):
    self._directory = workdir / "samples"

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    pass  # they are in metrics.jsonl

  def pictures(self, step: int, prompts: Sequence[str], images: Sequence[Image.Image]) -> None:
    self._directory.mkdir(exist_ok=True)
    for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
      with files.replacing(self._directory / f"{step:08d}_{number}.png") as new:
        png.save(image, new, prompt, {"step": step})

  def close(self) -> None:
    pass


def trackers(config: RunConfig, workdir: pathlib.Path) -> list[Any]:
  """Opens the trackers of `config.log`; `setup.check` has checked that their packages are installed."""
  log = config.log
  opened: list[Any] = [Files(workdir)]
  if log.tensorboard:
    opened.append(TensorBoard(workdir))
  if log.wandb:
    opened.append(WeightsAndBiases(workdir, log.wandb, config.to_dict()))
  return opened


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a line of metrics.jsonl by tag, grouped as losses and counts."""
  out = {}
  for name, value in row.items():
    if isinstance(value, Mapping):
      out |= {f"{name}/{key}": float(number) for key, number in value.items()}
    elif isinstance(value, (int, float)) and name != "step":
      group, _, rest = name.partition("_")
      if name.startswith("val_loss"):
        out[f"val/{name.removeprefix('val_loss').removeprefix('_') or 'total'}"] = float(value)
      else:
        out[f"loss/{rest or 'total'}" if group == "loss" else f"run/{name}"] = float(value)
  return out
