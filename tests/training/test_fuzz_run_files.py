"""A short run of the fuzzer of what jflow wrote; its command line runs longer ones."""

from tools import fuzz_run_files


def test_damage_loses_nothing_that_is_whole_and_lets_nothing_escape():
  counts = fuzz_run_files.fuzz(seed=0, tries=28)
  assert counts.pop("tried") == 28 and not any(counts.values())
