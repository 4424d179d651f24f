"""tfds: data sets that TFDS wrote come in without TensorFlow, their images untouched."""

import json
import shutil
import sys

import pytest
import tfds_sets
from preparing import image, read_back, run
from refusals import refused

from jflow.data.records import Turn

EXAMPLES = [{"image": image(i, "JPEG"), "label": i % 2, "caption": f"pet {i}, né", "score": i / 2} for i in range(7)]


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_images_come_over_byte_for_byte(tmp_path, file_format):
  folder = tfds_sets.write(tmp_path / "in", tfds_sets.captioned, EXAMPLES, file_format)
  summary, output = run(folder, "generation", "1.0.0", "tfds", part_records=3, processes=2)
  assert "tensorflow" not in sys.modules and summary["shard_lengths"] == [3, 3, 1]
  got = read_back(output, "generation")
  assert sorted((r.text, r.images[0]) for r in got) == [(e["caption"], e["image"]) for e in EXAMPLES]


def test_labels_and_splits(tmp_path):
  folder = tfds_sets.write(tmp_path / "in", tfds_sets.captioned, EXAMPLES)
  _, output = run(folder, "generation", "1.0.0", "tfds", text_column="label", split="test")
  assert sorted(record.text for record in read_back(output, "generation")) == ["cat", "dog"]


@pytest.mark.parametrize("classes", [{"names": ["cat", "dog"]}, {"num_classes": 2}])
def test_an_example_without_a_label_is_rejected_and_does_not_get_the_last_ones_name(tmp_path, classes):
  features = lambda f: {"image": f.Image(), "label": f.ClassLabel(**classes)}
  examples = [{"image": image(i), "label": label} for i, label in enumerate((0, -1, 1))]
  folder = tfds_sets.write(tmp_path / "in", features, examples)
  summary, output = run(folder, "generation", "1.0.0", "tfds", text_column="label", max_rejected_share=0.5)
  assert summary["rejected"] == {"missing_caption": 1}
  assert sorted(record.text for record in read_back(output, "generation")) == classes.get("names", ["0", "1"])


