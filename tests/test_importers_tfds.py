"""tfds: data sets that TFDS wrote come in without TensorFlow, their images untouched."""

import io
import sys

import numpy as np
import pytest

from jflow.data.records import Turn
from jflow.errors import UserError
from preparing import image, read_back, run


def _write(folder, features, examples, file_format="array_record"):
  """Writes a data set by TFDS itself."""
  import tensorflow_datasets as tfds

  class Pets(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name, pkg_dir_path, VERSION = "pets", folder, tfds.core.Version("1.0.0")

    def _info(self):
      return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features(tfds.features)))

    def _split_generators(self, _):
      return {"train": self._generate_examples(len(examples)), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
      for number in range(count):  # each image as a file of its own: TFDS stores what it reads from one
        yield number, {key: _as_files(value) for key, value in examples[number].items()}

  folder.mkdir(parents=True)
  Pets(data_dir=folder, file_format=file_format).download_and_prepare()
  return folder / "pets"


def _as_files(value):
  if isinstance(value, list) and isinstance(value[0], bytes):
    return [io.BytesIO(each) for each in value]
  return io.BytesIO(value) if isinstance(value, bytes) else value


def _captioned(f):
  return {
    "image": f.Image(),
    "label": f.ClassLabel(names=["cat", "dog"]),
    "caption": f.Text(),
    "score": np.float32,
  }


EXAMPLES = [
  {"image": image(i, "JPEG"), "label": i % 2, "caption": f"pet {i}, né", "score": i / 2} for i in range(7)
]


@pytest.mark.parametrize("file_format", ["array_record", "parquet"])
def test_images_come_over_byte_for_byte(tmp_path, file_format):
  folder = _write(tmp_path / "in", _captioned, EXAMPLES, file_format)
  summary, output = run(folder, "generation", "1.0.0", "tfds", part_records=3, processes=2)
  assert "tensorflow" not in sys.modules and summary["shard_lengths"] == [3, 3, 1]
  got = read_back(output, "generation")
  assert sorted((r.text, r.images[0]) for r in got) == [(e["caption"], e["image"]) for e in EXAMPLES]


def test_labels_and_splits(tmp_path):
  folder = _write(tmp_path / "in", _captioned, EXAMPLES)
  _, output = run(folder, "generation", "1.0.0", "tfds", text_column="label", split="test")
  assert sorted(record.text for record in read_back(output, "generation")) == ["cat", "dog"]


@pytest.mark.parametrize("classes", [{"names": ["cat", "dog"]}, {"num_classes": 2}])
def test_an_example_without_a_label_is_rejected_and_does_not_get_the_last_ones_name(tmp_path, classes):
  features = lambda f: {"image": f.Image(), "label": f.ClassLabel(**classes)}
  examples = [{"image": image(i), "label": label} for i, label in enumerate((0, -1, 1))]
  folder = _write(tmp_path / "in", features, examples)
  summary, output = run(
    folder, "generation", "1.0.0", "tfds", text_column="label", max_rejected_share=0.5
  )
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
  folder = _write(tmp_path / "in", features, [example] * 2)
  _, output = run(folder, "understanding", "1.0.0", "tfds")
  for record in read_back(output):
    assert record.images == (image(1), image(2))
    assert record.turns == (Turn("user", "<image><image> Same?"), Turn("assistant", "No."))


def test_mistakes_get_one_clear_line(tmp_path):
  folder = _write(tmp_path / "in", _captioned, EXAMPLES)
  for options, message in [
    ({"name": ""}, "no TFDS data set: name the directory that holds dataset_info.json"),
    ({"split": "dev"}, "no split 'dev': --split is one of train, test"),
    ({"text_column": "title"}, "no feature 'title': --text_column is one of caption, image, label, score"),
  ]:
    with pytest.raises(UserError, match=message):
      run(folder, "generation", format="tfds", **{"name": "1.0.0", **options})
  (folder / "1.0.0" / "dataset_info.json").write_text("{")
  with pytest.raises(UserError, match="cannot be read as a TFDS data set"):
    run(folder, "generation", "1.0.0", "tfds")
