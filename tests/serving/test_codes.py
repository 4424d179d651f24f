"""A model that writes images by codes behind the API and the page, whose settings are its own."""

import base64
import io

import numpy as np
import pytest
import serving
from PIL import Image

from jflow.perf import inference

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def served():
  model = inference.open_pipeline(inference.Settings(config="janus/stage3:tiny", dtype="float32"))
  with serving.serving(model, batch=2) as (base, engine), serving.client(base) as client:
    yield client, engine


def test_a_picture_is_that_of_generate_with_its_settings(served):
  client, engine = served
  said = client.post(PATH, json={"prompt": "a red ring", "n": 2, "seed": 3, "guidance": 2, "temperature": 0.5}).json()
  assert (said["guidance"], said["temperature"]) == (2.0, 0.5) and "steps" not in said
  want = engine.pipeline.generate(["a red ring"], guidance=2.0, temperature=0.5, seed=3, num_images=2)
  for one, image in zip(said["data"], want, strict=True):
    got = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))), int)
    assert np.abs(got - np.asarray(image, int)).max() <= 1


@pytest.mark.parametrize("field, value", [("steps", 3), ("solver", "euler"), ("shift", 1.0), ("temperature", -1)])
def test_a_setting_of_flow_or_out_of_range_is_refused_by_its_field(served, field, value):
  refused = served[0].post(PATH, json={"prompt": "a red ring", field: value})
  assert refused.status_code == 400 and refused.json()["error"]["param"] == field


def test_the_page_offers_its_settings(served):
  pytest.importorskip("gradio", reason="the extra `demo` is not installed")
  from jflow.serving import demo

  work = demo.Work(served[1], "codes", None, None)
  assert [field.name for field in demo.on_page(work)] == ["guidance", "temperature"]
  wanted = demo.images_asked(["a red ring", 2, 5, 0.5, 7, False], work)
  assert (wanted.count, wanted.seed, wanted.settings.guidance, wanted.settings.temperature) == (2, 7, 5.0, 0.5)