def test_lists_of_images_and_conversations(tmp_path):
  def features(f):
    return {
      "images": f.Sequence(f.Image()),
      "conversations": f.Sequence({"from": f.Text(), "value": f.Text()}),
    }

  turns = [{"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "No."}]
  example = {"images": [image(1), image(2)], "conversations": turns}
  folder = tfds_sets.write(tmp_path / "in", features, [example] * 2)
  _, output = run(folder, "understanding", "1.0.0", "tfds")
  for record in read_back(output):
    assert record.images == (image(1), image(2))
    assert record.turns == (Turn("user", "<image><image> Same?"), Turn("assistant", "No."))


def test_mistakes_get_one_clear_line(tmp_path):
  folder = tfds_sets.write(tmp_path / "in", tfds_sets.captioned, EXAMPLES)
  for options, message in [
    ({"name": ""}, "dataset_info.json"),
    ({"split": "dev"}, "--split is one of train, test"),
    ({"text_column": "title"}, "caption, image, label, score"),
  ]:
    with refused(message):
      run(folder, "generation", format="tfds", **{"name": "1.0.0", **options})
  (folder / "1.0.0" / "dataset_info.json").write_text("{")
  with refused(f"{folder / '1.0.0'}"):
    run(folder, "generation", "1.0.0", "tfds")


def _stored(**values) -> bytes:
  """An example as TFDS stores it, whatever it holds."""
  from tensorflow_datasets.proto import tf_example_pb2

  example = tf_example_pb2.Example()
  for name, value in values.items():
    feature = example.features.feature[name]
    (feature.int64_list if isinstance(value[0], int) else feature.bytes_list).value.extend(value)
  return example.SerializeToString()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """A data set of texts whose examples a test replaces, and how."""

  def features(f):
    turns = f.Sequence({"role": f.Text(), "content": f.Text()})
    return {"text": f.Text(), "url": f.Text(), "label": f.ClassLabel(num_classes=2), "turns": turns}

  says = [{"role": "user", "content": "Why?"}]
  examples = [{"text": "A text.", "url": "http://a.b", "label": 1, "turns": says}] * 2
  folder = tfds_sets.write(tmp_path_factory.mktemp("tfds") / "in", features, examples) / "1.0.0"
  return folder


def _replaced(texts, folder, examples, length=None):
  """Returns a copy of the data set that holds these examples, and says that there are `length`."""
  from array_record.python import array_record_module

  shutil.copytree(texts, folder / "1.0.0")
  (shard,) = (folder / "1.0.0").glob("*train*")
  shard.unlink()
  writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
  for example in examples:
    writer.write(example)
  writer.close()
  info = json.loads((folder / "1.0.0" / "dataset_info.json").read_text())
  (split,) = (split for split in info["splits"] if split["name"] == "train")
  split["shardLengths"] = [str(len(examples) if length is None else length)]
  (folder / "1.0.0" / "dataset_info.json").write_text(json.dumps(info))
  return folder


SOUND = {
  "text": [b"A text."],
  "url": [b"http://a.b"],
  "label": [1],
  "turns/role": [b"a"],
  "turns/content": [b"b"],
}


@pytest.mark.parametrize(
  "changed, options, rejected",
  [
    ({"url": [b"caf\xe9"]}, {}, {}),
    ({"turns/role": [b"\xff"]}, {}, {}),
    ({"label": [7]}, {}, {}),
    ({"text": [b"caf\xe9"]}, {}, {"invalid_utf8": 1}),
    ({"label": [7]}, {"text_column": "label"}, {"bad_field": 1}),
    ({"turns/role": [b"user"]}, {"text_column": "turns"}, {"bad_field": 1}),
    ({"turns/role": [b"\xff", b"assistant"]}, {"text_column": "turns"}, {"invalid_utf8": 1}),
  ],
  ids=["url", "unused", "label", "text", "used-label", "lengths", "used"],
)
def test_a_feature_that_cannot_be_read_costs_the_record_that_needs_it(texts, tmp_path, changed, options, rejected):
  turns = {"turns/role": [b"user", b"assistant"], "turns/content": [b"Why?", b"So."]}
  sound = SOUND | (turns if options.get("text_column") == "turns" else {})
  examples = [_stored(**sound), _stored(**sound | changed), _stored(**sound)]
  folder = _replaced(texts, tmp_path / "in", examples)
  summary, _ = run(folder, "text", "1.0.0", "tfds", max_rejected_share=1.0, **options)
  assert summary["rejected"] == rejected and summary["accepted"] == 3 - sum(rejected.values())


def test_an_example_that_is_none_costs_itself(texts, tmp_path):
  examples = [_stored(**SOUND), b"\xff\xff", _stored(url=[b"a"]), _stored(**SOUND)]
  folder = _replaced(texts, tmp_path / "in", examples)
  summary, _ = run(folder, "text", "1.0.0", "tfds", max_rejected_share=1.0)
  assert summary["rejected"] == {"corrupt": 1, "missing_text": 1} and summary["accepted"] == 2


@pytest.mark.parametrize("length", [1, 5, 10**15])
def test_other_counts_of_records_than_there_are_lose_nothing_silently(texts, tmp_path, length):
  folder = _replaced(texts, tmp_path / "in", [_stored(**SOUND)] * 2, length)
  with refused("2", "dataset_info.json"):
    run(folder, "text", "1.0.0", "tfds")


def test_numbers_are_no_images(texts):
  with refused("label"):
    run(texts.parent, "generation", "1.0.0", "tfds", image_column="label", output=str(texts.parent / "out"))


def test_a_description_of_features_imports_nothing(texts, tmp_path, monkeypatch):
  """TFDS imports the modules whose classes the file names."""
  folder = _replaced(texts, tmp_path / "in", [_stored(**SOUND)])
  (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
  monkeypatch.syspath_prepend(tmp_path)
  path = folder / "1.0.0" / "features.json"
  for key in ("pythonClassName", "type"):
    features = json.loads((texts / "features.json").read_text())
    features["featuresDict"]["features"]["url"][key] = "planted.Text"
    path.write_text(json.dumps(features))
    with refused("planted.Text"):
      run(folder, "text", "1.0.0", "tfds")


@pytest.mark.parametrize(
  "content, word",
  [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n", "git lfs pull"),
    (b"no record", "cannot be read"),
    (None, "is missing"),
  ],
  ids=["git-lfs", "damaged", "missing"],
)
def test_a_shard_that_is_none_is_named(texts, tmp_path, content, word):
  folder = _replaced(texts, tmp_path / "in", [_stored(**SOUND)])
  (shard,) = (folder / "1.0.0").glob("*train*")
  shard.write_bytes(content) if content else shard.unlink()
  with refused("train", word):
    run(folder, "text", "1.0.0", "tfds")
