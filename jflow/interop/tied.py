"""The check of tied embeddings: config.json's tie_word_embeddings against the tensors of the file."""

import numpy as np

from jflow.errors import UserError
from jflow.interop.fields import Fields
from jflow.interop.safetensors_io import Checkpoint


def check(f: Fields, tied: bool | None, checkpoint: Checkpoint, embed: str, head: str) -> bool:
  """Checks a configuration's tie_word_embeddings against the weights.

  Args:
    f: the configuration, for its file name.
    tied: its value; None: the head is the embedding where the file has no other.
    checkpoint: the weights.
    embed, head: names of the tensors.

  Returns:
    Whether the head must be read from the embedding, since the file has none.

  Raises:
    UserError: a tied model has another head, or an untied one has none.
  """
  if tied is None:
    return head not in checkpoint.tensors
  if head not in checkpoint.tensors:
    if not tied and embed in checkpoint.tensors:
      raise UserError(
        f"{checkpoint.directory} lacks tensor {head}, and {f.where} does not say tie_word_embeddings=true"
      )
    return tied
  if tied and embed in checkpoint.tensors and not _equal(checkpoint, embed, head):
    raise UserError(
      f"{f.where}: tie_word_embeddings=true, and {head} in {checkpoint.tensors[head].file} differs from {embed}: set "
      "it to false to keep this head, or remove the tensor"
    )
  return False


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
  if checkpoint.tensors[a].shape != checkpoint.tensors[b].shape:
    return False
  x, y = checkpoint.read(a), checkpoint.read(b)
  return all(np.array_equal(x[i : i + 4096], y[i : i + 4096]) for i in range(0, len(x), 4096))
