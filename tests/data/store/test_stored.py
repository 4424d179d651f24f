"""Images encoded ahead of time: the same losses as live, and no run takes those of another encoder, size or data
set."""

import errno
import functools
import io
import json
import os
import pathlib
import shutil
import types

import jax
import loopback
import numpy as np
import pytest
import tiny
from ml_dtypes import bfloat16
from PIL import Image
from refusals import refused

from jflow import stores
from jflow.batch import WRITE
from jflow.cli import prepare as prepare_command
from jflow.data import images
from jflow.data.pipeline import Pipeline
from jflow.data.records import RecordError
from jflow.data.store import prepare, prepared, scratch, stored, stored_writer
from jflow.data.store.cache import Cache
from jflow.data.store.prepared import PreparedSource
from jflow.data.tokenizer import Tokenizer
from jflow.generation.base import family
from jflow.training import encode as encoding
from jflow.training import loop, setup

RECORDS = 22
MOMENTS = (8, 8, 8)
LATENTS = family(tiny.CONFIG.generation).stored


@functools.cache
def tokenizer() -> Tokenizer:
  return Tokenizer.load(tiny.TOKENIZER)


@functools.cache
def encode():
  return encoding.encoder(LATENTS, tiny.params()["vae"], tiny.CONFIG)


def fingerprint() -> str:
  return encoding.fingerprint(LATENTS, tiny.params()["vae"], tiny.CONFIG)


def write(directory, encoder=encode, encoder_name="", **changes):
  arguments = dict(encoder=encoder_name or fingerprint(), batch_size=4, seed=7, threads=2) | changes
  return stored_writer.write(LATENTS, str(directory), 16, MOMENTS, encode=lambda x: encoder()(x), **arguments)


