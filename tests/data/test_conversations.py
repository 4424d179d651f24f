"""Claims of a record about itself: pictures or not, other media, who speaks, where a conversation ends."""

import json

import pytest
from preparing import image, make_folder, read_back, run, write_lines, write_tar
from tokens import TOKENIZER, show

from jflow.data import examples

SOUND = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}


def human(text):
  return {"from": "human", "value": text}


def gpt(text):
  return {"from": "gpt", "value": text}


def talk(*turns, **more):
  return {"conversations": list(turns), **more}


def _import(folder, records, task="text", format="llava-jsonl", name="a.jsonl", **options):
  """Imports records behind a sound one; returns the summary and the records, without the sound one."""
  sound = SOUND if task == "text" else {"image": "pictures/1.png", "caption": "Fine."}
  write_lines(folder / name, [*records, sound])
  summary, output = run(folder, task, name, format, max_rejected_share=1.0, **options)
  found = read_back(output, task)
  assert found.pop().turns or task != "text"
  return summary, found


@pytest.fixture
def folder(tmp_path):
  return make_folder(tmp_path / "in")


def _counts(summary):
  return {**summary["rejected"], **summary["filtered"]}


MARKS = ("<image>", "<image_placeholder>", "<video>", "<audio>")


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("where", ["question", "answer", "document", "pair"])
def test_a_mark_is_text_where_the_record_has_no_image(folder, mark, where):
  said = f"An {mark} element."
  record = {
    "question": talk(human(said), gpt("Yes.")),
    "answer": talk(human("Which?"), gpt(said)),
    "document": {"text": said},
    "pair": {"question": said, "answer": said},
  }[where]
  for format in ("llava-jsonl", "text"):
    summary, (found,) = _import(folder, [record], format=format, output=str(folder.parent / format))
    assert not _counts(summary) and summary["notes"] == ({"mark_as_text": 1} if mark == "<image>" else {})
    for template in ("plain", "chat"):
      sample = examples.build(found, "text", TOKENIZER, template, 3)
      assert said in show(sample.tokens) and not sample.image_starts
  summary, _ = _import(folder, [record], "understanding", output=str(folder.parent / "understanding"))
  assert _counts(summary) == {"text_only": 1}


def test_with_images_the_marks_still_have_to_match(folder):
  record = {"image": "pictures/1.png"}
  records = [
    talk(human("<image> or <image>?"), gpt("Yes."), **record),
    talk(human("Which?"), gpt("Yes."), **record),
    talk(human("<image>"), gpt("An <image>."), **record),
    {"text": "<image> or <image>", **record},
  ]
  summary, found = _import(folder, records, "understanding")
  assert _counts(summary) == {"image_marks": 4} and not found


@pytest.mark.parametrize(
  "records, tasks",
  [
    ([talk(*SOUND["conversations"], image=empty) for empty in ("", [], None, [""], [None])], ("text_only", "")),
    ([talk(*SOUND["conversations"], images=empty) for empty in ("", [], None, [""], [None])], ("text_only", "")),
    (
      [talk(*SOUND["conversations"], image=odd) for odd in (0, True, 1.5, {}, {"a": 1}, [1], ["x", ""])],
      ("bad_field", "bad_field"),
    ),
    (
      [talk(human("<image>"), gpt("x"), **{key: "pictures/1.png"}) for key in ("img", "Image", "image_path", "file")],
      ("missing_image", "with_images"),
    ),
    (
      [
        {"messages": [{"role": "user", "content": [{"type": kind}]}, {"role": "assistant", "content": "x"}]}
        for kind in ("image", "image_url", "IMAGE")
      ],
      ("image_count", "with_images"),
    ),
    ([{"texts": [None, "A paragraph."]}], ("image_count", "with_images")),
  ],
)
def test_what_an_image_key_holds_is_told_the_same_for_every_task(folder, records, tasks):
  for task, reason in zip(("understanding", "text"), tasks):
    summary, found = _import(folder, records, task, output=str(folder.parent / task))
    assert _counts(summary) == ({reason: len(records)} if reason else {})
    assert len(found) == (0 if reason else len(records))


def test_the_first_image_key_that_holds_one_counts(folder):
  lines = [
    {"image": "", "images": ["pictures/2.png"], "caption": "c"},
    {"image": ["pictures/3.png", None], "text": "t"},
  ]
  _, found = _import(folder, lines, "understanding")
  assert [record.images for record in found] == [(image(2),), (image(3),)]


