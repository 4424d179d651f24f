"""Publishing a model on the Hugging Face hub: its files and a card, in one commit, so that nothing is half there."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jflow.errors import Stopped, UserError, one_line
from jflow.files import read_object
from jflow.generation.base import family
from jflow.interop import adapter_files, checkpoints, layouts, packed, safetensors_io

_WEIGHTS = (".safetensors", ".safetensors.index.json")
_OTHERS = ("json", "model", "txt", "jinja")  # of the configuration and the tokenizer
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> str:
  """Returns a repository's name; raises UserError where it is not ORG/NAME."""
  if not _NAME.fullmatch(name):
    raise UserError(f"the repository must be named ORG/NAME, got {name!r}")
  return name


def files_of(directory: pathlib.Path) -> list[str]:
  """The names of the files to publish below a model or an adapter: weights, configuration, tokenizer.

  Raises:
    UserError: it is another folder, holds a pickle, or its files do not fit each other.
  """
  if not directory.is_dir():
    raise UserError(f"{directory} must be a folder")
  if (directory / "checkpoints").is_dir():
    raise UserError(
      f"{directory} is a run: first convert it (python -m jflow convert --from=jflow --input={directory} "
      "--output=DIR), and publish that folder"
    )
  adapter = adapter_files.is_adapter(directory)
  if not adapter and layouts.found(directory) is None and not packed.is_packed(directory):
    raise UserError(f"{directory} must be a model of a published layout, config.json and safetensors, or an adapter")
  names = sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
  if pickles := [name for name in names if name.endswith(_PICKLES)]:
    raise UserError(f"{directory / pickles[0]} looks like a pickle, which is never published: remove it")
  if adapter:
    safetensors_io.Checkpoint(directory, (adapter_files.STEM,))  # its header is whole
  else:
    checkpoints.describe(directory)  # the headers of the weights fit config.json
  wanted = [name for name in names if name.endswith(_WEIGHTS) or name.rpartition(".")[2] in _OTHERS]
  return [name for name in wanted if not name.split("/")[-1].startswith(".")]


def card(
  name: str, directory: pathlib.Path, license: str, run: pathlib.Path | None, reports: Sequence[Mapping[str, Any]]
) -> str:
  """The model card: what the model is, how to use it, how it was trained, its scores.

  Args:
    name: ORG/NAME.
    directory: of the model.
    license: an identifier of the hub, such as mit, or other.
    run: workdir of its training, whose config.json gives recipe and data.
    reports: the contents of report.json of evaluations.

  Raises:
    UserError: a file is missing or damaged.
  """
  adapter = adapter_files.is_adapter(directory)
  front = ["---", f"license: {license}", "library_name: jflow", "pipeline_tag: any-to-any", "tags:", "- jflow"]
  front += ["- lora"] if adapter else []
  lines = [*front, "---", "", f"# {name.split('/')[1]}", "", *(_adapter if adapter else _model)(name, directory)]
  if run is not None:
    lines += ["", "## Training", "", *_recipe(run)]
  for body in reports:
    lines += ["", *_scores(body)]
  return "\n".join(lines) + "\n"


def _adapter(name: str, directory: pathlib.Path) -> list[str]:
  """The lines about an adapter: its rank, how to use it."""
  values = read_object(directory / adapter_files.CONFIG)
  return [
    f"An adapter (LoRA of rank {values.get('rank', values.get('r'))}) of a model of the Janus family, to be merged into its base. "
    f"Made with jflow{', in the format of PEFT' if 'peft_type' in values else ''}.",
    "",
    "```python",
    "import jflow",
    "",
    f'model = jflow.load("BASE", adapter="{name}")',
    "```",
  ]


