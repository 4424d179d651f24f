"""Curves of metrics: smoothing and paired differences against numpy, pictures that show something, refusals."""

import json

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from jflow.__main__ import main
from jflow.training import plots


def rows(count: int, seed: int, first: int = 1, **more) -> list[dict]:
  rng = np.random.default_rng(seed)
  return [
    {"step": first + i, "loss": float(x), "loss_text": float(x) / 2, "packs": {"text": 1}, "mfu": None} | more
    for i, x in enumerate(5 + rng.standard_normal(count))
  ]


def write(run, lines, end: str = ""):
  run.mkdir(parents=True, exist_ok=True)
  text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
  (run / "metrics.jsonl").write_text(text + end, encoding="utf-8")
  return str(run)


@pytest.mark.parametrize("window", [1, 2, 7, 40, 1000])
def test_smoothing_is_the_mean_of_the_last_values_and_its_error_the_usual_one(window):
  values = 1e4 + np.random.default_rng(0).standard_normal(40)
  parts = [values[max(0, end - window) : end] for end in range(1, 41)]
  np.testing.assert_allclose(plots.smoothed(values, window), [part.mean() for part in parts], rtol=1e-12)
  want = [part.std(ddof=1) / np.sqrt(len(part)) if len(part) > 1 else np.nan for part in parts]
  np.testing.assert_allclose(plots.standard_error(values, window), want, rtol=1e-6)


def test_a_huge_value_is_forgotten_with_its_window():
  values = np.array([2.0, 1e250, *[3.0] * 9])
  assert plots.smoothed(values, 3)[4:].tolist() == [3.0] * 7 and plots.smoothed(values, 3)[0] == 2.0


def test_runs_are_paired_by_step():
  first, second = rows(30, 1), rows(30, 2, first=11)
  first[14]["loss"] = None  # step 15, not finite
  delta = plots.difference(plots.curve(first, "loss"), plots.curve(second, "loss"))
  assert delta.steps.tolist() == [step for step in range(11, 31) if step != 15]
  at = lambda run, step: next(row["loss"] for row in run if row["step"] == step)
  np.testing.assert_array_equal(delta.values, [at(second, step) - at(first, step) for step in delta.steps.tolist()])


def test_a_shift_that_the_noise_of_each_run_hides_is_found_by_the_pairs():
  first = rows(200, 3)
  noise = np.random.default_rng(4).standard_normal(200)
  second = [row | {"loss": row["loss"] - 0.05 + 0.01 * x} for row, x in zip(first, noise, strict=True)]
  found = plots.last_difference(plots.curve(first, "loss"), plots.curve(second, "loss"), 100)
  assert found.step == 200 and found.low < -0.05 < found.high < -0.04
  assert found.mean == pytest.approx(-0.05 + 0.01 * noise[100:].mean())


@pytest.mark.parametrize("value", [None, True, "1.0", 10**400, {"a": 1}], ids=str)
def test_what_is_no_number_is_no_point(value):
  lines = [*rows(3, 5), {"step": 4, "loss": 1.0, "odd": value}, {"step": 5, "loss": 1.0, "odd": 2}]
  assert plots.curve(lines, "odd").steps.tolist() == [5]


@pytest.mark.parametrize("form", plots.FORMATS)
@pytest.mark.parametrize("counts", [(1,), (1, 1), (60, 40), (30, 20, 10)], ids=str)
def test_the_picture_of_runs_is_not_blank(tmp_path, capsys, counts, form):
  names = ["with $x_{", "_b", "ü 三"]
  runs = [write(tmp_path / name, rows(n, n)) for name, n in zip(names, counts, strict=False)]
  picture = tmp_path / "new" / f"losses.{form}"
  assert main(["plot", *runs, f"--output={picture}"]) == 0
  out, err = capsys.readouterr()
  assert str(picture) in out and err == "" and ("second minus first" in out) == (len(counts) == 2)
  if form == "png":
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 50
  assert picture.stat().st_size > 2000 and list(picture.parent.iterdir()) == [picture]


def test_a_run_that_goes_on_and_damaged_lines_are_drawn_as_far_as_they_are_whole(tmp_path, capsys):
  lines = rows(20, 6)
  run = write(tmp_path / "run", [*lines[:10], "{broken", *lines[10:]], end='{"step": 21, "lo')
  assert main(["plot", run, "--metric=loss", f"--output={tmp_path / 'a.png'}"]) == 0
  assert "line 11 is damaged" in capsys.readouterr().err
  assert len(plots.read_run(tmp_path / "run")) == 20


def test_a_metric_that_one_run_lacks_is_drawn_of_the_others(tmp_path, capsys):
  runs = [write(tmp_path / "a", rows(9, 1)), write(tmp_path / "b", rows(9, 2, loss_codes=1.0))]
  assert main(["plot", *runs, f"--output={tmp_path / 'a.png'}"]) == 0
  assert f"loss_codes: {runs[0]} has none" in capsys.readouterr().out


@pytest.mark.parametrize(
  "arguments, named",
  [
    (["RUN", "--output=OUT.gif"], ("--output", "gif", ".png")),
    (["RUN", "--output=OUT"], ("--output", ".png")),
    (["RUN", "RUN", "--output=OUT.png"], ("twice", "RUN")),
    (["NONE", "--output=OUT.png"], ("NONE", "metrics.jsonl")),
    (["EMPTY", "--output=OUT.png"], ("EMPTY", "no step")),
    (["RUN", "--output=OUT.png", "--metric=lose"], ("--metric", "'lose'", "loss_text")),
    (["RUN", "--output=OUT.png", "--metric="], ("--metric", "''")),
    (["RUN", "--output=OUT.png", "--metric=packs"], ("--metric", "'packs'")),
    (["RUN", "--output=OUT.png", "--metric=" + ",".join(["loss"] * 99)], ("--metric", "99")),
    (["RUN", "--output=RUN/metrics.jsonl/x.png"], ("--output",)),
  ],
)
def test_a_mistake_is_one_line_and_draws_nothing(tmp_path, capsys, monkeypatch, arguments, named):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / "RUN", rows(3, 7))
  write(tmp_path / "EMPTY", [])
  assert main(["plot", *arguments]) == 2
  out, err = capsys.readouterr()
  assert out == "" and err.startswith("jflow: ") and err.count("\n") == 1 and all(one in err for one in named), err
  assert not list(tmp_path.glob("OUT*"))


def test_without_matplotlib_the_line_says_how_to_install_it(tmp_path, monkeypatch):
  monkeypatch.setattr("jflow.errors.importlib.util.find_spec", lambda name: None)
  with refused("matplotlib", "[plots]"):
    plots.figure({"a": rows(3, 8)}, ["loss"], 1)
