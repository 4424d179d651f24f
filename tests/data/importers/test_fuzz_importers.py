"""Short runs of the fuzzers of importers and pictures; their command lines run longer ones."""

from tools import fuzz_importers, fuzz_pictures


def test_importers_lose_nothing_and_let_nothing_escape():
  counts = fuzz_importers.fuzz(seed=0, tries=400)
  assert counts.pop("tried") >= 400 and not any(counts.values())


def test_pictures_lose_nothing_to_their_metadata_and_let_nothing_escape():
  counts = fuzz_pictures.fuzz(seed=0, tries=1000)
  assert counts.pop("tried") == 1000 and not any(counts.values())