@pytest.fixture
def data(tmp_path) -> str:
  """A prepared data set of photographs of many shapes, in shards of 6 records."""
  rng = np.random.default_rng(0)
  lines = []
  for i in range(RECORDS):
    height, width = rng.integers(16, 70, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((int(width), int(height))).save(buffer, "JPEG" if i % 2 else "PNG")
    (tmp_path / f"{i}").write_bytes(buffer.getvalue())
    lines.append(json.dumps({"image": f"{i}", "caption": f"number {i}"}))
  (tmp_path / "in.jsonl").write_text("\n".join(lines))
  output = str(tmp_path / "data")
  prepare.prepare("llava-jsonl", input=str(tmp_path / "in.jsonl"), output=output, task="generation", part_records=6)
  return output


def configuration(data, **changes):
  fields = dict(
    first_sentence=0.0,
    prompt_drop=0.0,
    workers=0,
    threads=1,
    prefetch=1,
    plan_cache="",
    max_rejected_share=0.01,
    stored=True,
    mixture=((0, (0, 1, 0)),),
    sources=dict(understanding=(), generation=((data, 1.0),), text=()),
  )
  return tiny.configuration(data=fields | changes)


def pipeline(config) -> Pipeline:
  return Pipeline(config.data, tokenizer(), setup.row_shape(config, tiny.CONFIG), 4, 0)


def test_losses_are_those_of_the_encoder_in_the_step(data):
  """The moments are the encoder's own, rounded to bfloat16, of the very pixels that SigLIP reads."""
  header = write(data)
  assert (header["records"], header["encoder"]) == (
    PreparedSource(data, "generation").fingerprint,
    fingerprint(),
  )
  batch = pipeline(configuration(data)).batch(0)
  written = batch.image_kind == WRITE
  assert written.sum() > 8 and batch.stored.shape == (4, 3, *MOMENTS) and batch.stored.dtype == bfloat16
  vae = lambda p, x: tiny.model().apply({"params": p}, x, method=lambda m, x: m.writer.vae.encode(x))
  moments = np.concatenate(vae(tiny.params(), batch.images[written] / np.float32(127.5) - 1), axis=-1)
  np.testing.assert_allclose(batch.stored[written].astype(np.float32), moments, rtol=2**-8, atol=1e-5)

  draws = tiny.draws(4)
  ahead = tiny.loss_sums(tiny.model(), tiny.params(), batch, draws)
  live = batch._replace(stored=np.zeros((4, 3, 0), bfloat16))
  live = tiny.loss_sums(tiny.model(), tiny.params(), live, draws)
  for name in ("text", "flow", "alignment"):
    assert float(ahead[name]) == pytest.approx(float(live[name]), rel=2e-3), name
  wrong = tiny.loss_sums(tiny.model(), tiny.params(), batch._replace(stored=-batch.stored), draws)
  assert abs(float(wrong["flow"]) - float(live["flow"])) > 0.05 * float(live["flow"])  # it is the moments that count


def test_the_standard_deviation_comes_from_the_stored_log_variance():
  log_variance = np.float32([-30, -8, 0, 1.5])
  mean, std = tiny.model().apply(
    {"params": tiny.params()},
    np.ones(4, bfloat16),
    log_variance.astype(bfloat16),
    method=lambda m, *x: m.writer.scaled(*x),
  )
  np.testing.assert_allclose(std, 0.5 * np.exp(log_variance / 2), rtol=1e-6)
  np.testing.assert_array_equal(mean, np.full(4, 0.5, np.float32))


def test_every_epoch_shows_the_square_that_was_encoded(data):
  write(data)
  source, made = (
    PreparedSource(data, "generation"),
    stored.StoredImages(LATENTS, PreparedSource(data, "generation"), 16, MOMENTS),
  )
  wanted = {}
  for index in range(RECORDS):
    box, moments = made[index]
    rng = np.random.default_rng([7, index])
    pixels = images.for_generation(source[index].images[0], 16, rng)
    np.testing.assert_array_equal(images.square(source[index].images[0], 16, box), pixels)
    wanted[pixels.tobytes()] = moments.tobytes()
  rows = pipeline(configuration(data))
  shown = []
  for step in range(8):
    batch = rows.batch(step)
    for pixels, moments in zip(batch.images[batch.image_kind == WRITE], batch.stored[batch.image_kind == WRITE]):
      assert wanted[pixels.tobytes()] == moments.tobytes()
      shown.append(pixels.tobytes())
  assert len(shown) > 3 * RECORDS and set(shown) == set(wanted)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_carry_the_moments(data, workers):
  write(data)
  expected = pipeline(configuration(data))
  for step, (batch, info) in enumerate(pipeline(configuration(data, workers=workers)).batches(0, 3)):
    jax.tree.map(np.testing.assert_array_equal, batch, expected.batch(step))
    assert not info["rejected"] and np.abs(batch.stored.astype(np.float32)).max() > 0.1


def test_a_killed_run_goes_on_and_nothing_is_there_before_all_is(data):
  calls = []

  def failing():
    calls.append(1)
    if len(calls) == 4:
      raise KeyboardInterrupt
    return encode()

  with pytest.raises(KeyboardInterrupt):
    write(data, failing)
  assert not os.path.exists(stored.folder(LATENTS, data, 16))
  calls.clear()
  write(data, lambda: calls.append(1) or encode())
  killed = {p.name: p.read_bytes() for p in pathlib.Path(stored.folder(LATENTS, data, 16)).iterdir()}
  assert len(calls) == 5  # of 7: shards of 6, 6, 6 and 4 in batches of 4, the first shard was there
  os.rename(stored.folder(LATENTS, data, 16), data + "-first")
  write(data, batch_size=7, threads=1)
  whole = stored.StoredImages(LATENTS, PreparedSource(data, "generation"), 16, MOMENTS)
  os.rename(stored.folder(LATENTS, data, 16), data + "-second")
  os.rename(data + "-first", stored.folder(LATENTS, data, 16))
  resumed = stored.StoredImages(LATENTS, PreparedSource(data, "generation"), 16, MOMENTS)
  for index in range(RECORDS):
    assert resumed[index][0] == whole[index][0]
    np.testing.assert_allclose(*(x[index][1].astype(np.float32) for x in (resumed, whole)), rtol=2**-7, atol=1e-5)
  shards = [f"latents-{i:05d}-of-00004.array_record" for i in range(4)]
  assert sorted(killed) == [*shards, "latents.json", "sha256sums.txt"]


def test_one_process_writes_and_a_full_disk_gets_one_clear_line(data, monkeypatch):
  def meanwhile():
    with refused("latents-16.partial"):
      write(data)
    return encode()

  write(data, meanwhile)
  shutil.rmtree(stored.folder(LATENTS, data, 16))

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device", "latents-00000")

  monkeypatch.setattr(prepared, "call_writer", full)
  with refused("latents-00000", "No space left on device"):
    write(data)


@pytest.mark.parametrize(
  "damage",
  [
    "",
    "[]",
    "{",
    "42",
    "\0" * 60,
    "[" * 100_000,
    '{"schema": 1}',
    {"shard_lengths": None},
    {"shard_bytes": [1]},
    {"moments": "8"},
    {"shard_lengths": ["6", 6, 6, 4]},
    {"records": None},
    {"encoder": 7},
  ],
  ids=lambda value: ascii(value)[:24],
)
def test_a_damaged_header_is_named(written, damage):
  header = pathlib.Path(written[0]) / "latents.json"
  text = json.dumps(json.loads(written[1]) | damage) if isinstance(damage, dict) else damage
  header.write_text(text)
  with refused("latents.json"):
    stored.StoredImages(LATENTS, written[2], 16, MOMENTS)
  assert header.read_text() == text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """The folder of some latents, their header, and their records; a test writes another header."""
  data = str(tmp_path_factory.mktemp("written") / "data")
  prepare.prepare("shapes", data, "generation", records=22, image_size=16, part_records=6)
  constant = lambda: lambda pixels: np.zeros((len(pixels), *MOMENTS), bfloat16)
  write(data, constant)
  folder = stored.folder(LATENTS, data, 16)
  return folder, (pathlib.Path(folder) / "latents.json").read_text(), PreparedSource(data, "generation")


@pytest.mark.parametrize("harm", ["report", "shard of NUL", "shard a link"])
def test_a_shard_that_is_not_whole_is_made_again(tmp_path, harm):
  data = str(tmp_path / "data")
  prepare.prepare("shapes", data, "generation", records=12, image_size=16, part_records=6)
  ones = lambda pixels: np.ones((len(pixels), *MOMENTS), bfloat16)
  calls = []

  def killed():
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return ones

  with pytest.raises(KeyboardInterrupt):
    write(data, killed)
  shard = pathlib.Path(stored.folder(LATENTS, data, 16) + ".partial") / "latents-00000-of-00002.array_record"
  (tmp_path / "precious").write_text("mine")
  if harm == "report":
    shard.with_name(shard.name + ".json").write_text('{"bytes": "x"}')
  elif harm == "shard of NUL":
    shard.write_bytes(bytes(shard.stat().st_size))
  else:
    shard.unlink()
    shard.symlink_to(tmp_path / "precious")
  write(data, lambda: ones)
  made = stored.StoredImages(LATENTS, PreparedSource(data, "generation"), 16, MOMENTS)
  assert all((made[i][1] == 1).all() for i in range(12)) and (tmp_path / "precious").read_text() == "mine"


def test_a_run_refuses_what_does_not_fit(data, tmp_path):
  with refused("16", "prepare --latents"):
    pipeline(configuration(data))
  write(data)
  source = PreparedSource(data, "generation")
  with refused("32", "latents-16"):
    stored.StoredImages(LATENTS, source, 32, MOMENTS)
  with refused("(8, 8, 8)", "(8, 8, 16)"):
    stored.StoredImages(LATENTS, source, 16, (8, 8, 16))
  with refused("latents-16"):
    write(data)
  header = pathlib.Path(data, "latents-16", "latents.json")
  kept = header.read_text()
  for field, value, message in (
    ("records", "0" * 64, "records"),
    ("schema", 2, "schema 2"),
    ("shard_bytes", [1, 2, 3, 4], "1 bytes"),
  ):
    header.write_text(json.dumps(json.loads(kept) | {field: value}))
    with refused(message):
      pipeline(configuration(data))
  header.write_text(kept)
  world = configuration("shapes", shapes=dict(size=50, seed=0, split="train"))
  with refused("shapes"):
    pipeline(world)


def test_another_vae_is_refused_before_the_step_is_compiled(data, tmp_path, monkeypatch):
  write(data)
  monkeypatch.setattr(setup, "start_params", lambda *_: jax.tree.map(lambda x: x + 1, tiny.params()))
  monkeypatch.setattr(loop, "_Run", lambda *_: pytest.fail("too late"))
  with refused("VAE"):
    loop.train(configuration(data), tmp_path / "run")


def test_the_fingerprint_covers_the_encoder_and_nothing_else():
  vae, config = tiny.params()["vae"], tiny.CONFIG
  encoding.check({"somewhere": fingerprint()}, {"vae": vae}, config)
  encoding.check({}, {}, config)
  decoder = vae | {"decoder": jax.tree.map(lambda x: x + 1, vae["decoder"])}
  assert encoding.fingerprint(LATENTS, decoder, config) == fingerprint()
  for name in vae["encoder"]:
    nudged = vae["encoder"] | {name: vae["encoder"][name] + np.float32(1e-3)}
    assert encoding.fingerprint(LATENTS, vae | {"encoder": nudged}, config) != fingerprint()
  with refused("VAE"):
    encoding.check({"somewhere": fingerprint()}, {}, config)


def test_a_damaged_entry_costs_its_record(data):
  write(data)
  made = stored.StoredImages(LATENTS, PreparedSource(data, "generation"), 16, MOMENTS)
  entry = made[8][1].tobytes()
  (shard,) = [path for path in pathlib.Path(data, "latents-16").iterdir() if entry in path.read_bytes()]
  content = bytearray(shard.read_bytes())
  content[content.index(entry) + 100] ^= 1
  shard.write_bytes(content)
  made = stored.StoredImages(LATENTS, PreparedSource(data, "generation"), 16, MOMENTS)
  reasons = []
  for index in range(RECORDS):
    try:
      made[index]
    except RecordError as error:
      reasons.append((index, error.reason))
  assert reasons == [(8, "latents")]


def test_a_picture_that_cannot_be_read_has_no_latents_and_is_counted(data, monkeypatch):
  real = images.square
  broken = PreparedSource(data, "generation")[8].images[0]

  def square(image, size, box):
    if image == broken:
      raise images.ImageError("unreadable", "damaged")
    return real(image, size, box)

  monkeypatch.setattr(images, "square", square)
  assert write(data)["rejected"] == {"unreadable": 1}
  made = stored.StoredImages(LATENTS, PreparedSource(data, "generation"), 16, MOMENTS)
  made[7], made[9]
  with pytest.raises(RecordError):
    made[8]


def test_the_command_names_its_mistakes(data, tmp_path, capsys):
  for arguments, message in (
    ([f"--input={data}", f"--checkpoint={tmp_path / 'none'}"], str(tmp_path / "none")),
    ([f"--input={data}", "--checkpoint=x", "--batch_size=0"], "--batch_size=0"),
  ):
    with refused(message):
      prepare_command.main(["--latents", *arguments])
  with pytest.raises(SystemExit) as stopped:
    prepare_command.main(["--latents", "--help"])
  assert stopped.value.code == 0 and "latents-SIZE" in capsys.readouterr().out


def test_latents_of_pictures_to_read_and_a_run_that_is_interrupted_get_one_clear_line(data, tmp_path):
  def interrupt(_):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt, match="stopped; run the same command again to go on"):
    stored_writer.write(LATENTS, data, 16, MOMENTS, "x", interrupt, 4, 7, 2)
  read = str(tmp_path / "read")
  prepare.prepare("shapes", read, "understanding", records=1, image_size=16)
  with refused("--input=", "understanding", "--task=generation"):
    stored_writer.write(LATENTS, read, 16, MOMENTS, "x", interrupt, 4, 7, 2)


