"""Features of pictures for `evaluate --benchmark=mjhq --features=FILE`, by networks on disk.

Inception gives the FID: `inception-2015-12-05.pt`, the TorchScript file of clean-fid and StyleGAN. With --clip, a
directory of Hugging Face's CLIP (openai/clip-vit-large-patch14), also the similarity of picture and prompt.
Needs PyTorch; jflow itself does not.

  python launch/experiments/features.py --pictures=scores/mjhq/pictures --reference=MJHQ-30K --inception=inception-2015-12-05.pt \\
    --clip=clip-vit-large-patch14 --output=features.npz

The reference is exactly the pictures that meta_data.json names. Finished parts are kept in OUTPUT.parts: the same
command resumes after a stop, and removes the folder at the end.
"""

import argparse
import contextlib
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

try:
  import torch
except ModuleNotFoundError:
  print(
    "launch/experiments/features.py needs PyTorch, which jflow does not install: pip install torch", file=sys.stderr
  )
  sys.exit(2)

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from jflow.data.importers.inputs import is_hidden
from jflow.errors import UserError
from jflow.evaluation.distances import inception_input

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
PART = 1024  # pictures in a file of OUTPUT.parts


def main() -> int:
  """Writes the arrays names, generated, reference_names, reference, resize, and with --clip those of CLIP."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--pictures", type=pathlib.Path, required=True, help="what the model painted: ID.png")
  p.add_argument(
    "--reference", type=pathlib.Path, required=True, help="meta_data.json and the true pictures, in folders"
  )
  p.add_argument("--inception", type=pathlib.Path, required=True, help="TorchScript file")
  p.add_argument("--clip", type=pathlib.Path, help="directory of a CLIPModel")
  p.add_argument("--output", type=pathlib.Path, required=True, help=".npz to write")
  p.add_argument(
    "--resize",
    choices=("lanczos", "bicubic"),
    default="lanczos",
    help="to 256 (default: as GigaGAN's script; an author of the paper says bicubic: report both)",
  )
  p.add_argument("--batch_size", type=int, default=64, help="pictures at once (default %(default)s)")
  p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  args = p.parse_args()
  try:
    extract(args)
  except UserError as error:
    print(f"features: {error}", file=sys.stderr)
    return 2
  return 0


def extract(args: argparse.Namespace) -> None:
  """Computes the missing parts, then joins all parts.

  Raises:
    UserError: a file is missing or unreadable, or pictures and meta_data.json do not fit.
  """
  prompts = read_prompts(args.reference / "meta_data.json")
  pictures = painted(args.pictures, prompts)
  reference = true_pictures(args.reference, prompts)
  if args.batch_size < 1:
    raise UserError(f"--batch_size={args.batch_size} must be at least 1")
  network = load_inception(args.inception, args.device)
  clip = Clip(args.clip, args.device) if args.clip else None
  parts = Parts(args.output.with_name(args.output.name + ".parts"), args.batch_size)
  arrays = {
    "names": np.array([path.stem for path in pictures]),
    "reference_names": np.array([path.stem for path in reference]),
    "resize": np.array(args.resize),
  }
  make = lambda group: {"features": inception_features(network, group, args.device, args.resize == "lanczos")}
  key = [args.resize, state_of(args.inception)]
  for name, paths in (("generated", pictures), ("reference", reference)):
    arrays[name] = parts.all(name, paths, [state_of(path) for path in paths], key, make)["features"]
  if clip:
    pairs = [(path, prompts[path.stem]) for path in pictures]
    key = [state_of(path) for path in sorted(args.clip.iterdir())]
    arrays |= parts.all("clip", pairs, [[state_of(path), text] for path, text in pairs], key, clip.features)
  save(args.output, arrays)
  parts.remove()
  print(f"{len(pictures)} pictures and {len(reference)} of the reference: {args.output}")


class Parts:
  """Features on disk, a file for every `PART` pictures, written atomically."""

  def __init__(self, folder: pathlib.Path, batch_size: int):
    """Creates the folder; `batch_size`: items at once, which does not affect the features."""
    self._folder, self._batch_size = folder, batch_size
    try:
      folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"{folder} cannot be made: {error.strerror}") from None

  def all(
    self,
    name: str,
    items: Sequence[Any],
    states: Sequence[Any],
    key: Any,
    make: Callable[[Sequence[Any]], dict[str, np.ndarray]],
  ) -> dict[str, np.ndarray]:
    """The features of all items, computed by `make` where no part has them.

    Args:
      name: of the features.
      items: inputs of `make`, which takes a batch of them.
      states: a JSON value per item, on which its features depend.
      key: a JSON value on which the features of all items depend.
      make: items -> arrays, f32[items, ...].
    """
    found: list[dict[str, np.ndarray]] = []
    with tqdm(total=len(items), desc=name, disable=not sys.stderr.isatty()) as bar:
      for at in range(0, len(items), PART):
        digest = hashlib.sha256(json.dumps([name, key, states[at : at + PART]]).encode()).hexdigest()
        path = self._folder / f"{name}-{at:06d}-{digest[:16]}.npz"  # other settings or pictures: another name
        part, group = self._read(path), items[at : at + PART]
        if part is None:
          batches = []
          for start in range(0, len(group), self._batch_size):
            batches.append(make(group[start : start + self._batch_size]))
            bar.update(len(group[start : start + self._batch_size]))
          part = _joined(batches)
          save(path, part)
        else:
          bar.update(len(group))
        found.append(part)
    return _joined(found)

  def remove(self) -> None:
    """Removes the folder, with parts of other settings."""
    for path in self._folder.glob("*-??????-*.npz*"):
      path.unlink()
    with contextlib.suppress(OSError):  # something else lies there
      self._folder.rmdir()

  def _read(self, path: pathlib.Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
      return None
    try:
      with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
    except Exception:  # damaged on disk: zip, zlib and NumPy raise many types
      return None


def load_inception(path: pathlib.Path, device: str) -> torch.jit.ScriptModule:
  """The network of a TorchScript file."""
  if not path.is_file():
    raise UserError(f"--inception={path} does not exist: take inception-2015-12-05.pt of clean-fid and StyleGAN")
  try:
    return torch.jit.load(str(path), map_location=device).eval()
  except RuntimeError as error:
    raise UserError(f"--inception={path} is no TorchScript file: {str(error).splitlines()[0]}") from None


def inception_features(
  network: torch.jit.ScriptModule, paths: Sequence[pathlib.Path], device: str, lanczos: bool
) -> np.ndarray:
  """Inception's features f32[n, D] of pictures preprocessed by `inception_input`."""
  with ThreadPoolExecutor() as pool, torch.no_grad():
    pixels = np.stack(list(pool.map(lambda path: inception_input(picture(path), lanczos=lanczos), paths)))
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device) - 128) / 128
    return network.layers.forward(x).flatten(1).float().cpu().numpy()


