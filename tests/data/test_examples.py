"""Records to sequences: the release's golden prompts, the layouts, what is learned, what is refused."""

import json

import numpy as np
import pytest
from refusals import refused
from tokens import GOLDEN, TOKENIZER, show

from jflow import batch as batch_lib
from jflow.data import examples
from jflow.data.prompts import SYSTEM_PROMPT, chat_prompt, generation_prompt
from jflow.data.records import Record, RecordError, Turn
from jflow.data.tokenizer import Tokenizer
from jflow.errors import PromptTooLong
from jflow.generation.flow import FAMILY

CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())["cases"]}
ARRAYS = np.load(GOLDEN / "golden.npz")
P = 3
JANUS = Tokenizer.load(str(GOLDEN.parent / "janus_processor"))
PIXELS = np.zeros((4, 4, 3), np.uint8)


def build(record, task, template="plain", **options):
  return examples.build(record, task, TOKENIZER, template, P, layout=FAMILY.layout, **options)


def learned(sample) -> str:
  return show(sample.targets[sample.loss_mask])


def question(text="<image>\nWhat?", answer="A cat.", images=(PIXELS,)):
  return Record("0", images, "", (Turn("user", text), Turn("assistant", answer)))


@pytest.mark.parametrize("name", [name for name in CASES if name != "generation"])
def test_chat_prompt_reproduces_the_release(name):
  conversation = CASES[name]["conversation"]
  count = sum(len(turn.get("images", [])) for turn in conversation)
  prompt = chat_prompt(conversation, count, TOKENIZER, 9, system=SYSTEM_PROMPT, mark="<image_placeholder>")
  np.testing.assert_array_equal(prompt.tokens, ARRAYS[f"{name}/input_ids"])
  if count:
    np.testing.assert_array_equal(prompt.image_mask(9), ARRAYS[f"{name}/images_seq_mask"])
  assert len(prompt.image_starts) == count


def test_generation_prompt_reproduces_the_release():
  prompt = generation_prompt(CASES["generation"]["conversation"][0]["content"], "chat", TOKENIZER)
  np.testing.assert_array_equal(np.append(prompt, TOKENIZER.generation_start), ARRAYS["generation/input_ids"])


@pytest.mark.parametrize("template, user", [("chat", []), ("pro", [JANUS.user])])
def test_a_sample_begins_with_the_prompt_of_its_answer(template, user):
  record = question("<image>\nWhat?", "A cat.")
  prompt = chat_prompt([{"role": "<|User|>", "content": "<image>\nWhat?"}], 1, JANUS, P, template)
  sample = examples.build(record, "understanding", JANUS, template, P)
  np.testing.assert_array_equal(sample.tokens[: len(prompt.tokens)], prompt.tokens)
  assert [token for token in prompt.tokens if token == JANUS.user] == user
  assert JANUS.decode(sample.targets[sample.loss_mask]) == " A cat."


@pytest.mark.parametrize(
  "template, expected",
  [
    ("plain", "[BOS][###]Generate the caption of this picture. A cat.[EOS]"),
    ("chat", "[BOS]User: [###]\nGenerate the caption of this picture.\n\nAssistant: A cat.[EOS]"),
  ],
)
def test_captions(template, expected):
  sample = build(Record("0", (PIXELS,), " A cat. ", ()), "understanding", template)
  assert show(sample.tokens) == expected
  assert learned(sample) == " A cat.[EOS]"
  other = build(Record("0", (PIXELS,), "A cat.", ()), "understanding", template, caption_prompt="Describe it.")
  assert show(other.tokens) == expected.replace("Generate the caption of this picture.", "Describe it.")


@pytest.mark.parametrize(
  "template, expected",
  [
    ("plain", "[BOS][###]What? A cat.[EOS]Sure? Yes[EOS]"),
    ("chat", "[BOS]User: [###]\nWhat?\n\nAssistant: A cat.[EOS]User: Sure?\n\nAssistant: Yes[EOS]"),
  ],
)
def test_conversations(template, expected):
  record = question()
  record = record._replace(turns=(*record.turns, Turn("user", "Sure? "), Turn("assistant", "Yes")))
  sample = build(record, "understanding", template)
  assert show(sample.tokens) == expected
  assert learned(sample) == " A cat.[EOS] Yes[EOS]"
  assert sample.image_kinds == (batch_lib.READ,)
  assert [sample.tokens[start] for start in sample.image_starts] == [TOKENIZER.image_start]


