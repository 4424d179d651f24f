"""Upper bounds of the sizes in a model's config.

They lie far above any model: without them, one number in an untrusted config.json could keep a program busy for hours.
"""

import math
from typing import Any

from jflow.errors import UserError
from jflow.strict_json import shown

_MOST = 2**24
_MOST_OF = {
  "num_layers": 1024,
  "layer": 1024,
  "encoder_blocks": 128,
  "decoder_blocks": 128,
  "layers_per_block": 32,
  "num_heads": 2**14,
  "num_kv_heads": 2**14,
  "image_size": 2**14,
  "patch_size": 2**12,
  "window": 2**12,
  "latent_channels": 2**14,
  "layers": 64,
  "projector_layers": 64,
  "blocks_per_level": 32,
  "multipliers": 2**10,
  "code_dim": 2**14,
}


def most(field: str) -> int:
  """Returns the largest value of an integer field, by its name."""
  return _MOST_OF.get(field, _MOST)


def check_sizes(path: str, config: Any) -> None:
  """Checks that every number of a section is positive and not too large.

  Raises:
    UserError: a number is out of bounds; the message names field and value.
  """
  for name, value in vars(config).items():
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 < value < math.inf:
      raise UserError(f"{path}.{name}={shown(value)} must be positive")
    if any(isinstance(x, int) and x > most(name) for x in (value if isinstance(value, tuple) else (value,))):
      raise UserError(f"{path}.{name}={shown(value)} must be at most {most(name)}")
