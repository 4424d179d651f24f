"""Reading benchmarks from TSV files: rows, pictures, the kit's prompts, limits."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from refusals import refused
from tsv import png, pope_folder, pope_rows, write_table

import jflow
from jflow.data import images
from jflow.errors import UserError
from jflow.evaluation import benchmarks, predictions, prompts, tables
from jflow.evaluation.samples import Samples
from jflow.evaluation.settings import Settings


def opened(name: str, data, **more):
  return benchmarks.get(name)(Settings(name, "x", data / "out", data=data, **more))


@pytest.fixture
def data(tmp_path):
  return pope_folder(tmp_path / "data")


def test_images_come_from_their_row_or_the_row_they_refer_to(data):
  table = tables.Table(data / "POPE.tsv")
  for index in ("0", "1", "3", "5"):
    (image,) = table.images(index)
    assert image.size == (8, 6) and image.getpixel((0, 0)) == (255, 0, 0)
  assert "image" not in table.rows[0]


def test_several_images_and_line_breaks_in_a_row(tmp_path):
  rows = [
    {
      "index": 1,
      "image": str([png("red"), png("blue")]),
      "question": 'two\nlines "quoted"',
      "answer": "é\tx",
    },
    {"index": 2, "image": png("lime"), "question": "b", "answer": "c"},
  ]
  write_table(tmp_path / "t.tsv", rows)
  table = tables.Table(tmp_path / "t.tsv")
  assert [image.getpixel((1, 1)) for image in table.images("1")] == [(255, 0, 0), (0, 0, 255)]
  assert table.images("2")[0].getpixel((1, 1)) == (0, 255, 0)
  assert table.rows[0]["question"] == 'two\nlines "quoted"' and table.rows[0]["answer"] == "é\tx"


@pytest.mark.parametrize(
  "change, message",
  [
    ({"answer": ""}, "'answer'"),
    ({"image": "77"}, "'77'"),
    ({"image": "A" * 80}, "image"),
    ({"image": str([7, 8]) + " " * 80}, "image"),
    ({"image": "['" + "[" * 50_000}, "image"),
    ({"image": ""}, "image ''"),
    ({"index": 1}, "twice"),
  ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
  rows = pope_rows()
  rows[2] |= change
  write_table(tmp_path / "POPE.tsv", rows)
  with refused("index 1" if "index" in change else "index 2", message):
    benchmark = opened("pope", tmp_path)
    for task in benchmark.tasks():
      task.images()


CHOICE = {"question": "Which?", "A": "one", "B": "two", "C": "", "category": "x", "split": "validation"}
TEN = str(["two"] * 9 + ["2"])


@pytest.mark.parametrize(
  "name, row, truth, said",
  [
    ("pope", {}, "yes", "Yes."),  # as POPE's own files spell it
    ("pope", {}, " NO ", "no"),
    ("gqa", {}, " Left", "left"),
    ("chartqa", {}, " Blue ", "blue"),
    ("chartqa", {}, "nan", "NaN"),
    ("chartqa", {}, " 12 ", "12.1"),
    ("chartqa", {}, "[0.5, 'half']", "half"),
    ("chartqa", {}, "[Blue, Gray]", "[blue, gray]"),  # a text, as the kit reads it
    ("textvqa", {}, TEN, "2"),
    ("chartqa", {}, "[]x", "[]x"),
    ("seed", CHOICE, "b", "B"),
    ("seed", CHOICE, " a", "A"),
    ("mmbench", CHOICE, "b", "B"),
    ("mmmu", CHOICE, "b", "(B)"),
    ("mmmu", CHOICE | {"A": "", "B": ""}, "42 m", "It is 42 M"),
  ],
)
def test_every_truth_that_is_accepted_can_be_said(tmp_path, name, row, truth, said):
  rows = [{"index": i, "image": png("red"), "question": "q", "category": "x", **row, "answer": truth} for i in "12"]
  write_table(tmp_path / benchmarks.get(name).file, rows)
  scored = opened(name, tmp_path).score({i: {"answer": said} for i in "12"}).scores
  overall = scored["accuracy" if name == "pope" else "overall"]
  assert (overall.value, overall.count) == (100, 2)


@pytest.mark.parametrize(
  "name, row, truth",
  [
    ("pope", {}, "maybe"),
    ("pope", {}, "1"),
    ("mme", {}, "true"),
    ("seed", CHOICE, "C"),  # an empty option
    ("seed", CHOICE, "AB"),
    ("seed", CHOICE, "one"),
    ("mmbench", CHOICE, "0"),
    ("mmmu", CHOICE, "D"),
    ("textvqa", {}, "two"),  # the score leaves one of the people out
    ("textvqa", {}, "['two', 'two', 'two']"),
    ("textvqa", {}, "[]"),
    ("textvqa", {}, "['two', '2'"),
    ("textvqa", {}, "['two' 'three']"),  # as NumPy prints a list: Python reads one text
    ("textvqa", {}, "[['two'], 'three']"),
    ("chartqa", {}, '["two", None]'),
    ("chartqa", {}, "['" + "[" * 100_000),
  ],
)
def test_a_truth_that_no_answer_equals_is_refused_with_its_row(tmp_path, name, row, truth):
  right = TEN if name == "textvqa" else "A" if row else "no"
  fine = {"index": 1, "image": png("red"), "question": "q", "category": "x", "image_path": "x", **row, "answer": right}
  path = tmp_path / benchmarks.get(name).file
  write_table(path, [fine, fine | {"index": 7, "answer": truth}])
  with pytest.raises(UserError) as error:
    opened(name, tmp_path)
  message = str(error.value)
  assert str(path) in message and "index 7" in message and repr(truth)[:60] in message and "\n" not in message


def test_a_byte_order_mark_is_no_part_of_the_first_column(data):
  path = data / "POPE.tsv"
  before = tables.Table(path)
  sizes = [x.size for x in before.images("1")]
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  after = tables.Table(path)
  assert after.rows == before.rows and [x.size for x in after.images("1")] == sizes


def test_the_prompts_are_those_of_the_kit():
  mark, short = "<image>", "\nAnswer the question using a single word or phrase."
  asked = {"question": "Is it? Please answer yes or no."}
  assert prompts.yes_no(asked) == f"{mark}\n{asked['question']}{short}"
  assert prompts.pope(asked) == f"{mark}\nIs it?{short}"
  assert prompts.short({"question": "Who?"}) == f"{mark}Who?{short}"
  row = {"question": "Which?", "A": "x", "B": "y", "C": "", "hint": "Look."}
  letter = "Answer with the option's letter from the given choices directly."  # a blank line stands before it
  assert prompts.choice(row) == f"{mark}\nHint: Look.\nWhich?\nA. x\nB. y\n\n{letter}"
  assert prompts.choice({"question": "Why?", "A": ""}) == f"{mark}\nWhy?\nAnswer the question directly. "


def test_open_questions_of_mmmu_have_their_answer_as_first_option(tmp_path):
  row = {
    "index": 1,
    "image": png("red"),
    "question": "q",
    "A": "",
    "answer": "42 m",
    "category": "x",
    "split": "validation",
  }
  write_table(tmp_path / "MMMU_DEV_VAL.tsv", [row, row | {"index": 2}, row | {"index": 3, "split": "dev"}])
  benchmark = opened("mmmu", tmp_path)
  out = benchmark.score({"1": {"answer": "about 42 m"}, "2": {"answer": "41 m"}})
  assert out.scores["overall"].value == 50 and out.scores["overall"].count == 2


def test_a_question_with_several_pictures_is_asked_with_all_of_them_first(tiny_checkpoint, tmp_path):
  """As the kit asks MMMU; the marks inside its texts are words."""
  row = {
    "index": 1,
    "image": str([png("red"), png("blue")]),
    "question": "Is <image 1> like <image 2>?",
    "A": "yes",
    "B": "no",
    "answer": "A",
    "category": "x",
    "split": "validation",
  }
  write_table(tmp_path / "MMMU_DEV_VAL.tsv", [row, row | {"index": 2, "image": png("red")}])
  benchmark = opened("mmmu", tmp_path)
  benchmark.max_tokens = 3
  model, samples, done = jflow.load(tiny_checkpoint), Samples(tmp_path / "out", {}), []
  predictions.answer(model, benchmark.tasks(), samples, 2, done.append)
  images = tables.Table(tmp_path / "MMMU_DEV_VAL.tsv").images("1")
  text = prompts.choice(row).removeprefix("<image>")
  alone = model.understand(f"<image><image>{text}", images, 3)
  assert samples.read()["1"]["answer"] == alone and sum(done) == 2


def test_a_limit_keeps_whole_questions(tmp_path):
  rows = [
    {"index": i + 1_000_000 * turn, "image": png("red"), "question": "q", "A": "x", "answer": "A", "category": "c"}
    for turn in range(3)
    for i in (5, 6, 7)
  ]
  write_table(tmp_path / "MMBench_DEV_EN.tsv", rows)
  benchmark = opened("mmbench", tmp_path, limit=2)
  assert [task.key for task in benchmark.tasks()] == ["5", "6", "1000005", "1000006", "2000005", "2000006"]
  write_table(tmp_path / "MMBench_DEV_EN.tsv", [rows[0] | {"index": "a7"}])
  with refused("row 1", "a7"):
    opened("mmbench", tmp_path)
  (tmp_path / "MME.tsv").write_text("index\tquestion\n")
  for index in ("²", "9" * 5000):
    write_table(tmp_path / "MMBench_DEV_EN.tsv", [rows[0] | {"index": index}])
    with refused("row 1", "index"):
      opened("mmbench", tmp_path)
  with refused("--limit=5", "MME"):
    opened("mme", tmp_path, limit=5)


def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path):
  (tmp_path / "POPE.tsv").write_bytes(b"index\tquestion\n1\t\xff\xfe\n")
  with refused("POPE.tsv", "row 1"):
    tables.Table(tmp_path / "POPE.tsv")
  (tmp_path / "POPE.tsv").write_bytes(b"index\tquestion\tanswer\tanswer\n1\tq\tYes\tNo\n")
  with refused("answer"):
    tables.Table(tmp_path / "POPE.tsv")
  (tmp_path / "POPE.tsv").write_bytes("index\tquestion\n1\tq\n".encode("utf-16"))
  with refused("POPE.tsv", "row 1"):
    tables.Table(tmp_path / "POPE.tsv")


def test_pictures_of_tables_keep_to_the_limits_of_images(tmp_path, monkeypatch):
  """Alpha is dropped, as the published code opens pictures; more pixels than `images` allows are refused."""
  buffer = io.BytesIO()
  Image.new("RGBA", (4, 4), (200, 100, 50, 0)).save(buffer, "PNG")
  row = pope_rows(1)[0] | {"image": base64.b64encode(buffer.getvalue()).decode()}
  write_table(tmp_path / "POPE.tsv", [row])
  table = tables.Table(tmp_path / "POPE.tsv")
  assert table.images("0")[0].getpixel((0, 0)) == (200, 100, 50)
  seen = images.for_understanding(np.asarray(table.images("0")[0]), 4)  # what the model sees
  assert (seen == (200, 100, 50)).all()
  monkeypatch.setattr(images, "MAX_PIXELS", 15)
  with refused("index 0", "4 x 4", "15"):
    table.images("0")


def test_a_picture_as_published_is_not_turned_or_laid_over_white_later():
  turned, see_through = io.BytesIO(), io.BytesIO()
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  Image.new("RGB", (8, 4), "red").save(turned, "PNG", exif=exif)
  Image.new("RGB", (4, 4), "red").save(see_through, "PNG", transparency=(255, 0, 0))
  assert images.as_published(turned.getvalue()).size == (8, 4)
  assert images.decode(turned.getvalue()).shape == (8, 4, 3)  # what training does
  for data in (turned, see_through):
    shown = images.for_understanding(images.as_published(data.getvalue()), 8)
    assert (shown[4] == (255, 0, 0)).all()  # the middle line is red from end to end


def test_repeated_pictures_are_one_picture(tmp_path):
  """SEED's and GQA's files hold a picture once per question, or once for all: both ways they are the same picture."""
  large = io.BytesIO()
  Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)).save(large, "PNG")
  image = base64.b64encode(large.getvalue()).decode()
  pictures = {4: image, 7: png("red"), 9: image, 11: "9"}
  rows = [{"index": i, "image": one, "question": "q", "answer": "a"} for i, one in pictures.items()]
  write_table(tmp_path / "t.tsv", rows)
  table = tables.Table(tmp_path / "t.tsv")
  assert [table.picture(str(i)) for i in (4, 7, 9, 11)] == ["4", "7", "4", "4"]


def test_missing_samples_are_counted(data):
  benchmark = opened("pope", data)
  with refused("pope", "4 of 6", "2, 3, 4"):
    benchmark.score({"0": {"answer": "yes"}, "1": {"answer": "no"}})