def test_images_stand_where_their_marks_do():
  sample = build(question("<image> is one, <image> is two. Same?", images=(PIXELS, PIXELS)), "understanding", "chat")
  assert show(sample.tokens) == "[BOS]User: [###] is one, [###] is two. Same?\n\nAssistant: A cat.[EOS]"
  for start in sample.image_starts:
    assert sample.tokens[start : start + P + 2].tolist() == [
      TOKENIZER.image_start,
      *[TOKENIZER.image] * P,
      TOKENIZER.image_end,
    ]


@pytest.mark.parametrize("template", ("plain", "chat"))
def test_interleaved_documents_are_learned_but_for_their_images(template):
  text = " First <image> then <image>\n\nand the end. "
  sample = build(Record("0", (PIXELS, PIXELS), text, ()), "understanding", template)
  assert show(sample.tokens) == "[BOS]First [###] then [###]\n\nand the end.[EOS]"
  assert learned(sample) == "First  then \n\nand the end.[EOS]"
  assert [sample.tokens[start] for start in sample.image_starts] == [TOKENIZER.image_start] * 2
  assert sample.image_kinds == (batch_lib.READ,) * 2
  special = (TOKENIZER.image_start, TOKENIZER.image, TOKENIZER.image_end)
  assert not np.isin(sample.targets[sample.loss_mask], special).any()
  first = build(Record("0", (PIXELS,), "<image>The end.", ()), "understanding", template)
  assert show(first.tokens) == "[BOS][###]The end.[EOS]" and learned(first) == "The end.[EOS]"


@pytest.mark.parametrize(
  "template, expected",
  [("plain", "[BOS]A cat. It sleeps.[T]###"), ("chat", "[BOS]User: A cat. It sleeps.\n\nAssistant:[T]###")],
)
def test_generation(template, expected):
  sample = build(Record("0", (PIXELS,), "A cat. It sleeps.", ()), "generation", template)
  assert show(sample.tokens) == expected
  assert not sample.loss_mask.any()
  assert sample.image_starts == (len(sample.tokens) - P - 1,) and sample.image_kinds == (batch_lib.WRITE,)
  np.testing.assert_array_equal(sample.positions, np.arange(len(sample.tokens)))
  prompt = generation_prompt("A cat. It sleeps.", template, TOKENIZER)
  np.testing.assert_array_equal(sample.tokens[: sample.image_starts[0]], prompt)


@pytest.mark.parametrize("template", ("plain", "chat"))
def test_a_dropped_prompt_leaves_its_gap(template):
  record = Record("0", (PIXELS,), "A cat on a sofa.", ())
  whole = build(record, "generation", template)
  dropped = build(record, "generation", template, rng=np.random.default_rng(0), prompt_drop=1.0)
  assert show(dropped.tokens) == "[BOS][T]###"
  start = whole.image_starts[0]
  kept = np.r_[0, start : len(whole.tokens)]  # what the release's masked form leaves to attend to
  for array in ("tokens", "targets", "positions"):
    expected = getattr(whole, array)[kept]
    if array == "targets":
      expected[0] = TOKENIZER.generation_start
    np.testing.assert_array_equal(getattr(dropped, array), expected)
  assert dropped.image_starts == (1,)


def test_drop_and_first_sentence_occur_at_their_rates():
  record = Record("0", (PIXELS,), "A cat on a sofa. It sleeps.", ())
  counts = {"[BOS]A cat on a sofa. It sleeps.[T]###": 0, "[BOS]A cat on a sofa.[T]###": 0, "[BOS][T]###": 0}
  n = 2000
  for i in range(n):
    sample = build(record, "generation", rng=np.random.default_rng([0, i]), first_sentence=0.25, prompt_drop=0.1)
    counts[show(sample.tokens)] += 1
  for count, share in zip(counts.values(), (0.75 * 0.9, 0.25 * 0.9, 0.1)):
    assert abs(count - n * share) < 5 * np.sqrt(n * share * (1 - share))


def test_the_same_rng_gives_the_same_sample():
  record = Record("0", (PIXELS,), "A cat on a sofa. It sleeps.", ())
  for seed in range(20):
    first, second = (
      build(record, "generation", rng=np.random.default_rng(seed), first_sentence=0.5, prompt_drop=0.5)
      for _ in range(2)
    )
    np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize(
  "caption, expected",
  [
    ("A cat on a sofa. It sleeps.", "A cat on a sofa."),
    ("A cat on a sofa", "A cat on a sofa"),
    ("St. Peter's in Rome. Rain.", "St. Peter's in Rome."),
    ("Is it 3.5 m long? Yes.", "Is it 3.5 m long?"),
    ('He says "go on now!" Then he leaves.', 'He says "go on now!"'),
    ("一只猫。它在睡觉。", "一只猫。"),
    ("a cat and a dog\nsecond line", "a cat and a dog"),
    ("Wow! Oh!", "Wow! Oh!"),
  ],
)
def test_first_sentence(caption, expected):
  assert examples.first_sentence_of(caption) == expected