def _model(name: str, directory: pathlib.Path) -> list[str]:
  """The lines about a model: its sizes, how to use it."""
  config = checkpoints.read_config(directory)
  writer, language = family(config.generation), config.language_model
  found = checkpoints.describe(directory)
  vae = "" if found.has_vae else ', vae="stabilityai/sdxl-vae"'
  sampled = ", ".join(f"{name} {value}" for name, value in found.sampling.items())
  return [
    f"One language model ({language.num_layers} blocks of width {language.embed_dim}) that reads images through SigLIP "
    f"and writes images of {config.image_size} x {config.image_size} pixels by {writer.about or writer.name}. Made with jflow.",
    "",
    "```python",
    "import jflow",
    "",
    f'model = jflow.load("{name}"{vae})',
    'model.generate(["a red circle"])[0].save("picture.png")',
    "```",
    *(["", f"Sampled with {sampled} unless a call says otherwise."] if sampled else []),
  ]


def _recipe(run: pathlib.Path) -> list[str]:
  """The lines of a run's config that say how it was trained."""
  try:
    values = read_object(run / "config.json")
  except OSError as error:
    raise UserError(f"--run={run} must be a run: its config.json cannot be read ({error.strerror})") from error
  try:
    train, data, optimizer = values["train"], values["data"], values["optimizer"]
    rows = {
      "steps x rows of tokens": f"{train['steps']} x {train['batch_size']} of {data['row_tokens']}",
      "learning rate": optimizer["learning_rate"],
      "trained": ", ".join(optimizer["trained"]) or "adapters alone",
      "adapters": f"rank {values['lora']['rank']}" if values.get("lora", {}).get("rank") else "none",
      "seed": train["seed"],
      "started from": pathlib.Path(train["init_from"]).name or "nothing",
    }
    for task, sources in data["sources"].items():
      if sources:
        rows[f"data: {task}"] = ", ".join(f"{pathlib.Path(place).name} ({weight:g})" for place, weight in sources)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise UserError(f"{run / 'config.json'} is no config of a run: {error!r}") from None
  return ["| | |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]


def _scores(body: Mapping[str, Any]) -> list[str]:
  """A table of a report's scores."""
  rows = [f"| {name} | {score['value']:.4g} |" for name, score in body["scores"].items()]
  return [f"## Scores: {body['benchmark']}", "", "| | |", "| --- | --- |", *rows, "", *body["notes"]]


def publish(directory: pathlib.Path, name: str, text: str, *, private: bool, message: str) -> str:
  """Uploads a model and its card in one commit; files that the hub has already are not sent again.

  A README.md in the folder is used in place of `text`.

  Args:
    directory: see `files_of`.
    name: ORG/NAME; created where it does not exist.
    text: the card.
    private: whether a new repository is private.
    message: of the commit.

  Returns:
    The address of the commit.

  Raises:
    UserError: see `files_of`; the hub does not let you write there.
    Stopped: the connection failed; the same call goes on.
  """
  from huggingface_hub import CommitOperationAdd, HfApi, errors

  api, own = HfApi(), directory / "README.md"
  operations = [CommitOperationAdd(one, str(directory / one)) for one in files_of(directory)]
  operations.append(CommitOperationAdd("README.md", own.read_bytes() if own.is_file() else text.encode()))
  try:
    api.create_repo(name, private=private, exist_ok=True)
    return str(api.create_commit(name, operations, commit_message=message).commit_url)
  except errors.HfHubHTTPError as error:
    status = error.response.status_code if error.response is not None else 0
    if status in (401, 403):
      raise UserError(
        f"the hub does not let you write to {name}: `hf auth login` with a token that may write"
      ) from None
    if 400 <= status < 500:
      raise UserError(f"the hub refuses {name}: {_line(error)}") from None
    raise Stopped(f"{name} is not published yet ({_line(error)}): the same command goes on") from error
  except Exception as error:  # of the connection, of many libraries' types
    raise Stopped(f"{name} is not published yet ({_line(error)}): the same command goes on") from error


def _line(error: BaseException) -> str:
  return one_line(error) or type(error).__name__
