"""The page of `demo`: chat about pictures, and image generation. Needs nothing from the network."""

import dataclasses
import html
import io
import pathlib
import re
import secrets
import time
import zipfile
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import fastapi
import gradio as gr
from starlette.types import ASGIApp

from jflow.errors import UserError
from jflow.inference.decoding import Request, Text
from jflow.serving import prepare, schemas, theme
from jflow.serving.engine import Engine
from jflow.serving.front import Front
from jflow.serving.schemas import IMAGE_MARK, MAX_PICTURES, SEEDS, ApiError
from jflow.serving.visitors import MAX_FILES, MAX_SESSIONS, File, Left, Session, Talk, Visitors

_RAW = {"api_visibility": "private", "preprocess": False}  # Gradio receives no values, see `front`


def app(engine: Engine, name: str, max_upload: int, files: pathlib.Path) -> ASGIApp:
  """The page as an ASGI application.

  Args:
    name: of the model.
    max_upload: largest picture to upload, in MB.
    files: where pictures are kept while they are shown; must be GRADIO_TEMP_DIR of the environment.
  """
  outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  visitors = Visitors(files, max_upload * 2**20)
  preparing = prepare.Preparing(engine.pipelines, engine.context, engine.timeout)
  blocks = page(Work(engine, name, visitors, preparing))
  blocks.state_session_capacity = MAX_SESSIONS
  blocks.max_threads = (
    2 * MAX_SESSIONS
  )  # events that run; a session has one of each kind, and it may wait for its client
  blocks.queue(max_size=engine.queue, default_concurrency_limit=None, api_open=False)
  gr.mount_gradio_app(
    outer,
    blocks,
    path="/",
    max_file_size=f"{max_upload}mb",
    footer_links=[],
    run_history=False,
    ssr_mode=False,
    theme=theme.theme(),
    css=theme.STYLE,
    pwa=False,
    mcp_server=False,
  )
  events = {
    x["id"]: (len(x["inputs"]), x["queue"] is not False) for x in blocks.config["dependencies"] if x["backend_fn"]
  }
  return Front(outer, visitors, events, engine.timeout, closing=lambda: engine.state in ("draining", "failed"))


class Work(NamedTuple):
  """The state that the page's functions share."""

  engine: Engine
  name: str  # of the model
  visitors: Visitors
  preparing: prepare.Preparing


def page(work: Work) -> gr.Blocks:
  """The page."""
  size = work.engine.pipeline.model.config.image_size
  with gr.Blocks(title=f"jflow: {work.name}", analytics_enabled=False, fill_width=True) as blocks:
    gr.HTML(
      f"<header><h1>jflow</h1><p>One model that reads pictures and paints them. <b>{html.escape(work.name)}</b>, "
      f"{size} × {size} pixels</p></header>",
      elem_id="head",
    )
    with gr.Tabs(elem_id="tabs"):
      with gr.Tab("Ask", id="ask"):
        _ask_tab(work)
      with gr.Tab("Paint", id="paint", visible=work.engine.pipeline.can_generate):
        _paint_tab(work)
    blocks.unload(lambda: None)  # makes the page keep a connection open, which shows how long it is open
  return blocks


