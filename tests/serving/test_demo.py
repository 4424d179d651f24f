"""The page in a browser without a screen: it answers, paints, says what is wrong, and fetches nothing from
elsewhere."""

import importlib.util
import io
import shutil
import threading
import time
import urllib.request
import zipfile

import numpy as np
import pytest
import serving
import tiny
from PIL import Image

from jflow.__main__ import main

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
browser_only = pytest.mark.skipif(
  not (CHROMIUM and DRIVER and importlib.util.find_spec("gradio") and importlib.util.find_spec("selenium")),
  reason="needs Gradio, Selenium, and Debian's chromium and chromium-driver",
)
FLAGS = (
  "headless",
  "no-sandbox",
  "disable-gpu",
  "disable-quic",
  "no-first-run",
  "disable-background-networking",
  "disable-component-update",
  "disable-sync",
  "window-size=1180,900",
)
MAX_UPLOAD = 1  # MB


@pytest.fixture(scope="module")
def model():
  return tiny.pipeline()


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
  files = tmp_path_factory.mktemp("uploads")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GRADIO_TEMP_DIR", str(files))
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    from jflow.serving import demo

    app = lambda engine: demo.app(engine, "tiny <model>", MAX_UPLOAD, files)
    with serving.serving(model, app) as served:
      yield served


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
  from selenium import webdriver
  from selenium.webdriver.chrome.service import Service

  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  folder = tmp_path_factory.mktemp("browser")
  for flag in (*FLAGS, f"user-data-dir={folder / 'profile'}"):
    options.add_argument(f"--{flag}")
  options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
  options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
  driver = webdriver.Chrome(options=options, service=Service(DRIVER))
  try:
    driver.set_window_size(1180, 900)
    driver.downloads = folder
    yield driver
  finally:
    driver.quit()


@pytest.fixture
def browser(driver, served):
  driver.get(served[0])
  return Page(driver)


