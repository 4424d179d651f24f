"""Signatures and duplicates: against brute force, a true Jaccard similarity, and pictures saved in other ways."""

import io
import os
import tempfile

import numpy as np
import pytest
from PIL import Image
from preparing import image, run, write_lines
from refusals import refused

from jflow.data import duplicates, signatures
from jflow.data.duplicates import Rule
from jflow.data.filters import Filters
from jflow.data.records import Record, Turn
from jflow.data.store import prepared

_NONE = np.empty((0, 2), np.int64)
WORDS = [f"word{i}" for i in range(400)]


def photo(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
  """A smooth picture, of the frequencies that photographs have."""
  noise = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), np.uint8)
  return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(picture: Image.Image, format: str = "PNG", **options) -> bytes:
  buffer = io.BytesIO()
  picture.save(buffer, format, **options)
  return buffer.getvalue()


def sign(*records: Record) -> np.ndarray:
  return np.array([signatures.signature(record) for record in records], signatures.DTYPE)


def found(known: np.ndarray, rule: Rule, most: int = duplicates.AT_ONCE) -> np.ndarray:
  """For each signature the place of the earlier one that it repeats; -1: none."""
  first = np.full(len(known), -1)
  with tempfile.TemporaryDirectory() as folder:
    known.tofile(f"{folder}/known")
    for later, earlier in np.concatenate(list(duplicates.found(f"{folder}/known", rule, folder, most)) or [_NONE]):
      assert first[later] == -1 and earlier < later
      first[later] = earlier
    assert os.listdir(folder) == ["known"]
  return first


def text(*words: str) -> Record:
  return Record("", (), " ".join(words), ())


def test_an_estimate_is_near_the_true_similarity():
  chance, errors = np.random.default_rng(0), []
  runs = lambda words: {tuple(words[i : i + signatures.RUN]) for i in range(len(words) - signatures.RUN + 1)}
  for _ in range(40):
    one = chance.choice(WORDS, 200).tolist()
    other = one[: chance.integers(0, 200)] + chance.choice(WORDS, 60).tolist()
    true = len(runs(one) & runs(other)) / len(runs(one) | runs(other))
    errors.append(float((signatures.minhash(one) == signatures.minhash(other)).mean()) - true)
  assert np.abs(errors).max() < 4 / np.sqrt(4 * signatures.HASHES) and abs(np.mean(errors)) < 0.02


def test_a_picture_saved_in_another_way_is_near_and_others_are_not():
  pictures = [Record("", (saved(photo(seed)),), "", ()) for seed in range(40)]
  ways = [
    saved(photo(0), "JPEG", quality=60),
    saved(photo(1).resize((60, 40), Image.Resampling.LANCZOS)),
    saved(photo(2).point(lambda value: min(255, value + 6))),
    saved(photo(3), "WEBP", quality=70),
  ]
  known = sign(*pictures, *(Record("", (way,), "", ()) for way in ways))
  first = found(known, Rule("pictures", near=True))
  assert first.tolist() == [-1] * 40 + [0, 1, 2, 3]
  assert found(known, Rule("pictures", near=False)).tolist() == [-1] * 44


def test_pictures_of_one_color_are_told_apart_by_it():
  known = sign(*(Record("", (saved(Image.new("RGB", (9, 9), color)),), "", ()) for color in ("red", "blue", "red")))
  assert found(known, Rule("pictures", near=True)).tolist() == [-1, -1, 0]


def test_texts_that_nearly_repeat_are_found_as_by_comparing_all():
  chance, documents = np.random.default_rng(1), []
  for i in range(150):
    words = chance.choice(WORDS, 80).tolist()
    if i % 3 == 2:
      words = [*documents[chance.integers(0, len(documents))][: 80 - i % 5], *words[: i % 5]]
    documents.append(words)
  known = sign(*(text(*words) for words in documents))
  brute = np.full(len(known), -1)
  for later in range(len(known)):
    near = (known["text"][:later] == known["text"][later]).mean(axis=1) >= 0.8
    kept = [earlier for earlier in np.flatnonzero(near) if brute[earlier] < 0]
    brute[later] = kept[0] if kept else -1
  assert (brute >= 0).sum() > 30
  np.testing.assert_array_equal(found(known, Rule("texts", near=True)) >= 0, brute >= 0)


def test_a_record_near_to_a_dropped_one_and_to_a_kept_one_is_dropped():
  known = np.zeros(4, signatures.DTYPE)
  known["words"] = 1
  first, second, third, last = known["text"].reshape(4, 16, 4)  # by bands, by one of which near ones are found
  second[4:, 0] = third[4:, 1] = 1  # near to the last by the first four bands, and not to each other
  first[:] = second
  first[:12, 2] = 2  # near to the second by the last four bands, and to no other
  assert not last.any()
  for many in (1, 3):  # of each
    expected = [-1] + [0] * (many - 1) + [0] * many + [-1] + [2 * many] * (many - 1) + [2 * many] * many
    assert found(known.repeat(many), Rule("texts", near=True)).tolist() == expected


