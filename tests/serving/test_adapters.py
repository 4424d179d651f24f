"""Several adapters in one server: a request names its model, and each answers and paints as it does alone."""

import base64
import concurrent.futures
import io

import adapted
import numpy as np
import pytest
import serving
import tiny
from PIL import Image
from refusals import refused

from jflow.cli import serve, serving_flags
from jflow.data.tokenizer import Tokenizer
from jflow.inference import reading
from jflow.inference.pipeline import Pipeline
from jflow.interop import transfer
from jflow.models import lora

CHAT, PAINT = "/v1/chat/completions", "/v1/images/generations"
NAMES = ("birds", "rings")


@pytest.fixture(scope="module")
def models():
  """The base under "tiny", and two models with adapters."""
  base = tiny.pipeline()
  flat = {path: np.asarray(x) for path, x in transfer.flatten(tiny.params()).items()}
  words, models = Tokenizer.load(str(tiny.TOKENIZER)), {serving.NAME: base}
  for seed, (name, template) in enumerate(zip(NAMES, ("plain", "chat"), strict=True)):
    own = flat | adapted.leaves(flat, ("language_model/layers", "generation_decoder"), seed)
    sampling = {"guidance": 4.0} if name == "rings" else {}
    model, params = tiny.model(), lora.merged(transfer.nest(own))
    models[name] = Pipeline(model, params, words, template, sampling=sampling, beside=base)
  return models


@pytest.fixture(scope="module")
def served(models):
  """The address of a server of all of them, and its engine."""
  with serving.serving(models[serving.NAME], adapters={name: models[name] for name in NAMES}, slots=2) as found:
    yield found


@pytest.fixture(scope="module")
def client(served):
  with serving.client(served[0]) as client:
    yield client


def test_the_memory_of_all_conversations_is_taken_at_the_start(served):
  assert set(served[1]._decoders) == {"", *NAMES}


def ask(text="Why?", **more):
  return {"messages": [{"role": "user", "content": text}], "max_tokens": 9} | more


def picture(entry) -> np.ndarray:
  return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))).astype(int)


def test_requests_of_all_models_at_once_are_those_of_each_alone(client, models):
  chats = [(name, text) for text in ("Why?", "What is a ring?") for name in models]
  paints = [(name, seed) for seed in (1, 2) for name in models]
  with concurrent.futures.ThreadPoolExecutor(12) as pool:
    said = [pool.submit(client.post, CHAT, json=ask(text, model=name)) for name, text in chats]
    bodies = [{"prompt": "a ring", "seed": seed, "steps": 2, "model": name} for name, seed in paints]
    made = [pool.submit(client.post, PAINT, json=body) for body in bodies]
    said, made = ([job.result().json() for job in jobs] for jobs in (said, made))
  for (name, text), body in zip(chats, said, strict=True):
    assert body["model"] == name
    assert body["choices"][0]["message"]["content"] == models[name].understand(text, max_tokens=9)
  assert len({body["choices"][0]["message"]["content"] for body in said[:3]}) == 3
  for (name, seed), body in zip(paints, made, strict=True):
    want = np.asarray(models[name].generate(["a ring"], 2, seed=seed)[0]).astype(int)
    assert body["model"] == name and np.abs(picture(body["data"][0]) - want).max() <= 1
  assert len({picture(body["data"][0]).tobytes() for body in made[:3]}) == 3


def test_a_request_without_a_model_is_for_the_base(client, models):
  body = client.post(CHAT, json=ask()).json()
  assert body["model"] == serving.NAME
  assert body["choices"][0]["message"]["content"] == models[serving.NAME].understand("Why?", max_tokens=9)


def test_a_base_with_adapters_beside_it_computes_the_same_bits(client, models):
  alone = tiny.pipeline()
  for path, x in transfer.flatten(alone.params).items():
    np.testing.assert_array_equal(x, transfer.flatten(models[serving.NAME].params)[path])
  images = [np.asarray(model.generate(["a ring"], 2, seed=3)[0]) for model in (alone, models[serving.NAME])]
  np.testing.assert_array_equal(*images)
  assert len({model.understand("Why?", max_tokens=9) for model in (alone, models[serving.NAME])}) == 1


def test_adapters_run_the_programs_of_the_base(client, models):
  client.post(CHAT, json=ask())
  before = len(reading.run), len(reading.admit)
  for name in NAMES:
    assert client.post(CHAT, json=ask(model=name)).status_code == 200
  assert (len(reading.run), len(reading.admit)) == before


def test_the_list_of_models_names_them(client):
  listed = client.get("/v1/models").json()["data"]
  assert [(x["id"], x.get("parent")) for x in listed] == [
    (serving.NAME, None),
    *((name, serving.NAME) for name in NAMES),
  ]
  assert client.get("/v1/models/birds").json()["id"] == "birds"
  for missing in (client.get("/v1/models/fish"), client.post(CHAT, json=ask(model="fish"))):
    error = missing.json()["error"]
    assert missing.status_code == 404 and error["code"] == "model_not_found"
    assert all(name in error["message"] for name in ("fish", serving.NAME, *NAMES))


@pytest.mark.parametrize("name", ["tiny", "birds"])
def test_a_name_is_of_one_model(name):
  args = serve.parser().parse_args(["--checkpoint=tiny", "--adapter=birds=a", f"--adapter={name}=b"])
  with refused(f"--adapter={name}=b"):
    serving_flags.adapters_of(args, "tiny")


@pytest.mark.parametrize("value", ["birds", "=a", "birds=", " =a"])
def test_an_adapter_to_serve_needs_a_name(value):
  with pytest.raises(SystemExit) as ended:
    serve.parser().parse_args(["--checkpoint=tiny", f"--adapter={value}"])
  assert ended.value.code == 2
