"""Made-up rows hold what the mixture says."""

import numpy as np
import tiny

from jflow.batch import READ, WRITE
from jflow.perf import rows


def test_made_up_rows_hold_what_the_mixture_says():
  batch = rows.synthetic(8, tiny.SHAPE, (2, 5, 1), tiny.VOCABULARY)
  assert (batch.image_kind == READ).any(axis=1).sum() == 2 and (batch.image_kind == WRITE).any(axis=1).sum() == 5
  assert batch.loss_mask.all(axis=1).sum() == 1
  for row, kind in enumerate(batch.image_kind):
    for start in batch.image_start[row][kind > 0]:
      index = batch.image_index[row, start : start + tiny.SHAPE.image_slots]
      assert (np.diff(index) == 1).all()