def test_codes_lie_beside_the_records_as_latents_do(data):
  kind, source = family(tiny.JANUS.generation).stored, PreparedSource(data, "generation")
  codes = lambda pixels: 250 * pixels.reshape(len(pixels), -1)[:, :16].astype(np.uint16)
  stored_writer.write(kind, data, 16, (16,), "x", codes, 4, 7, 2)
  made = stored.StoredImages(kind, source, 16, (16,))
  for index in range(RECORDS):
    box, found = made[index]
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, codes(images.square(source[index].images[0], 16, box)[None])[0])
  with refused("32", "codes-16", "prepare --codes"):
    stored.StoredImages(kind, source, 32, (64,))
  with refused("(16,)", "(64,)"):
    stored.StoredImages(kind, source, 16, (64,))


@pytest.mark.parametrize("name, model, other", [("latents", tiny.JANUS, "codes"), ("codes", tiny.CONFIG, "latents")])
def test_a_model_that_writes_in_another_way_names_its_own_flag(data, monkeypatch, name, model, other):
  monkeypatch.setattr(encoding, "read_checkpoint", lambda *_, **__: types.SimpleNamespace(config=model, params={}))
  with refused(f"--{other}", f"--{name}"):
    encoding.make(name, "somewhere", data, None, "ema", 1, 0, 1)


