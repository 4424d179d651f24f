"""Data sets that TFDS itself writes, without TensorFlow."""

import io

import numpy as np


def write(folder, features, examples, file_format="array_record"):
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


def captioned(f):
  """Features of pictures with a label, a caption and a score."""
  return {
    "image": f.Image(),
    "label": f.ClassLabel(names=["cat", "dog"]),
    "caption": f.Text(),
    "score": np.float32,
  }
