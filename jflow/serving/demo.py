"""The page of `demo`: chat about pictures, and paint. Needs nothing from the network."""

import pathlib
import re
import secrets
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator

import fastapi
import gradio as gr
import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jflow.errors import UserError
from jflow.flow import SOLVERS
from jflow.inference.decoding import Text
from jflow.inference.pipeline import prepare_image
from jflow.serving import prepare
from jflow.serving.engine import Engine
from jflow.serving.jobs import Pictures
from jflow.serving.schemas import IMAGE_MARK, MAX_PICTURES, SEEDS, ApiError, Chat, Settings

_FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"]
_STYLE = """
.gradio-container { max-width: 1080px !important; width: 100% !important; margin: 0 auto !important; }
.gradio-container > main { padding: 16px 24px !important; }
#gallery { min-height: 330px; }
#tabs { width: 100%; }
#head { border: 0; background: none; padding: 0; }
#head header { display: flex; align-items: baseline; gap: 16px; }
#head h1 { font-size: 26px; font-weight: 700; letter-spacing: -0.02em; margin: 0; color: #4f46e5; }
#head p { margin: 0; color: #64748b; font-size: 14px; }
#head b { color: #334155; font-weight: 600; }
#below { align-items: flex-start; }
#seeds { align-items: center; }
#below_gallery { align-items: center; }
#note p { color: #64748b; font-size: 13px; margin: 0; }
#go, #stop { font-weight: 600; font-size: 15px; }
#fresh { font-weight: 500; font-size: 14px; white-space: nowrap; }
#chat img { max-height: 190px; width: auto; border-radius: 8px; }
#chat button[aria-label="Share"], #chat button[title="Share"] { display: none; }
#gallery .caption-label { font-size: 12px; }
"""
# The browser itself refuses what the page would fetch from elsewhere.
_POLICY = (
  "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
  "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self' data: blob:"
)


class Talk:
  """The conversation of one visitor, kept on the server."""

  def __init__(self) -> None:
    self.turns: list[dict[str, str]] = []
    self.images: list[np.ndarray] = []  # uint8[H, W, 3]


def app(engine: Engine, name: str, max_upload: int, files: pathlib.Path) -> ASGIApp:
  """The page as an ASGI application.

  Args:
    name: of the model.
    max_upload: largest picture to upload, in MB.
    files: where pictures are kept while they are shown; must be GRADIO_TEMP_DIR of the environment.
  """
  outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  blocks = page(engine, name, files).queue(
    max_size=engine.queue, default_concurrency_limit=engine.queue, api_open=False
  )
  gr.mount_gradio_app(
    outer, blocks, path="/", max_file_size=f"{max_upload}mb", footer_links=[], run_history=False, ssr_mode=False,
    theme=_theme(), css=_STYLE, pwa=False, mcp_server=False,
  )  # fmt: skip
  return Confined(outer)


def _theme() -> gr.themes.Base:
  return gr.themes.Base(
    primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=_FONT, font_mono=_MONO
  ).set(
    body_background_fill="#f7f7fb", block_border_width="1px", block_shadow="none", block_label_text_size="12px",
    button_primary_background_fill="#4f46e5", button_primary_background_fill_hover="#4338ca",
    button_primary_text_color="white", button_secondary_background_fill="white",
    button_secondary_border_color="#cbd5e1", button_border_width="1px",
  )  # fmt: skip


def page(engine: Engine, name: str, files: pathlib.Path) -> gr.Blocks:
  """The page."""
  size = engine.pipeline.model.config.image_size
  with gr.Blocks(
    title=f"jflow: {name}", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
  ) as blocks:
    gr.HTML(
      f'<header><h1>jflow</h1><p>One model that reads pictures and paints them. <b>{_escaped(name)}</b>, '
      f"{size} × {size} pixels</p></header>", elem_id="head",
    )  # fmt: skip
    with gr.Tabs(elem_id="tabs"):
      with gr.Tab("Ask", id="ask"):
        _ask_tab(engine)
      with gr.Tab("Paint", id="paint", visible=engine.pipeline.can_paint):
        _paint_tab(engine, files)
  return blocks


