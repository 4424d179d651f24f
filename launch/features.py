"""Features of pictures for `evaluate --benchmark=mjhq --features=FILE`, by networks that lie on disk.

Inception gives the FID: `inception-2015-12-05.pt`, the TorchScript file of clean-fid and StyleGAN. With --clip, a
directory of Hugging Face's CLIP (openai/clip-vit-large-patch14), also the similarity of picture and prompt.
Needs PyTorch, and Transformers for --clip; jflow itself needs neither.

  python launch/features.py --pictures=scores/mjhq/pictures --reference=MJHQ-30K --inception=inception-2015-12-05.pt \\
    --clip=clip-vit-large-patch14 --output=features.npz
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from jflow.evaluation.distances import inception_input  # noqa: E402

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
  """Writes names, generated and reference, and with --clip the features of pictures and prompts."""
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
    help="to 256 (default: as GigaGAN's script)",
  )
  p.add_argument("--batch_size", type=int, default=64)
  p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  args = p.parse_args()
  pictures, reference = _pictures(args.pictures), _pictures(args.reference)
  arrays = {"names": np.array([path.stem for path in pictures])}
  network = torch.jit.load(str(args.inception), map_location=args.device).eval()
  for name, paths in (("generated", pictures), ("reference", reference)):
    arrays[name] = inception_features(
      network, paths, args.batch_size, args.device, args.resize == "lanczos", name
    )
  if args.clip:
    prompts = json.loads((args.reference / "meta_data.json").read_text(encoding="utf-8"))
    texts = [prompts[path.stem]["prompt"] for path in pictures]
    arrays |= clip_features(args.clip, pictures, texts, args.batch_size, args.device)
  np.savez(args.output, **arrays)
  print(f"{len(pictures)} pictures and {len(reference)} of the reference: {args.output}")


def inception_features(
  network: torch.jit.ScriptModule,
  paths: Sequence[pathlib.Path],
  batch_size: int,
  device: str,
  lanczos: bool,
  name: str,
) -> np.ndarray:
  """f32[n, D] of pictures as `inception_input` prepares them."""
  out = []
  for group in _groups(paths, batch_size, name):
    pixels = np.stack([inception_input(Image.open(path), lanczos=lanczos) for path in group])
    with torch.no_grad():
      x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device) - 128) / 128
      out.append(network.layers.forward(x).flatten(1).float().cpu().numpy())
  return np.concatenate(out)


def clip_features(
  directory: pathlib.Path, paths: Sequence[pathlib.Path], texts: Sequence[str], batch_size: int, device: str
) -> dict[str, np.ndarray]:
  """Features of pictures, of their prompts, and of the prompts behind GigaGAN's "A photo depicts "."""
  from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

  model = CLIPModel.from_pretrained(directory).to(device).eval()
  process = CLIPImageProcessor.from_pretrained(directory)
  tokenize = AutoTokenizer.from_pretrained(directory)
  out: dict[str, list[np.ndarray]] = {"clip_pictures": [], "clip_prompts": [], "clip_prompts_depicts": []}
  with torch.no_grad():
    for group in _groups(list(zip(paths, texts)), batch_size, "CLIP"):
      images = process([Image.open(path).convert("RGB") for path, _ in group], return_tensors="pt").to(device)
      vision = model.vision_model(**images).pooler_output
      out["clip_pictures"].append(model.visual_projection(vision).float().cpu().numpy())
      for name, before in (("clip_prompts", ""), ("clip_prompts_depicts", "A photo depicts ")):
        words = [before + text for _, text in group]
        ids = tokenize(words, padding=True, truncation=True, return_tensors="pt").to(device)
        language = model.text_model(**ids).pooler_output
        out[name].append(model.text_projection(language).float().cpu().numpy())
  return {name: np.concatenate(parts) for name, parts in out.items()}


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
  paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
  if not paths:
    sys.exit(f"{folder} holds no pictures")
  return paths


def _groups(items: Sequence, size: int, name: str) -> Iterator[Sequence]:
  with tqdm(total=len(items), desc=name, disable=not sys.stderr.isatty()) as bar:
    for at in range(0, len(items), size):
      yield items[at : at + size]
      bar.update(len(items[at : at + size]))


if __name__ == "__main__":
  main()