@pytest.mark.parametrize("count", [2, 5])
def test_shares_joined_are_what_one_machine_makes(data, count):
  folder = stored.folder(LATENTS, data, 16)
  whole = write(data)
  here = {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}
  shutil.rmtree(folder)
  with refused("--part=K/N"):
    write(data, merge=True)
  for machine in range(count, 1, -1):
    write(data, part=(machine, count))
  with refused(f"--part=1/{count}"):
    write(data, merge=True)
  write(data, part=(1, count))
  with refused("encoder", f"--part=1/{count}"):
    write(data, encoder_name="another", merge=True)
  shard = f"{folder}.machine-00001-of-{count:05d}/latents-00000-of-00004.array_record"
  os.rename(shard, shard + ".lost")
  with refused("latents-00000", f"--part=1/{count}"):
    write(data, merge=True)
  os.rename(shard + ".lost", shard)
  left = pathlib.Path(data, "left")
  shutil.copytree(f"{folder}.machine-00002-of-{count:05d}", left)
  assert write(data, merge=True) == whole
  shutil.copy(left / "job.json", folder)
  left.rename(f"{folder}.machine-00002-of-{count:05d}")
  with refused(folder, "exists"):
    write(data, encoder_name="another", merge=True)
  assert write(data, merge=True) == whole  # of a kill at the very end
  assert {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()} == here
  assert not list(pathlib.Path(data).glob("*.machine-*"))


