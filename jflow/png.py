"""A painted picture as a PNG file that says how it was made."""

import json
import pathlib
from collections.abc import Mapping
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def save(image: Image.Image, file: IO[bytes] | pathlib.Path, prompt: str, told: Mapping[str, Any]) -> None:
  """Writes a picture as PNG with its prompt as "Description", and all that it was painted from as JSON in "jflow".

  Args:
    image: the picture.
    file: its path, or a file open for writing.
    prompt: of the picture.
    told: JSON values: the seed of its noise alone, the settings of the way to write images, the checkpoint's name.
  """
  info = PngInfo()
  info.add_itxt("Description", prompt)
  info.add_text("Software", "jflow")
  info.add_itxt("jflow", json.dumps({"prompt": prompt, **told}, ensure_ascii=False))
  image.save(file, "PNG", pnginfo=info)