def test_text_is_learned_whole():
  sample = build(Record("0", (), "Once upon a time.\n", ()), "text")
  assert show(sample.tokens) == "[BOS]Once upon a time.[EOS]"
  assert learned(sample) == "Once upon a time.[EOS]"
  assert sample.images == sample.image_starts == ()


def test_text_conversations_are_chat():
  sample = build(question("What?", images=()), "text", "chat")
  assert show(sample.tokens) == "[BOS]User: What?\n\nAssistant: A cat.[EOS]"
  assert learned(sample) == " A cat.[EOS]"


def test_targets_are_the_next_tokens():
  for sample in (
    build(question(), "understanding", "chat"),
    build(Record("0", (), "Once upon a time.", ()), "text"),
  ):
    np.testing.assert_array_equal(sample.targets[:-1], sample.tokens[1:])
    assert not sample.loss_mask[-1] and sample.loss_mask.any()


@pytest.mark.parametrize("template", ("plain", "chat"))
@pytest.mark.parametrize("task, images", [("understanding", (PIXELS,)), ("text", ())])
def test_training_begins_as_the_prompt_of_inference(template, task, images):
  record = question("<image>\nWhat is it?" if images else "What is it?", images=images)
  record = record._replace(turns=(*record.turns, Turn("user", "Sure?"), Turn("assistant", "Yes")))
  sample = build(record, task, template)
  for turns in (1, 3):
    prompt = chat_prompt(record.turns[:turns], len(images), TOKENIZER, P, template)
    n = len(prompt.tokens)
    np.testing.assert_array_equal(sample.tokens[:n], prompt.tokens)
    assert sample.loss_mask[n - 1] and not sample.loss_mask[n - 2]
    assert sample.image_starts == prompt.image_starts


def test_special_tokens_in_a_text_stay_text():
  text = "<begin_of_image><｜end▁of▁sentence｜>"
  sample = build(question(f"<image>{text}", text), "understanding", "chat")
  assert (sample.tokens == TOKENIZER.image_start).sum() == (sample.tokens == TOKENIZER.eos).sum() == 1


USER, ANSWER = Turn("user", "Why?"), Turn("assistant", "So.")


@pytest.mark.parametrize(
  "task, record, reason",
  [
    ("understanding", Record("0", (), "caption", ()), "image_count"),
    ("understanding", Record("0", (PIXELS,), " \n", ()), "empty_caption"),
    ("understanding", Record("0", (PIXELS,), " <image>\n", ()), "empty_caption"),
    ("understanding", Record("0", (PIXELS,), "<image> and <image>", ()), "image_marks"),
    ("understanding", question(answer=" "), "no_answer"),
    ("understanding", Record("0", (PIXELS,), "", (Turn("user", "<image>"),)), "no_answer"),
    ("understanding", Record("0", (PIXELS,), "", (Turn("user", "<image>"), ANSWER, USER)), "no_answer"),
    ("understanding", Record("0", (PIXELS,), "", (ANSWER,)), "bad_turns"),
    ("understanding", Record("0", (PIXELS,), "", (Turn("user", "<image>"), USER, ANSWER)), "bad_turns"),
    ("understanding", Record("0", (PIXELS,), "", (Turn("system", "<image>"), ANSWER)), "bad_turns"),
    ("understanding", question("no mark"), "image_marks"),
    ("understanding", question("<image><image>"), "image_marks"),
    ("understanding", question("x", "<image>"), "image_marks"),
    ("understanding", question("<image> \ud800"), "invalid_utf8"),
    ("generation", Record("0", (), "caption", ()), "image_count"),
    ("generation", Record("0", (PIXELS, PIXELS), "caption", ()), "image_count"),
    ("generation", Record("0", (PIXELS,), "", ()), "empty_caption"),
    ("generation", Record("0", (PIXELS,), "a \udfff", ()), "invalid_utf8"),
    ("text", Record("0", (PIXELS,), "text", ()), "image_count"),
    ("text", Record("0", (), "\n", ()), "empty_text"),
  ],
)
def test_what_does_not_fit_is_refused_with_a_reason(task, record, reason):
  for template in ("plain", "chat"):
    with pytest.raises(RecordError) as caught:
      build(record, task, template)
    assert caught.value.reason == reason


