"""Pairs sorted on disk are those sorted in memory."""

import os

import numpy as np
import pytest

from jflow.data.disk_sort import ordered


@pytest.mark.parametrize(
  "count, most, values", [(0, 5, 9), (1, 5, 9), (5, 5, 9), (400, 20, 3), (400, 37, 2**64 - 1), (400, 999, 50)]
)
def test_pieces_are_all_pairs_in_order(tmp_path, count, most, values):
  """Also of one first number in many runs, and of equal pairs."""
  chance = np.random.default_rng(count + most)
  pairs = chance.integers(0, values, (count, 2), np.uint64, endpoint=True)
  pieces = list(ordered(np.split(pairs, np.sort(chance.integers(0, count + 1, 7))), str(tmp_path), most))
  assert all(0 < len(piece) <= most for piece in pieces)
  expected = sorted(map(tuple, pairs.tolist()))
  assert [tuple(pair) for piece in pieces for pair in piece.tolist()] == expected
  assert not os.listdir(tmp_path)


def test_pairs_that_come_by_their_second_numbers_are_sorted_by_the_first(tmp_path):
  pairs = np.stack([np.arange(300) % 7, np.arange(300)], axis=1).astype(np.uint64)
  pieces = list(ordered([pairs], str(tmp_path), 50))
  assert len(pieces) > 5 and sorted(pairs.tolist()) == np.concatenate(pieces).tolist()