def _ask_tab(work: Work) -> None:
  engine, visitors = work.engine, work.visitors
  shown = gr.Chatbot(
    elem_id="chat",
    show_label=False,
    height="max(300px, calc(100vh - 330px))",
    buttons=["copy"],
    layout="bubble",
    placeholder="<center><h3>Show it a picture</h3>Drop one into the field below, and ask.</center>",
  )
  field = gr.MultimodalTextbox(
    elem_id="question",
    show_label=False,
    file_types=["image"],
    file_count="multiple",
    sources=["upload"],
    placeholder="A question; add pictures with the clip, or drop them here",
    autofocus=True,
  )
  with gr.Row(elem_id="below"):
    with gr.Accordion("Settings", open=False), gr.Row():
      temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature", info="0 takes the most likely word")
      top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="mass of the words to choose from")
      longest = gr.Slider(1, 1024, 256, step=1, label="Longest answer", info="in tokens")
    fresh = gr.Button("New conversation", scale=0, min_width=190, size="md", elem_id="fresh")

  idle = lambda **value: gr.MultimodalTextbox(submit_btn=True, stop_btn=False, **value)
  busy = lambda **value: gr.MultimodalTextbox(submit_btn=False, stop_btn=True, **value)

  async def answer(request: gr.Request, *_: None) -> AsyncIterator[tuple]:
    """Streams the answer to a question; after a mistake, the question stays in its field."""
    session, (question, *settings) = request.state.asked
    before, again, said = session.talk, {}, ""
    talk, pictures = before.copy(), []
    try:
      text, pictures = _question(question, visitors, session.owner)
      again = {"value": {"text": text, "files": [x.path for x in pictures]}}
      wanted = _wanted(text, settings, work.name)
      with session.working("an answer"):
        await session.listened()
        mark = IMAGE_MARK * len(pictures) + ("\n" if pictures else "")
        talk.turns.append({"role": "user", "content": mark + text})
        task = await session.while_here(_prepared(wanted, talk, pictures, work))
        talk.images = list(task.images)
        with engine.submit(task) as job:
          talk.turns.append({"role": "assistant", "content": "…"})  # shown if the answer is stopped
          talk.shown += [{"role": "user", "content": {"path": x.path}} for x in pictures]
          talk.shown += [{"role": "user", "content": text}, {"role": "assistant", "content": "…"}]
          talk.hold(pictures)
          session.talk = talk
          yield busy(value=None), talk.shown
          out, finished = Text(engine.pipeline.tokenizer), None
          while not finished:
            event = await session.while_here(job.next())
            finished = event.finished
            said += out.add(event.ids, last=bool(finished))
            talk.turns[-1]["content"] = talk.shown[-1]["content"] = said or "…"
            yield busy(), talk.shown
    except Left:
      return
    except (UserError, ApiError) as error:
      gr.Warning(html.escape(str(error)), title="Not answered")
      if not said and session.talk is talk:  # so that a repeated question is not shown twice
        session.talk = before
        for file in pictures:
          file.held = False
      yield (idle() if said else idle(**again)), session.talk.shown
      return
    yield idle(), talk.shown

  def forget(request: gr.Request, *_: None) -> tuple:
    """Starts a new conversation."""
    session = request.state.asked.session
    visitors.drop(session.talk.files)
    session.talk = Talk()
    return [], idle(value=None)

  asked = field.submit(answer, [field, temperature, top_p, longest], [field, shown], show_progress="hidden", **_RAW)
  field.stop(idle, None, field, cancels=[asked], queue=False, **_RAW)
  for again in (fresh.click, shown.clear):
    again(forget, None, [shown, field], cancels=[asked], queue=False, **_RAW)


def _paint_tab(work: Work) -> None:
  engine, visitors = work.engine, work.visitors
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
      controls = [gr.Slider(1, MAX_PICTURES, 4, step=1, label="Pictures", elem_id="count", render=False)]
      usual = work.engine.pipeline.settings()
      controls += [_control(field, getattr(usual, field.name)) for field in on_page(work)]
      for two in (controls[at : at + 2] for at in range(0, len(controls), 2)):
        with gr.Row():
          for control in two:
            control.render()
      with gr.Row(elem_id="seeds"):
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEEDS - MAX_PICTURES, elem_id="seed")
        dice = gr.Checkbox(True, label="New for each painting", elem_id="dice")
    with gr.Column(scale=3, min_width=320):
      gallery = gr.Gallery(
        label="Pictures",
        show_label=False,
        columns=3,
        height="auto",
        object_fit="contain",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_id="gallery",
      )
      with gr.Row(elem_id="below_gallery"):
        note = gr.Markdown("", elem_id="note")
        bundle = gr.DownloadButton("Download all", interactive=False, size="sm", elem_id="bundle", scale=0)

  async def paint(request: gr.Request, *_: None) -> AsyncIterator[tuple]:
    """Generates images and shows each when it is done."""
    session, values = request.state.asked
    done: list[tuple[str, str]] = []
    seed = gr.skip()
    still = lambda note: (list(done), note, seed, gr.DownloadButton(interactive=False))
    try:
      wanted = images_asked(values, work)
      with session.working("a painting"):
        await session.listened()
        _, task = await session.while_here(work.preparing.pictures(lambda: wanted))
        visitors.drop(session.painted)
        files = session.painted = list[File]()
        stem, seed, started = _file_name(task.prompt), task.seed, time.monotonic()
        with engine.submit(task) as job:
          yield still(f"Painting {task.count} …")
          while len(done) < task.count:
            picture = await session.while_here(job.next())
            data = await work.preparing.run(picture.png)
            name = f"{stem}_seed{seed + picture.index}.png"
            files.append(await _kept(visitors, session, name, "image/png", data))
            done.append((files[-1].path, f"seed {seed + picture.index}"))
            yield still(f"{len(done)} of {task.count} …")
        data = await work.preparing.run(lambda: _zip(files))
        files.append(await _kept(visitors, session, f"{stem}.zip", "application/zip", data))
    except Left:
      return
    except (UserError, ApiError) as error:
      gr.Warning(html.escape(str(error)), title="Not painted")
      yield still("")
      return
    seconds, count = time.monotonic() - started, engine.pipeline.sampler.evaluations(task.settings)
    each = f"{count} evaluations of the model each"
    button = gr.DownloadButton(value=files[-1].path, interactive=True)
    yield done, f"{task.count} in {seconds:.1f} s, {each}", seed, button

  settings = [prompt, *controls, seed, dice]
  painted = gr.on(
    [go.click, prompt.submit],
    paint,
    settings,
    [gallery, note, seed, bundle],
    show_progress="minimal",
    show_progress_on=[gallery],
    **_RAW,
  )
  stop.click(lambda *_: "Stopped.", None, note, cancels=[painted], queue=False, **_RAW)