def turns(text: str) -> list[Turn]:
  """Turns from "u:question a:answer s:system"; "_" stands for a space."""
  roles = {"u": "user", "a": "assistant", "s": "system", "d": "developer"}
  return [Turn(roles[turn[0]], turn[2:].replace("_", " ")) for turn in text.split()]


@pytest.mark.parametrize(
  "history, chat, plain",
  [
    ("u:A", "User: A\n\nAssistant:", "A"),
    ("u:A a:B u:C", "User: A\n\nAssistant: B[EOS]User: C\n\nAssistant:", "A B[EOS]C"),
    ("s:S u:A a:B u:C", "S\n\nUser: A\n\nAssistant: B[EOS]User: C\n\nAssistant:", "S\n\nA B[EOS]C"),
    ("u:A a:B u:C a:_", "User: A\n\nAssistant: B[EOS]User: C\n\nAssistant:", "A B[EOS]C"),
    ("u:A a: u:C", "User: A\n\nAssistant:[EOS]User: C\n\nAssistant:", "A[EOS]C"),
    ("u:A a:__ u:C", "User: A\n\nAssistant:[EOS]User: C\n\nAssistant:", "A[EOS]C"),
    ("u:A u:B u:<image> a:C u:D", "User: A\nB\n[###]\n\nAssistant: C[EOS]User: D\n\nAssistant:", "A\nB[###] C[EOS]D"),
    ("u: u:A u:", "User: A\n\nAssistant:", "A"),
    ("u:A a:B a:C u:D", "User: A\n\nAssistant: B\nC[EOS]User: D\n\nAssistant:", "A B\nC[EOS]D"),
    ("a:A u:B", "Assistant: A[EOS]User: B\n\nAssistant:", " A[EOS]B"),
    ("s:S a:A u:B", "S\n\nAssistant: A[EOS]User: B\n\nAssistant:", "S\n\n A[EOS]B"),
    ("u:A a:B s:S u:C", "User: A\n\nAssistant: B[EOS]S\n\nUser: C\n\nAssistant:", "A B[EOS]S\n\nC"),
    ("u:A a:B u:C s:S", "User: A\n\nAssistant: B[EOS]S\n\nUser: C\n\nAssistant:", "A B[EOS]S\n\nC"),
    ("s:R u:A s:S u:B", "R\n\nS\n\nUser: A\nB\n\nAssistant:", "R\n\nS\n\nA\nB"),
    ("d:S s:_ u:A", "S\n\nUser: A\n\nAssistant:", "S\n\nA"),
  ],
)
def test_a_history_is_read_as_it_was_said(history, chat, plain):
  for template, expected in (("chat", chat), ("plain", plain)):
    prompt = chat_prompt(turns(history), history.count("<image>"), TOKENIZER, P, template)
    assert show(prompt.tokens) == "[BOS]" + expected


@pytest.mark.parametrize(
  "messages, images, message",
  [
    ([], 0, "question"),
    ([USER, ANSWER], 0, "question"),
    ([Turn("user", "  ")], 0, "question"),
    ([USER, Turn("tool", "4")], 0, "'tool'"),
    ([ANSWER], 0, "question"),
    ([Turn("system", "Be brief.")], 0, "question"),
    ([USER, Turn("assistant", "<image>"), USER], 0, "<image>"),
    ([Turn("system", "<image>"), USER], 0, "<image>"),
    ([Turn("user", "<image>")], 0, "1 <image> marks and 0 images"),
    ([USER], 1, "0 <image> marks and 1 images"),
    ([{"role": "user"}], 0, '"content"'),
    ([{"role": "user", "content": ["list"]}], 0, "must be text"),
  ],
)
def test_unreadable_conversations_get_one_clear_line(messages, images, message):
  with refused(message):
    chat_prompt(messages, images, TOKENIZER, P)


def test_prompts_have_limits():
  length = len(generation_prompt("A cat", "plain", TOKENIZER))
  generation_prompt("A cat", "plain", TOKENIZER, context=length)
  with refused(length, length - 1):
    generation_prompt("A cat", "plain", TOKENIZER, context=length - 1)
  with refused("4", error=PromptTooLong):
    chat_prompt([Turn("user", "Why is it so?")], 0, TOKENIZER, P, context=4)
  with refused("prompt"):
    generation_prompt(" ", "plain", TOKENIZER)
  with refused("plain", "chat"):
    generation_prompt("A cat", "chatty", TOKENIZER)