class Clip:
  """Hugging Face's CLIPModel, read from a directory."""

  def __init__(self, directory: pathlib.Path, device: str):
    """Reads the model; accepts weights in safetensors only."""
    self._device = device
    if not directory.is_dir():
      raise UserError(f"--clip={directory} is no directory: download openai/clip-vit-large-patch14 of Hugging Face")
    try:
      from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

      self._model = CLIPModel.from_pretrained(directory, use_safetensors=True).to(device).eval()
      self._process = CLIPImageProcessor.from_pretrained(directory)
      self._tokenize = AutoTokenizer.from_pretrained(directory)
    except ImportError as error:
      raise UserError(f"--clip needs Hugging Face's transformers: {error}".splitlines()[0]) from None
    except (OSError, ValueError) as error:
      said = f"--clip={directory} holds no CLIPModel in safetensors with its tokenizer: {error}"
      raise UserError(said.splitlines()[0]) from None

  def features(self, pairs: Sequence[tuple[pathlib.Path, str]]) -> dict[str, np.ndarray]:
    """Features f32[n, D] of pictures, of their prompts, and of the prompts after GigaGAN's "A photo depicts "."""
    images = self._process([picture(path) for path, _ in pairs], return_tensors="pt").to(self._device)
    with torch.no_grad():
      vision = self._model.vision_model(**images)
      out = {"clip_pictures": self._model.visual_projection(vision.pooler_output)}
      for name, before in (("clip_prompts", ""), ("clip_prompts_depicts", "A photo depicts ")):
        words = [before + text for _, text in pairs]
        ids = self._tokenize(words, padding=True, truncation=True, return_tensors="pt").to(self._device)
        language = self._model.text_model(input_ids=ids.input_ids, attention_mask=ids.attention_mask)
        out[name] = self._model.text_projection(language.pooler_output)
    return {name: array.float().cpu().numpy() for name, array in out.items()}