def test_arrays_in_a_store_are_those_of_the_folder(data, tmp_path):
  write(data)
  here = stored.StoredImages(LATENTS, PreparedSource(data, "generation"), 16, MOMENTS)
  with loopback.serving() as server:
    address = server.put(pathlib.Path(data), "bucket/set")
    source = PreparedSource(address, "generation", Cache(str(tmp_path / "cache"), 2**30))
    there = stored.StoredImages(LATENTS, source, 16, MOMENTS)
    assert (there.encoder, there.fingerprint) == (here.encoder, here.fingerprint)
    for index in range(RECORDS):
      assert here[index][0] == there[index][0]
      np.testing.assert_array_equal(here[index][1], there[index][1])
    del server.files["bucket/set/latents-16/latents-00001-of-00004.array_record"]
    with refused("latents-00001"):
      stored.StoredImages(LATENTS, source, 16, MOMENTS)


def test_a_set_in_a_store_gets_what_that_of_a_folder_does(data, tmp_path, monkeypatch):
  """By one machine, whose store is lost at each kind of file, and by several."""
  monkeypatch.setattr(stores, "WAITS", (0.01,) * 6)
  monkeypatch.setattr(scratch, "FOLDER", str(tmp_path / "scratch"))
  half = lambda: lambda pixels: np.broadcast_to(pixels.mean((1, 2, 3))[:, None, None, None], (len(pixels), *MOMENTS))
  with loopback.serving() as server:
    address = server.put(pathlib.Path(data), "bucket/set")
    whole = write(data, half)
    here = {path.name: path.read_bytes() for path in pathlib.Path(data, "latents-16").iterdir()}
    there = functools.partial(write, address, half, cache=Cache(str(tmp_path / "cache"), 2**30))
    made = lambda: {name.split("/")[-1]: data for name, data in server.files.items() if "/latents-16/" in name}
    records = set(server.files)
    for moment in ("partial/latents-00002", "latents-16/latents-00001", "latents-16/latents.json"):
      server.always[moment] = "503"
      with refused("latents-0000" if "0000" in moment else "latents.json", "go on"):
        there()
      server.always.clear()
      assert "latents.json" not in made()
    server.asked.clear()
    assert there() == whole and made() == here
    assert not [path for method, path in server.asked if method == "PUT" and "partial/" in path]
    with refused(f"{address}/latents-16", "exists"):
      there()
    for name in set(server.files) - records:
      del server.files[name]
    for machine in (2, 1):
      there(part=(machine, 2))
    lost = server.files.pop("bucket/set/latents-16.machine-00002-of-00002/latents-00003-of-00004.array_record")
    with refused("latents-00003", "--part=2/2"):
      there(merge=True)
    server.files["bucket/set/latents-16.machine-00002-of-00002/latents-00003-of-00004.array_record"] = lost
    assert there(merge=True) == whole and made() == here
    assert set(server.files) - records == {f"bucket/set/latents-16/{name}" for name in here}
  assert not any(names for *_, names in os.walk(tmp_path / "scratch"))
