"""The importer `shapes`: records of the world, rendered once as PNG files of a given size."""

import io
from collections.abc import Iterator
from typing import Any

from PIL import Image

from jflow.data.importers.importer import Item, Options


class World:
  """Importer of the built-in world's records."""

  flags = frozenset({"part_records", "records", "seed", "image_size"})
  reads_input = False
  images_beside = False
  left_out: dict[str, int] = {}

  def __init__(self, options: Options):
    from jflow.world.source import WorldSource

    self._source = WorldSource(options.task, options.records, options.seed)
    self._size, self._part_records = options.image_size, options.part_records

  def files(self) -> list[str]:
    return []

  def parts(self) -> list[tuple[int, int]]:
    count = len(self._source)
    return [(i, min(i + self._part_records, count)) for i in range(0, count, self._part_records)]

  def work(self, part: tuple[int, int]) -> int:
    return part[1] - part[0]

  def items(self, part: tuple[int, int]) -> Iterator[Item]:
    for index in range(*part):
      record = self._source[index]
      images = tuple(_png(scene.render(self._size)) for scene in record.images)
      yield Item(f"shapes record {index}", record._replace(images=images), {})


def _png(pixels: Any) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  return buffer.getvalue()