def read_prompts(path: pathlib.Path) -> dict[str, str]:
  """Reads meta_data.json: name of a picture -> prompt."""
  if not path.is_file():
    raise UserError(f"{path} does not exist: --reference names the folder of MJHQ-30K, with its meta_data.json")
  try:
    return {name: row["prompt"] for name, row in json.loads(path.read_text(encoding="utf-8")).items()}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
    raise UserError(f"{path} is no object of names with prompts ({type(error).__name__}): download it again") from None


def painted(folder: pathlib.Path, prompts: dict[str, str]) -> list[pathlib.Path]:
  """The generated pictures of a folder, each checked to have a prompt."""
  paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES and not is_hidden(p.name))
  if not paths:
    raise UserError(f"{folder} holds no pictures: --pictures names the folder pictures/ of an evaluation's --output")
  others = [path.name for path in paths if path.stem not in prompts]
  if others:
    raise UserError(
      f"{folder}: {len(others)} of {len(paths)} pictures have no prompt in meta_data.json "
      f"({_some(others)}): name the pictures of this benchmark"
    )
  _refuse_doubles(folder, paths)
  return paths


def true_pictures(folder: pathlib.Path, prompts: dict[str, str]) -> list[pathlib.Path]:
  """The pictures that meta_data.json names, anywhere below the folder; ignores others."""
  named = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.stem in prompts)
  paths = sorted(path for path in named if not is_hidden(str(path.relative_to(folder))))
  _refuse_doubles(folder, paths)
  missing = sorted(prompts.keys() - {path.stem for path in paths})
  if missing:
    raise UserError(
      f"{folder}: {len(missing)} of {len(prompts)} pictures of meta_data.json are missing "
      f"({_some(missing)}): unpack mjhq30k_imgs.zip there, whole"
    )
  return paths


def _refuse_doubles(folder: pathlib.Path, paths: Sequence[pathlib.Path]) -> None:
  by_name: dict[str, list[pathlib.Path]] = {}
  for path in paths:
    by_name.setdefault(path.stem, []).append(path)
  doubles = [same for same in by_name.values() if len(same) > 1]
  if doubles:
    raise UserError(
      f"{folder}: {len(doubles)} pictures lie there twice, for example {doubles[0][0]} and "
      f"{doubles[0][1]}: move what an evaluation has painted elsewhere"
    )


def _joined(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:3]) + ("..." if len(names) > 3 else "")


def picture(path: pathlib.Path) -> Image.Image:
  """Reads a picture as RGB."""
  try:
    return Image.open(path).convert("RGB")
  except Exception as error:  # Pillow raises many types on a damaged file
    raise UserError(f"{path} is no readable picture ({type(error).__name__}): make or unpack it again") from None


def state_of(path: pathlib.Path) -> list[Any]:
  """The state of a file that shows a change: size in bytes, time of the last change in nanoseconds."""
  found = path.stat()
  return [path.name, found.st_size, found.st_mtime_ns]


def save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes an .npz atomically."""
  new = path.with_name(path.name + ".new")
  with open(new, "wb") as file:
    np.savez(file, **arrays)
  new.replace(path)


if __name__ == "__main__":
  sys.exit(main())