@pytest.mark.parametrize("kind", duplicates.KINDS)
@pytest.mark.parametrize("near", [False, True])
def test_what_is_found_does_not_depend_on_what_memory_holds(kind, near, monkeypatch):
  """Keys of more records than are held at once, with more firsts than are compared, among keys of one record."""
  monkeypatch.setattr(duplicates, "_MOST", 5)
  chance = np.random.default_rng(2)
  known = np.zeros(300, signatures.DTYPE)
  known["text"] = chance.integers(0, 2**32, (30, 64), np.uint32)[chance.integers(0, 30, 300)]
  known["text"][:, ::2][chance.random((300, 32)) < 0.3] = 7
  known["hash"] = 1 << chance.integers(0, 3, 300)
  known["thumb"] = chance.integers(0, 3, 300)[:, None] * 12
  known["words"], known["count"] = chance.integers(0, 3, (2, 300))
  for field in ("content", "pictures", "texts"):
    known[field] = chance.integers(1, 60, 300)
  whole = found(known, Rule(kind, near))
  assert (whole >= 0).sum() > 30
  for most in (40, 170):
    monkeypatch.setattr(duplicates, "_BLOCK", most // 3)
    np.testing.assert_array_equal(found(known, Rule(kind, near), most), whole)


def test_other_cases_and_spaces_are_the_same_text_and_empty_ones_are_none():
  known = sign(text("A  red", "CAT, here"), text("a red cat here"), text(), text(), text("猫がいる"), text("猫が いる"))
  assert found(known, Rule("texts", near=True)).tolist() == [-1, 0, -1, -1, -1, 4]
  assert found(known, Rule("texts", near=False)).tolist() == [-1] * 6


@pytest.mark.parametrize(
  "kind, expected", [("records", [-1, -1, -1, 0, 1]), ("pictures", [-1, 0, -1, 0, 0]), ("texts", [-1, -1, 0, 0, 1])]
)
@pytest.mark.parametrize("near", [False, True])
def test_records_repeat_by_both_and_by_one_alone(kind, expected, near):
  one, other = saved(photo(0)), saved(photo(1))
  ask = lambda words: (Turn("user", "<image>"), Turn("assistant", words))
  rows = [(one, "a b c"), (one, "d e f"), (other, "a b c"), (one, "a b c"), (one, "d e f")]
  known = sign(*(Record(str(i), (picture,), "", ask(words)) for i, (picture, words) in enumerate(rows)))
  assert found(known, Rule(kind, near)).tolist() == expected


def test_nothing_is_found_in_nothing():
  for near in (False, True):
    assert found(np.empty(0, signatures.DTYPE), Rule("records", near)).tolist() == []


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "in").mkdir()
  for i in range(8):
    (tmp_path / "in" / f"{i}.png").write_bytes(image(i) if i < 6 else saved(photo(i), "PNG"))
  (tmp_path / "in" / "8.jpg").write_bytes(saved(photo(7), "JPEG", quality=80))
  return tmp_path / "in"


def captions(folder, name, *rows):
  return write_lines(folder / name, [{"id": str(n), "image": picture, "caption": said} for n, picture, said in rows])


ROWS = [
  (0, "0.png", "a"),
  (1, "1.png", "b"),
  (2, "0.png", "a"),
  (3, "7.png", "c"),
  (4, "8.jpg", "c"),
  (5, "1.png", "e"),
]


@pytest.mark.parametrize(
  "filters, kept, counts",
  [
    (Filters(duplicates="exact"), "01345", {"duplicate": 1}),
    (Filters(duplicates="near"), "0135", {"duplicate": 1, "near_duplicate": 1}),
    (Filters(duplicates="exact", duplicates_of="pictures"), "0134", {"duplicate": 1, "near_duplicate": 1}),
    (Filters(duplicates="exact", duplicates_of="texts"), "0135", {"duplicate": 1, "near_duplicate": 1}),
  ],
)
def test_an_import_keeps_the_first_of_each_whatever_its_parts(folder, filters, kept, counts):
  captions(folder, "a.jsonl", *ROWS)
  made = []
  processes = 2 if filters.duplicates == "near" else 1
  for number, options in enumerate([{}, dict(part_records=2, processes=processes)]):
    output = str(folder.parent / f"out{number}")
    summary, _ = run(folder, "generation", "a.jsonl", output=output, filters=filters, **options)
    source = prepared.PreparedSource(output, "generation")
    made.append([source[i] for i in range(len(source))])
    assert "".join(record.id for record in made[-1]) == kept and summary["filtered"] == counts
  output = str(folder.parent / "many")
  for machine in (1, 2):
    run(folder, "generation", "a.jsonl", output=output, filters=filters, part_records=2, part=(machine, 2))
  summary, _ = run(folder, "generation", "a.jsonl", output=output, filters=filters, part_records=2, merge=True)
  assert summary["fingerprint"] == prepared.read_summary(str(folder.parent / "out1"))["fingerprint"]


def test_a_record_of_another_data_set_counts_as_an_earlier_one(folder):
  captions(folder, "a.jsonl", *ROWS[:2])
  captions(folder, "b.jsonl", *ROWS[2:])
  first = str(folder.parent / "first")
  run(folder, "generation", "a.jsonl", output=first)
  near = Filters(duplicates="near", against=(first,))
  with refused("--against", first, "signatures"):
    run(folder, "generation", "b.jsonl", filters=near)
  run(folder, "generation", "a.jsonl", output=first + "-signed", filters=Filters(duplicates="exact"))
  near = near._replace(against=(first + "-signed",))
  summary, output = run(folder, "generation", "b.jsonl", filters=near)
  assert summary["accepted"] == 2 and summary["filtered"] == {"duplicate": 1, "near_duplicate": 1}


@pytest.mark.parametrize("filters", [Filters(against=("x",)), Filters(duplicates_of="texts")])
def test_flags_of_duplicates_go_with_duplicates(folder, filters):
  with refused("--duplicates"):
    run(folder, "generation", "a.jsonl", filters=filters)
