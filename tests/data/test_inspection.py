"""The picture of packed rows: it holds every image, says all text, and its figures are those of the plan."""

import pathlib

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from jflow.batch import WRITE, Batch, RowShape
from jflow.cli import prepare as prepare_command
from jflow.data import examples, inspection, packing
from jflow.data.records import Record, Turn
from jflow.data.store import plans
from jflow.data.store.prepare import prepare
from jflow.data.tokenizer import Tokenizer
from jflow.generation.base import FAMILIES
from jflow.generation.flow import FAMILY
from jflow.world.source import WorldSource

ROOT = pathlib.Path(__file__).parents[2]
TOKENIZER = Tokenizer.load(ROOT / "configs" / "tokenizer")
SHAPE = RowShape(tokens=200, images=4, image_patches=9, image_size=24, writer="flow")


def _pixels(number):
  return np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)


def _reading():
  turns = (
    Turn("user", "<image>\nWhat is this, and <image> that?"),
    Turn("assistant", "A cat; a dog."),
    Turn("user", "Sure?"),
    Turn("assistant", "Yes."),
  )
  sample = examples.build(Record("a", (_pixels(1), _pixels(2)), "", turns), "understanding", TOKENIZER, "plain", 9)
  return sample


def _writing(drop=0.0, layout=FAMILY.layout):
  record = Record("b", (_pixels(3),), "a house by the sea", ())
  return examples.build(record, "generation", TOKENIZER, "plain", 9, np.random.default_rng(0), 0.0, drop, layout)


def _text():
  return examples.build(Record("c", (), "Once upon a time. " * 3, ()), "text", TOKENIZER, "plain", 9)


def _row(*samples) -> Batch:
  return packing.pack(samples, SHAPE)


def test_a_sample_is_cut_into_its_images_and_what_is_learned():
  runs = inspection.runs_of(_row(_text(), _reading()), 2, TOKENIZER, SHAPE.image_slots)
  assert [run.slot for run in runs if run.slot is not None] == [0, 1]
  assert "".join(run.text for run in runs) == "‹bos›What is this, andthat? A cat; a dog.‹eos›Sure? Yes.‹eos›"
  assert "".join(run.text for run in runs if run.learned) == " A cat; a dog.‹eos› Yes.‹eos›"
  runs = inspection.runs_of(_row(_writing()), 1, TOKENIZER, SHAPE.image_slots)
  assert [(run.text, run.learned, run.slot) for run in runs] == [
    ("‹bos›", False, None),
    ("a house by the sea", False, None),
    ("", False, 0),
  ]
  runs = inspection.runs_of(_row(_text()), 1, TOKENIZER, SHAPE.image_slots)
  assert "".join(r.text for r in runs if r.learned) == ("Once upon a time. " * 3).strip() + "‹eos›"
  assert [r.text for r in runs if not r.learned] == ["‹bos›"]


def test_words_lose_no_letter():
  for text in ("a b  c\n\nd", " x", "\n", "tabs\tand\r\nlines", ""):
    words = inspection.split_words(text)
    assert "".join(words) == text.replace("\r", "").replace("\t", " ")
    assert all(word == "\n" or "\n" not in word for word in words)


def test_every_image_of_a_row_is_in_the_picture():
  row = _row(_reading(), _writing(), _text())
  shown = inspection.draw([inspection.Row("understanding", "data", row)], [], SHAPE, TOKENIZER, "title")
  canvas = np.asarray(shown)
  for number in (1, 2, 3):
    side = inspection.PICTURE
    wanted = np.asarray(Image.fromarray(_pixels(number)).resize((side, side)))
    corners = np.argwhere((canvas[:-side, :-side] == wanted[0, 0]).all(axis=2))
    found = [c for c in corners if (canvas[c[0] : c[0] + side, c[1] : c[1] + side] == wanted).all()]
    assert len(found) == 1


def test_the_band_marks_the_positions_that_carry_a_loss():
  """Next tokens, and the patches of images to write: their share of the band's width."""
  row = _row(_reading(), _writing(), _text())
  canvas = np.asarray(inspection.draw([inspection.Row("text", "data", row)], [], SHAPE, TOKENIZER, "t"))
  loss = np.array([0xD8, 0x79, 0x1B])
  lines = (canvas[:, 44:-44] == loss).all(axis=2)
  marked = lines[np.argmax(lines.sum(axis=1))]
  wanted = row.loss_mask.sum() + (row.image_kind == WRITE).sum() * 9
  assert marked.mean() * SHAPE.tokens == pytest.approx(wanted, abs=2)