def _ask_tab(engine: Engine) -> None:
  talk = gr.State(Talk, time_to_live=3600)
  shown = gr.Chatbot(
    elem_id="chat", show_label=False, height="max(300px, calc(100vh - 330px))", buttons=["copy"], layout="bubble",
    placeholder="<center><h3>Show it a picture</h3>Drop one into the field below, and ask.</center>",
  )  # fmt: skip
  field = gr.MultimodalTextbox(
    elem_id="question", show_label=False, file_types=["image"], file_count="multiple", sources=["upload"],
    placeholder="A question; add pictures with the clip, or drop them here", autofocus=True,
  )  # fmt: skip
  with gr.Row(elem_id="below"):
    with gr.Accordion("Settings", open=False):
      with gr.Row():
        temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the most likely word")
        top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="mass of the words to choose from")
        longest = gr.Slider(1, 1024, 256, step=1, label="Longest answer", info="in tokens")
    fresh = gr.Button("New conversation", scale=0, min_width=190, size="md", elem_id="fresh")

  idle = lambda **value: gr.MultimodalTextbox(submit_btn=True, stop_btn=False, **value)
  busy = lambda **value: gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **value)

  async def answer(
    question: dict, history: list, talk: Talk, temperature: float, top_p: float, longest: int
  ) -> AsyncIterator[tuple]:
    """Streams the answer to a question; after a mistake, the question stays in its field."""
    said, before = "", (list(talk.turns), list(talk.images), history)
    try:
      new = [_picture(path, engine) for path in question["files"]]
      mark = IMAGE_MARK * len(new) + ("\n" if new else "")
      turn = {"role": "user", "content": mark + question["text"].replace(IMAGE_MARK, "")}
      wanted = Chat(
        [*talk.turns, turn], [*talk.images, *new], "", int(longest), temperature, top_p, None, True, False
      )
      _, work = prepare.chat(engine.pipeline, wanted, engine.context)
      with engine.submit(work) as job:
        talk.images += new
        talk.turns += [turn, {"role": "assistant", "content": "…"}]  # what stands here if it is stopped
        history = history + [{"role": "user", "content": {"path": path}} for path in question["files"]]
        history += [{"role": "user", "content": question["text"]}, {"role": "assistant", "content": "…"}]
        yield busy(value=None), history, talk
        text, finished = Text(engine.pipeline.tokenizer), None
        while not finished:
          event = await job.next()
          finished = event.finished
          said += text.add(event.ids, last=bool(finished))
          talk.turns[-1]["content"] = history[-1]["content"] = said or "…"
          yield busy(), history, talk
    except (UserError, ApiError) as error:
      gr.Warning(_escaped(str(error)), title="Not answered")
      if not said:  # the question goes back into its field: asked again, it should not stand there twice
        talk.turns, talk.images, history = before
      yield idle() if said else idle(value=question), history, talk
      return
    yield idle(), history, talk

  asked = field.submit(
    answer, [field, shown, talk, temperature, top_p, longest], [field, shown, talk], show_progress="hidden",
    api_visibility="private",
  )  # fmt: skip
  field.stop(idle, None, field, cancels=[asked], api_visibility="private", queue=False)
  for forget in (fresh.click, shown.clear):
    forget(
      lambda: ([], Talk(), idle(value=None)), None, [shown, talk, field], cancels=[asked], api_visibility="private",
      queue=False,
    )  # fmt: skip