MEDIA = [
  ("with_video", {"video": "a.mp4"}),
  ("with_video", {"videos": ["a.mp4"]}),
  ("with_video", {"Video": {"path": "a"}}),
  ("with_audio", {"audio": "a.wav"}),
  ("with_audio", {"audios": [{"bytes": "x"}]}),
  ("with_audio", {"sound": "a.wav"}),
  ("with_point_cloud", {"point_cloud": "a.ply"}),
  ("with_pdf", {"pdf": "a.pdf"}),
]


@pytest.mark.parametrize("task", ["text", "understanding", "generation"])
@pytest.mark.parametrize("format", ["llava-jsonl", "text"])
def test_records_of_other_media_are_dropped_under_their_name(folder, task, format):
  if format == "text" and task != "text":
    return
  if task == "text":
    base = [talk(human("<video>\nWhat?"), gpt("A cat.")), {"text": "A cat."}]
  else:
    base = [{"image": "pictures/1.png", "caption": "A cat."}]
  records = [{**record, **medium} for _, medium in MEDIA for record in base]
  records += [talk(human("What?"), gpt("A cat."), clip_file="a.MP4")]
  summary, found = _import(folder, records, task, format)
  reasons = [reason for reason, _ in MEDIA for _ in base] + ["with_video"]
  assert not found and not summary["rejected"]
  assert summary["filtered"] == {reason: reasons.count(reason) for reason in reasons}


REFERENCES = [
  ("with_video", {"video_url": "https://youtu.be/abc"}),
  ("with_video", {"video_id": "v_abc"}),
  ("with_video", {"media": [{"type": "video", "path": "a.mp4"}]}),
  ("with_video", {"url": "http://x/a.webm?t=3#s"}),
  ("with_audio", {"audio_urls": ["http://x/a"]}),
  ("with_audio", {"file": {"name": "a.flac"}}),
  ("with_images", {"image_url": {"url": "http://x/a.png?w=3"}}),
  ("with_images", {"image_url": "http://x/200"}),
  ("with_images", {"imageId": "000123"}),
  ("with_images", {"screen": {"bytes": "x", "path": None}}),
  ("with_images", {"url": "http://x/a.jpg#top"}),
]


@pytest.mark.parametrize("format", ["llava-jsonl", "text", "parquet"])
def test_what_a_conversation_refers_to_is_its_medium_and_what_a_document_refers_to_its_source(folder, format):
  records = [talk(human("<video>\nWhat?"), gpt("A cat."), **fields) for _, fields in REFERENCES]
  if format == "parquet":
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (folder / "t").mkdir()
    for i, record in enumerate(records + [SOUND]):  # each with columns of its own
      parquet.write_table(pa.Table.from_pylist([record]), folder / "t" / f"{i}.parquet")
    summary, output = run(folder, "text", "t", format)
    assert len(read_back(output, "text")) == 1
  else:
    summary, found = _import(
      folder, [*records, {"text": "A talk.", "video_url": "https://youtu.be/abc"}], format=format
    )
    assert [record.text for record in found] == ["A talk."]
  reasons = [reason for reason, _ in REFERENCES]
  assert summary["filtered"] == {reason: reasons.count(reason) for reason in reasons} and not summary["rejected"]


def _rows(folder):
  """Writes a table and a tar of the same records: two of text, and one each of a picture, a video and a sound."""
  pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
  empty = {"image": None, "video": None, "audio": None}
  more = [
    {},
    {"image": {"bytes": None, "path": None}},
    {"image": {"bytes": image(1), "path": None}},
    {"video": "a.mp4"},
    {"audio": {"bytes": b"x", "path": "a.wav"}},
  ]
  talks = [[human(f"<{what}> {i}"), gpt("So.")] for i, what in enumerate(("image", "video", "image", "video", "audio"))]
  rows = [{**empty, **fields, "conversations": turns} for fields, turns in zip(more, talks, strict=True)]
  parquet.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
  members = {f"{i}.json": json.dumps({"conversations": turns}).encode() for i, turns in enumerate(talks)}
  members |= {"2.png": image(1), "3.mp4": b"x", "4.0.WAV": b"x"}
  write_tar(folder / "a.tar", dict(sorted(members.items())))