class Page:
  """The page as a visitor handles it."""

  def __init__(self, driver):
    self.driver = driver
    self.wait_for("#question textarea")

  def all(self, selector):
    return self.driver.find_elements("css selector", selector)

  def wait_for(self, selector, ready=lambda found: bool(found), seconds=60):
    """The elements, once they are as wanted."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
      try:
        if ready(found := self.all(selector)):
          return found
      except Exception as error:  # an element that the page has just replaced
        if type(error).__name__ != "StaleElementReferenceException":
          raise
      time.sleep(0.1)
    raise AssertionError(f"{selector} never came as wanted: {[x.text for x in self.all(selector)]}")

  def upload(self, path):
    self.all("#question input[type=file]")[0].send_keys(str(path))

  def ask(self, text, image=None):
    if image:
      self.upload(image)
      self.wait_for("#question .thumbnail-item, #question .thumbnails img, #question [class*=thumbnail]")
    field = self.wait_for("#question textarea", lambda found: found and found[0].is_enabled())[0]
    field.send_keys(text)
    self.wait_for("#question .submit-button", lambda found: found and found[0].is_enabled())[0].click()

  def answers(self):
    return [x.text for x in self.all("#chat .bot.message")]

  def tab(self, name):
    self.driver.find_element("xpath", f"//button[@role='tab' and contains(., '{name}')]").click()

  def toast(self):
    return self.wait_for(".toast-body", lambda found: found and found[-1].text)[-1].text


@browser_only
def test_a_conversation_about_a_picture(browser, model, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
  Image.fromarray(pixels).save(tmp_path / "a.png")
  browser.ask("What is it?", tmp_path / "a.png")
  first = model.understand("What is it?", [pixels], max_tokens=256)
  browser.wait_for("#chat .bot.message", lambda found: found and _plain(found[-1].text) == _plain(first))
  browser.wait_for("#chat .user img", lambda found: found and found[0].get_property("naturalWidth") == 24)


def _plain(text: str) -> str:
  """Letters and digits alone: the page shows an answer as Markdown."""
  return "".join(c for c in text if c.isalnum())


@browser_only
def test_a_conversation_fills_the_context_until_a_new_one_begins(browser, model):
  browser.ask("Why?")
  why = model.understand("Why?", max_tokens=256)
  browser.wait_for("#chat .bot.message", lambda found: found and _plain(found[-1].text) == _plain(why))
  browser.ask("a")
  assert "tokens, and the context holds 127: shorten it" in browser.toast()
  browser.all("#fresh")[0].click()
  browser.wait_for("#chat", lambda found: not browser.answers())
  browser.ask("a")
  alone = model.understand("a", max_tokens=256)
  browser.wait_for("#chat .bot.message", lambda found: found and _plain(found[-1].text) == _plain(alone))


@browser_only
def test_stop_frees_the_model_and_keeps_what_was_said(browser, served, monkeypatch):
  _, engine = served
  gate, real = threading.Semaphore(2), serving.decoder(engine).step

  def step(n):
    assert gate.acquire(timeout=30)
    return real(n)

  monkeypatch.setattr(serving.decoder(engine), "step", step)
  browser.ask("Why?")
  browser.wait_for("#chat .bot.message", lambda found: found and len(found[-1].text) > 3)
  browser.wait_for("#question .stop-button", lambda found: found and found[0].is_enabled())[0].click()
  browser.wait_for("#question .submit-button")
  gate.release(9)
  limit = time.monotonic() + 20
  while serving.requests(engine) and time.monotonic() < limit:
    time.sleep(0.05)
  assert not serving.requests(engine) and len(browser.answers()) == 1


@browser_only
def test_a_question_that_failed_stands_in_its_field_alone_and_is_asked_again_once(browser, served, model, monkeypatch):
  _, engine = served

  def fail(n):
    raise RuntimeError("no memory")

  with monkeypatch.context() as patch:
    patch.setattr(serving.decoder(engine), "step", fail)
    browser.ask("Why?")
    assert "the model failed at this request" in browser.toast()
  browser.wait_for("#chat", lambda found: not browser.all("#chat .message"))
  assert browser.all("#question textarea")[0].get_attribute("value") == "Why?"
  browser.wait_for("#question .submit-button", lambda found: found and found[0].is_enabled())[0].click()
  why = model.understand("Why?", max_tokens=256)
  browser.wait_for("#chat .bot.message", lambda found: found and _plain(found[-1].text) == _plain(why))
  assert len(browser.all("#chat .user.message")) == len(browser.answers()) == 1


@browser_only
def test_wrong_files_and_questions_get_a_message(browser, tmp_path):
  (tmp_path / "text.png").write_text("no picture")
  browser.ask("What is it?", tmp_path / "text.png")
  assert "text.png must be a readable PNG" in browser.toast()
  assert browser.answers() == []
  assert browser.all("#question textarea")[0].get_attribute("value") == "What is it?"


@browser_only
def test_a_file_that_is_too_large_is_refused(browser, tmp_path):
  (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(MAX_UPLOAD * 2**20 + 1))
  browser.upload(tmp_path / "large.png")
  assert "size" in browser.toast().lower()


@browser_only
def test_painting_shows_the_pictures_of_the_seed_and_bundles_them(browser, model):
  browser.tab("Paint")
  browser.wait_for("#go", lambda found: found and found[0].is_displayed())
  browser.all("#go button, button#go")[0].click()
  assert "prompt is empty" in browser.toast()
  _fill(browser, "#count input[type=number]", 2)
  _fill(browser, "#steps input[type=number]", 4)
  _fill(browser, "#seed input", 7)
  dice = browser.all("#dice input")[0]
  if dice.is_selected():
    dice.click()
  browser.all("#prompt textarea")[0].send_keys("a red ring")
  browser.all("#go button, button#go")[0].click()
  browser.wait_for("#note", lambda found: "4 evaluations" in found[0].text)
  images = browser.wait_for("#gallery .grid-container img", lambda found: len(found) == 2)
  want = model.generate("a red ring", 4, seed=7, num_images=2)
  for image, picture in zip(images, want):
    got = np.asarray(Image.open(io.BytesIO(_get(browser.driver, image.get_attribute("src")))))
    assert np.abs(got.astype(int) - np.asarray(picture)).max() <= 1
  browser.wait_for("#bundle", lambda found: found and found[0].is_enabled())[0].click()
  file = browser.driver.downloads / "a_red_ring.zip"
  limit = time.monotonic() + 30
  while not (file.exists() and zipfile.is_zipfile(file)) and time.monotonic() < limit:
    time.sleep(0.1)
  names = zipfile.ZipFile(file).namelist()
  assert names == ["a_red_ring_seed7.png", "a_red_ring_seed8.png"]


def _fill(page, selector, value):
  field = page.all(selector)[0]
  field.clear()
  field.send_keys(str(value) + "\t")


def _get(driver, url):
  """The page that the browser gets there, which shows its cookies."""
  cookies = "; ".join(f"{x['name']}={x['value']}" for x in driver.get_cookies())
  with urllib.request.urlopen(urllib.request.Request(url, headers={"Cookie": cookies})) as response:
    return response.read()


@browser_only
def test_nothing_comes_from_elsewhere(browser, served):
  address, _ = served
  names = "return performance.getEntriesByType('resource').map(x => x.name)"
  asked = browser.driver.execute_script(names)
  assert asked and not [name for name in asked if not name.startswith((address, "data:", "blob:"))]
  blocked = [x["message"] for x in browser.driver.get_log("browser") if "Content Security Policy" in x["message"]]
  assert blocked == [], "the page asks for what its policy forbids"
  with urllib.request.urlopen(address) as response:
    page, policy = response.read().decode(), response.headers["content-security-policy"]
  assert "tiny &lt;model&gt;" in page or "tiny <model>" not in page
  assert policy.startswith("default-src 'self'") and "http" not in policy


@pytest.mark.parametrize("command, module, extra", [("demo", "gradio", "demo"), ("serve", "uvicorn", "serve")])
def test_without_an_extra_one_line_says_how_to_install_it(capsys, monkeypatch, command, module, extra):
  monkeypatch.setitem(__import__("sys").modules, module, None)
  assert main([command, "--checkpoint=nowhere", "--port=0"]) == 2
  error = capsys.readouterr().err
  assert module in error and f"[{extra}]'" in error and error.count("\n") == 1
