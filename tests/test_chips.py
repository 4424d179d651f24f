"""Peaks of devices by their kind."""

import pytest

from jflow import chips


@pytest.mark.parametrize("kind, peak", [("TPU v5 lite", 197e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)])
def test_peaks_are_found_by_the_kind_of_the_device(kind, peak):
  assert chips.peak_flops(kind) == peak