@pytest.mark.parametrize("format, name", [("parquet", "a.parquet"), ("webdataset", "a.tar")])
def test_tables_and_tars_are_read_by_the_same_rules(folder, format, name):
  _rows(folder)
  summary, output = run(folder, "text", name, format)
  assert [record.turns[0].text for record in read_back(output, "text")] == ["<image> 0", "<video> 1"]
  assert summary["filtered"] == {"with_images": 1, "with_video": 1, "with_audio": 1}
  summary, output = run(
    folder, "understanding", name, format, str(folder.parent / "understanding"), max_rejected_share=1.0
  )
  assert summary["accepted"] == 1
  # In a tar the image that a mark stands for may have been lost; in a table it is empty.
  lost = format == "webdataset"
  assert summary["rejected"] == ({"missing_image": 1} if lost else {})
  assert summary["filtered"] == {"text_only": 2 - lost, "with_video": 1, "with_audio": 1}


@pytest.mark.parametrize("format", ["llava-jsonl", "parquet"])
def test_where_an_image_is_from_costs_nothing(folder, format):
  """Beside an image the name of a video or of a document is a note."""
  sources = {"source": "clip_001.mp4", "url": "https://x.org/a.mp4?t=3", "video_id": "abc", "original": "docs/b.pdf"}
  turns = [human("<image>What?"), gpt("A ring.")]
  if format == "parquet":
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = {"image": image(1), "conversations": turns, **sources}
    parquet.write_table(pa.Table.from_pylist([row] * 4), folder / "a.parquet")
    name = "a.parquet"
  else:
    name = "a.jsonl"
    write_lines(folder / name, [talk(*turns, image="pictures/1.png", **{key: x}) for key, x in sources.items()])
  summary, _ = run(folder, "understanding", name, format, max_rejected_share=1.0)
  assert summary["accepted"] == 4 and not _counts(summary)


def test_a_word_about_a_medium_is_none(folder):
  empty = [{"video": value} for value in (None, "", [], [None], {}, 3, False)]
  words = [{"sound": "loud"}, {"music": "jazz"}, {"clip": 0.3}, {"points": [1, 2]}, {"source": "videos"}]
  records = [talk(human("Which file?"), gpt("a.mp4"), **more) for more in empty + words]
  summary, found = _import(folder, [*records, {"question": "Which?", "answer": "b.png"}])
  assert not _counts(summary) and len(found) == len(records) + 1


@pytest.mark.parametrize("kind", ["video", "video_url", "audio", "input_audio"])
def test_a_part_of_another_medium_drops_its_record(folder, kind):
  content = [{"type": kind, kind: {"url": "x"}}, {"type": "text", "text": "What?"}]
  record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]}
  summary, _ = _import(folder, [record])
  assert summary["filtered"] == {"with_video" if "video" in kind else "with_audio": 1}


ROLES = [(u, "gpt") for u in ("human", "Human", "user", "USER", " user ", "prompter")] + [
  ("user", a) for a in ("gpt", "GPT", "assistant", "ASSISTANT", "model", "bot", "chatgpt", "Claude")
]


def test_roles_may_be_spelled_otherwise(folder):
  keys = [(who, what) for who in ("from", "role") for what in ("value", "content")]
  records = [
    {name: [{who: user, what: "Why?"}, {who: assistant, what: "So."}]}
    for user, assistant in ROLES
    for who, what in keys
    for name in ("conversations", "messages")
  ]
  summary, found = _import(folder, records)
  assert not _counts(summary) and len(found) == len(records)
  assert {record.turns for record in found} == {(("user", "Why?"), ("assistant", "So."))}


Q, A = human("Why?"), gpt("So.")


@pytest.mark.parametrize(
  "turns, kept, notes",
  [
    ([gpt("Hello."), Q, A], 2, {"first_answer": 1}),
    ([Q, A, human("And?")], 2, {"last_question": 1}),
    ([gpt("Hello."), Q, A, human("And?")], 2, {"first_answer": 1, "last_question": 1}),
    ([gpt(""), Q, A], 2, {"first_answer": 1}),
    ([{"from": "system", "value": " "}, Q, A], 2, {}),
    ([gpt("Hello."), Q], 0, "no_answer"),
    ([Q], 0, "no_answer"),
    ([], 0, "no_answer"),
    ([gpt("Hello.")], 0, "bad_turns"),
    ([gpt("Hello."), gpt("Hello?"), Q, A], 0, "bad_turns"),
    ([Q, Q, A], 0, "bad_turns"),
    ([{"from": "System", "value": "Be kind."}, Q, A], 0, "bad_turns"),
    ([{"from": "tool", "value": "3"}, Q, A], 0, "bad_turns"),
  ],
)
def test_conversations_are_cut_as_llava_cuts_them(folder, turns, kept, notes):
  for format in ("llava-jsonl", "text"):
    summary, found = _import(folder, [talk(*turns)], format=format, output=str(folder.parent / format))
    if kept:
      assert found[0].turns == (("user", "Why?"), ("assistant", "So.")) and summary["notes"] == notes
    else:
      assert summary["rejected"] == {notes: 1}
  pictured = talk(*(human("<image>Why?") if turn is Q else turn for turn in turns), image="pictures/1.png")
  summary, found = _import(folder, [pictured], "understanding", output=str(folder.parent / "pictured"))
  assert len(found) == bool(kept) and (not kept or summary["notes"] == notes)


