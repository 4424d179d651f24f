"""Takes the picture of the page in jflow/serving/README.md: a conversation about a picture, and pictures from a prompt.

  python -m jflow demo --checkpoint=world --port=7861 &
  python tests/tools/screenshot.py http://127.0.0.1:7861 launch/experiments/pictures/demo.png

Needs Selenium, and Debian's chromium and chromium-driver.
"""

import io
import pathlib
import random
import sys
import tempfile
import time

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

sys.path[:0] = [str(pathlib.Path(__file__).parents[2])]
from jflow.world import scenes

FLAGS = ("headless", "no-sandbox", "disable-gpu", "window-size=1000,1000")
PROMPT = "a picture of a red heart left of a yellow star"


def main(address: str, output: str) -> None:
  options = webdriver.ChromeOptions()
  options.binary_location = "/usr/bin/chromium"
  for flag in FLAGS:
    options.add_argument(f"--{flag}")
  page = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
  one = lambda selector: page.find_elements("css selector", selector)[0]
  shot = lambda: Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")
  wait = lambda ready: WebDriverWait(page, 120, ignored_exceptions=[IndexError, WebDriverException]).until(
    lambda _: ready()
  )
  try:
    page.get(address)
    wait(lambda: one("#question textarea").is_displayed())
    scene, (first, second) = _two_objects()
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / "picture.png"
      Image.fromarray(scene.render(96)).resize((192, 192)).save(path)
      one("#question input[type=file]").send_keys(str(path))
      wait(lambda: page.find_elements("css selector", "#question .thumbnail-item"))
      for number, shape in enumerate((first, second), 1):
        one("#question textarea").send_keys(f"What color is the {shape}?")
        one("#question .submit-button").click()
        wait(lambda number=number: len(page.find_elements("css selector", "#chat .bot.message")) == number)
        time.sleep(2)
      ask = shot()
    page.find_element("xpath", "//button[@role='tab' and contains(., 'Paint')]").click()
    wait(lambda: one("#go").is_displayed())
    one("#count input[type=number]").clear()
    one("#count input[type=number]").send_keys("6\t")
    one("#prompt textarea").send_keys(PROMPT)
    page.find_elements("css selector", "#go button, button#go")[0].click()
    wait(lambda: len(page.find_elements("css selector", "#gallery .grid-container img")) == 6)
    time.sleep(2)
    paint = shot()
  finally:
    page.quit()
  both = Image.new("RGB", (ask.width + paint.width + 12, ask.height), "#cbd5e1")
  both.paste(ask, (0, 0))
  both.paste(paint, (ask.width + 12, 0))
  both.save(output, optimize=True)


def _two_objects() -> tuple[scenes.Scene, tuple[str, str]]:
  """A scene of two objects of different shapes and colors, and the shapes."""
  for number in range(1000):
    scene, _ = scenes.sample("color_attr", "val", random.Random(f"page/{number}"))
    shapes, colors = zip(*((thing.shape, thing.color) for thing in scene.objects))
    if len(set(shapes)) == len(set(colors)) == 2:
      return scene, shapes
  raise AssertionError("no such scene")


if __name__ == "__main__":
  main(*sys.argv[1:])