def _paint_tab(engine: Engine, files: pathlib.Path) -> None:
  with gr.Row(equal_height=False):
    with gr.Column(scale=2, min_width=300):
      prompt = gr.Textbox(
        label="Prompt",
        lines=3,
        max_lines=6,
        placeholder="a picture of a red ring",
        elem_id="prompt",
        autofocus=True,
      )
      with gr.Row():
        go = gr.Button("Paint", variant="primary", elem_id="go", scale=2)
        stop = gr.Button("Stop", elem_id="stop", scale=1)
      with gr.Row():
        count = gr.Slider(1, MAX_PICTURES, 4, step=1, label="Pictures", elem_id="count")
        steps = gr.Slider(1, 100, 30, step=1, label="Steps", elem_id="steps")
      with gr.Row():
        guidance = gr.Slider(1, 10, 2, step=0.5, label="Guidance", elem_id="guidance")
        solver = gr.Dropdown(list(SOLVERS), value="euler", label="Solver", elem_id="solver")
      with gr.Row(elem_id="seeds"):
        seed = gr.Number(
          0, label="Seed", precision=0, minimum=0, maximum=SEEDS - MAX_PICTURES, elem_id="seed"
        )
        dice = gr.Checkbox(True, label="New for each painting", elem_id="dice")
    with gr.Column(scale=3, min_width=320):
      gallery = gr.Gallery(
        label="Pictures", show_label=False, columns=3, height="auto", object_fit="contain",
        interactive=False, buttons=["download", "fullscreen"], elem_id="gallery",
      )  # fmt: skip
      with gr.Row(elem_id="below_gallery"):
        note = gr.Markdown("", elem_id="note")
        bundle = gr.DownloadButton("Download all", interactive=False, size="sm", elem_id="bundle", scale=0)

  async def paint(
    prompt: str, count: int, steps: int, guidance: float, solver: str, seed: float | None, dice: bool
  ) -> AsyncIterator[tuple]:
    """Shows the pictures as they are done."""
    seed = secrets.randbelow(10**6) if dice else int(seed or 0)
    done: list[tuple[str, str]] = []
    still = lambda note: (list(done), note, seed, gr.DownloadButton(interactive=False))
    try:
      engine.pipeline.painting_prompt(prompt)
      work = Pictures(prompt, int(count), seed, Settings(int(steps), float(guidance), solver, 1.0))
      folder, started = pathlib.Path(tempfile.mkdtemp(dir=files)), time.monotonic()
      with engine.submit(work) as job:
        yield still(f"Painting {work.count} …")
        while len(done) < work.count:
          picture = await job.next()
          path = folder / f"{_file_name(prompt)}_seed{seed + picture.index}.png"
          picture.image.save(path)
          done.append((str(path), f"seed {seed + picture.index}"))
          yield still(f"{len(done)} of {work.count} …")
    except (UserError, ApiError) as error:
      gr.Warning(_escaped(str(error)), title="Not painted")
      yield still("")
      return
    archive = folder / f"{_file_name(prompt)}.zip"
    with zipfile.ZipFile(archive, "w") as out:
      for path, _ in done:
        out.write(path, pathlib.Path(path).name)
    seconds = time.monotonic() - started
    note = f"{work.count} in {seconds:.1f} s, {SOLVERS[solver][1] * work.settings.steps} evaluations of the velocity each"
    yield done, note, seed, gr.DownloadButton(value=str(archive), interactive=True)

  settings = [prompt, count, steps, guidance, solver, seed, dice]
  painted = gr.on(
    [go.click, prompt.submit], paint, settings, [gallery, note, seed, bundle], api_visibility="private",
    show_progress="minimal", show_progress_on=[gallery],
  )  # fmt: skip
  stop.click(lambda: "Stopped.", None, note, cancels=[painted], api_visibility="private", queue=False)


class Confined:
  """Adds the policy that keeps the browser from fetching anything from elsewhere."""

  def __init__(self, inner: ASGIApp):
    self._inner = inner

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def confined(message: Message) -> None:
      if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
      await send(message)

    await self._inner(scope, receive, confined)


def _picture(path: str, engine: Engine) -> np.ndarray:
  """An uploaded file, ready to read; a mistake names the file as the visitor knows it."""
  try:
    return prepare_image(pathlib.Path(path).read_bytes(), engine.pipeline.model.config.image_size)
  except UserError:
    raise UserError(f"{pathlib.Path(path).name} is not a readable PNG, JPEG or WebP picture") from None


def _file_name(prompt: str) -> str:
  """The beginning of a prompt as the name of a file."""
  return re.sub(r"[^A-Za-z0-9]+", "_", prompt)[:40].strip("_") or "picture"


def _escaped(text: str) -> str:
  return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