def _question(value: Any, visitors: Visitors, owner: str | None) -> tuple[str, list[File]]:
  """The text of a question and its images, each a file uploaded by this visitor.

  Raises:
    ApiError: the value has another form, or a file is not this visitor's.
  """
  text, files = (value.get("text"), value.get("files")) if isinstance(value, dict) else (value, [])
  text, files = "" if text is None else text, [] if files is None else files
  if not isinstance(text, str) or not isinstance(files, list) or len(files) > MAX_FILES:
    raise ApiError(400, f"a question must be a text with at most {MAX_FILES} pictures")
  known = [visitors.file(x.get("path") if isinstance(x, dict) else x, owner) for x in files]
  if None in known:
    raise ApiError(400, f"picture {known.index(None) + 1} must be one that you uploaded here: add it again")
  return text, known


def _wanted(text: str, settings: list[Any], name: str) -> schemas.Chat:
  """A conversation of one question, with the checks of the HTTP interface."""
  fields = dict(zip(("temperature", "top_p", "max_tokens"), settings))
  _check_given(fields)
  return schemas.parse_chat({"messages": [{"role": "user", "content": text}], "stream": True} | fields, name)


def on_page(work: Work) -> list[dataclasses.Field]:
  """The sampling settings that the page offers."""
  return [field for field in work.engine.pipeline.family.served if "page" in field.metadata]


def _control(field: dataclasses.Field, value: Any) -> gr.Slider | gr.Dropdown:
  """The control of a sampling setting, not yet placed; a slider reaches as far as its first `value`."""
  place = {"value": value, "label": field.name.capitalize(), "elem_id": field.name, "render": False}
  if "choices" in field.metadata:
    return gr.Dropdown(list(field.metadata["choices"]), **place)
  least, most, step = field.metadata["page"]
  return gr.Slider(min(least, value), max(most, value), step=step, **place)


def images_asked(values: list[Any], work: Work) -> schemas.Images:
  """A request for images, with the checks of the HTTP interface; the seed is drawn where a new one is requested."""
  fields = dict(zip(("prompt", "n", *(field.name for field in on_page(work)), "seed", "dice"), values))
  if fields["dice"] is True:
    fields["seed"] = secrets.randbelow(10**6)
  elif fields["dice"] is not False:
    raise ApiError(400, "dice must be true or false", "dice")
  _check_given(fields)
  del fields["dice"]
  return schemas.ImageRequests.of(work.engine.pipelines, work.name).parse(fields)


def _check_given(fields: dict[str, Any]) -> None:
  """Raises ApiError for an empty setting: a default in its place would differ from the page."""
  for name, value in fields.items():
    if value is None:
      raise ApiError(400, f"{name} is empty", name)


async def _prepared(wanted: schemas.Chat, talk: Talk, pictures: list[File], work: Work) -> Request:
  """A conversation ready for the engine: `wanted` after the turns of `talk`, with further images.

  Raises:
    UserError: see `prepare.chat`; an unreadable image is named by its file's name at the visitor.
  """

  def whole() -> schemas.Chat:
    try:
      new = [pathlib.Path(x.path).read_bytes() for x in pictures]
    except FileNotFoundError:
      raise UserError("a picture of this question was deleted: add it again") from None
    return wanted._replace(turns=talk.turns, images=[*talk.images, *new], image_fields=[])

  try:
    return (await work.preparing.chat(whole))[1]
  except prepare.UnreadableImage as error:
    name = pictures[error.index - len(talk.images)].name
    raise UserError(f"{name} must be a readable PNG, JPEG or WebP picture") from None


async def _kept(visitors: Visitors, session: Session, name: str, kind: str, data: bytes) -> File:
  """Stores a file that the gallery shows."""
  file = await visitors.keep(session.owner, name, kind, data)
  file.held = True
  return file


def _zip(files: list[File]) -> bytes:
  """A zip archive of images, stored without compression since they are compressed already."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    for file in files:
      archive.write(file.path, file.name)
  return out.getvalue()


def _file_name(prompt: str) -> str:
  """A file name from the beginning of a prompt."""
  return re.sub(r"[^A-Za-z0-9]+", "_", prompt)[:40].strip("_") or "picture"
