"""A short run of the checkpoints' fuzzer; its command line runs longer ones."""

from tools import fuzz_checkpoints


def test_checkpoints_let_nothing_escape():
  counts = fuzz_checkpoints.fuzz(seed=0, tries=40)
  assert counts.pop("tried") == 40 and counts.pop("opened") and not any(counts.values())
