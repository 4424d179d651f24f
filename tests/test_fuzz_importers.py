"""A short run of the importers' fuzzer; its command line runs longer ones."""

from tools import fuzz_importers


def test_importers_lose_nothing_and_let_nothing_escape():
  counts = fuzz_importers.fuzz(seed=0, tries=400)
  assert counts.pop("tried") >= 400 and not any(counts.values())