ODD = (
  None,
  True,
  0,
  1.5,
  float("nan"),
  "",
  " ",
  "x" * 100_000,
  "\ud800",
  "a\0b",
  [],
  {},
  ["human"],
  {"a": ["b"]},
  [[[]]],
)


@pytest.mark.parametrize(
  "place",
  [
    "from",
    "role",
    "value",
    "content",
    "conversations",
    "messages",
    "turn",
    "image",
    "id",
    "text",
    "question",
  ],
)
def test_no_value_of_a_field_costs_more_than_its_record(folder, place):
  records = []
  for odd in ODD:
    if place in ("from", "value"):
      record = talk({"from": "human", "value": "Why?", place: odd}, gpt("So."))
    elif place in ("role", "content"):
      record = {"messages": [{"role": "user", "content": "Why?", place: odd}, gpt("So.")]}
    elif place == "turn":
      record = talk(human("Why?"), odd)
    elif place in ("image", "id"):
      record = talk(Q, A, **{place: odd})
    else:
      record = {place: odd, "answer": "So."}
    records += [record, SOUND]
  for format in ("llava-jsonl", "text"):
    summary, found = _import(folder, records, format=format, output=str(folder.parent / format))
    counts = _counts(summary)
    assert len(found) + sum(counts.values()) == len(records) and "malformed" not in counts
    assert sum(record.turns == (("user", "Why?"), ("assistant", "So.")) for record in found) >= len(ODD)


def test_what_was_prepared_can_be_prepared_again(folder):
  records = [
    talk(human("<image>\nWhy?"), A, image="pictures/1.png"),
    {"image": "pictures/2.png", "caption": "A cat."},
  ]
  write_lines(folder / "a.jsonl", records)
  _, first = run(folder, name="a.jsonl")
  _, second = run(folder.parent, name="out", format="tfds", output=str(folder.parent / "again"))
  assert read_back(first) == read_back(second)
  write_lines(folder / "a.jsonl", [SOUND, {"text": "A document."}])
  _, first = run(folder, "text", "a.jsonl", output=str(folder.parent / "texts"))
  _, second = run(folder.parent, "text", "texts", "tfds", output=str(folder.parent / "texts-again"))
  assert read_back(first, "text") == read_back(second, "text")


def test_the_time_of_a_long_line_is_that_of_one_pass(folder):
  """Each of these takes most of an hour where a loop runs over all that came before."""
  count = 300_000
  twice = b'{"text": "a"' + b"".join(b',"k%d":1' % i for i in range(count)) + b',"k%d":1}' % (count - 1)
  write_lines(folder / "a.jsonl", [twice, SOUND])
  summary, _ = run(folder, "text", "a.jsonl", max_rejected_share=1.0, output=str(folder.parent / "keys"))
  assert summary["rejected"] == {"duplicate_key": 1} and summary["accepted"] == 1
  (folder / "a.txt").write_bytes(b"\n" * count + b"One.\n\n" + b" \r\n" * count + b"Two.\n")
  summary, output = run(folder, "text", "a.txt", "text", documents="paragraph", output=str(folder.parent / "blank"))
  assert [record.text.strip() for record in read_back(output, "text")] == ["One.", "Two."]
  numbers = ",".join(["9" * 4400] * 4000)  # too long for Python's int
  (folder / "a.json").write_text(f'[{numbers}, {{"text": "One."}}]')
  summary, _ = run(folder, "text", "a.json", max_rejected_share=1.0, output=str(folder.parent / "numbers"))
  assert summary["rejected"] == {"broken_json": 4000} and summary["accepted"] == 1
  for caption in ("." * count + "x", "a" + "\n" * count + "b", '."' * count + "x", "a b" + " !" * count):
    examples.first_sentence_of(caption)