@pytest.mark.parametrize("task", ["generation", "text"])
def test_the_histograms_are_those_of_the_rows(task):
  shape = RowShape(tokens=160, images=2, image_patches=16, image_size=32, writer="flow")
  found = plans.planned(WorldSource(task, size=120, seed=0), task, TOKENIZER, "plain", shape, "")
  counted = inspection.histograms(task, "shapes", found.plan, shape.tokens)
  fill = []
  for row in range(found.plan.rows):
    pieces = range(*found.plan.row_offsets[row : row + 2])
    used = sum(found.plan.stops[p] - found.plan.starts[p] + (found.plan.starts[p] > 0) for p in pieces)
    fill.append(used / 160)
  np.testing.assert_allclose(counted.fill, fill)
  assert counted.fill.mean() == pytest.approx(found.fill(160)) and counted.fill.max() <= 1
  assert counted.lengths.sum() == found.tokens
  picture = inspection.draw([], [counted] * 4, shape, TOKENIZER, "t")
  assert picture.width == inspection.WIDTH and picture.height > 700


def test_odd_rows_are_drawn():
  """Nothing in it, one word wider than a card, more text than a card holds, a dropped prompt."""
  word = examples.build(Record("w", (), "x" * 190, ()), "text", TOKENIZER, "plain", 9)
  long = RowShape(tokens=4000, images=4, image_patches=9, image_size=24, writer="flow")
  document = examples.build(Record("d", (), "word " * 800, ()), "text", TOKENIZER, "plain", 9)
  many = (_text(),) * 40
  rows = [packing.pack(samples, long) for samples in ((), (word,), (document, word, _writing(drop=1.0)), many)]
  shown = inspection.draw([inspection.Row("text", "d" * 99, row) for row in rows], [], long, TOKENIZER, "t" * 200)
  assert shown.height < 2400


@pytest.mark.parametrize("writes", ["flow", "codes"])
def test_only_a_sample_that_writes_has_no_prompt(writes):
  """Also where the pad is another token's: of reading and of text, EOS stands in the sample."""
  layout = FAMILIES.get(writes).layout
  samples = (_reading(), _writing(layout=layout), _text(), _writing(1.0, layout))
  row = packing.pack(samples, RowShape(tokens=300, images=4, image_patches=9, image_size=24, writer=writes))
  of_pad = lambda pad: [inspection.is_dropped(row, segment, pad) for segment in (1, 2, 3, 4)]
  assert of_pad(TOKENIZER.pad) == [False, False, False, True]
  assert of_pad(TOKENIZER.eos)[:3] == [False] * 3 and TOKENIZER.eos in row.tokens


def test_the_command_draws_a_data_set_and_a_run(tmp_path, capsys):
  data = str(tmp_path / "data")
  prepare("shapes", output=data, task="understanding", records=30, image_size=32)
  config = f"--config={ROOT / 'configs' / 'stage2.py'}:tiny"
  for number, arguments in enumerate(([data], [], ["--step=7"])):
    output = tmp_path / f"{number}" / "rows.png"
    assert prepare_command.main(["--inspect", *arguments, "--rows=3", f"--output={output}", config]) == 0
    with Image.open(output) as picture:
      assert picture.format == "PNG" and picture.height > 600
  assert "3 rows in" in capsys.readouterr().out
  few = str(tmp_path / "few")
  prepare("shapes", output=few, task="understanding", records=1, image_size=32)
  assert prepare_command.main(["--inspect", few, "--rows=3", f"--output={output}", config]) == 0
  printed = capsys.readouterr()
  assert "1 row, all that there are, in" in printed.out and "1 record in 1 row, " in printed.err
  with refused(str(tmp_path)):
    prepare_command.main([f"--inspect={tmp_path}", config])
  for arguments, message in [
    (["--rows=0", config], "--rows=0"),
    (["--step=-1", config], "--step=-1"),
    (["--output=x.xyz", config], "--output=x.xyz"),
    ([], "--config"),
    ([data, "--processes=2"], "'--processes=2'"),
  ]:
    with refused(message):
      prepare_command.main(["--inspect", *arguments])
  with pytest.raises(SystemExit) as stopped:
    prepare_command.main(["--inspect", "--help"])
  assert stopped.value.code == 0 and "--step" in capsys.readouterr().out
