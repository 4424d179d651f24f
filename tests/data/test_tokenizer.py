"""The tokenizer: names, round trips, refusals."""

import json
import pathlib
import pickle

import pytest
from refusals import refused

from jflow.data import tokenizer as tokenizer_lib
from jflow.data.tokenizer import SPEAKERS, SPECIAL_TOKENS, Tokenizer
from jflow.errors import UserError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "processor"
JANUS = GOLDEN.parent / "janus_processor"
SHIPPED = pathlib.Path(__file__).parents[2] / "configs" / "tokenizer"
TEXTS = [
  "",
  "a red circle",
  "  two  spaces ",
  "line\nbreak\r\n\n\ttab",
  "颜色呢？一个圆。",
  "naïve ß 🙂👩‍🚀",
  "\0 nul \x7f",
  "1234567890",
  "<image>",
  "é\u0301",
]


@pytest.fixture(scope="module", params=[GOLDEN, SHIPPED], ids=["golden", "shipped"])
def tokenizer(request):
  return Tokenizer.load(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
  assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_ids_are_those_of_the_file(tokenizer):
  added = {token["content"]: token["id"] for token in json.loads(tokenizer.files["tokenizer.json"])["added_tokens"]}
  for attribute, name in SPECIAL_TOKENS.items():
    assert getattr(tokenizer, attribute) == added[name]
  assert tokenizer.vocabulary_size == max(added.values()) + 1


def test_golden_ids():
  tokenizer = Tokenizer.load(GOLDEN)
  ids = [getattr(tokenizer, name) for name in SPECIAL_TOKENS]
  assert ids == [1000, 1001, 1002, 1003, 1004, 1005, 1006]  # tokenizer_config.json calls EOS the pad token


@pytest.mark.parametrize("copy", [lambda t: t, lambda t: pickle.loads(pickle.dumps(t))], ids=["itself", "pickled"])
def test_written_special_tokens_stay_text(tokenizer, copy):
  tokenizer = copy(tokenizer)
  text = " ".join(SPECIAL_TOKENS.values())
  ids = tokenizer.encode(text)
  assert not set(ids) & {getattr(tokenizer, name) for name in SPECIAL_TOKENS}
  assert tokenizer.decode(ids) == text


def test_special_ids_decode_to_nothing(tokenizer):
  ids = tokenizer.encode("a circle")
  assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == "a circle"


def test_lone_surrogate_is_refused(tokenizer):
  with refused("Unicode"):
    tokenizer.encode("a \ud800 b")


def test_save_copies_the_bytes(tokenizer, tmp_path):
  tokenizer.save(tmp_path / "copy")
  names = sorted(path.name for path in (tmp_path / "copy").iterdir())
  assert names == ["tokenizer.json", "tokenizer_config.json"]
  for name in names:
    assert (tmp_path / "copy" / name).read_bytes() == tokenizer.files[name]


def _write(directory, content, config=None):
  (directory / "tokenizer.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
  if config is not None:
    (directory / "tokenizer_config.json").write_text(config)
  return directory


def _golden() -> dict:
  return json.loads((GOLDEN / "tokenizer.json").read_bytes())


def _renumbered() -> dict:
  value = _golden()
  value["model"]["vocab"]["circle!"] = 5
  return value


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"{",
    (GOLDEN / "tokenizer.json").read_bytes()[:20_000],
    b"\xff\xfe",
    b"[1, 2]",
    b"[" * 100_000,
    b"{}",
  ],
  ids=["empty", "cut", "cut-late", "not-utf8", "array", "nested", "no-model"],
)
def test_broken_files_are_refused(tmp_path, content):
  with refused(tmp_path):
    Tokenizer.load(_write(tmp_path, content))


def test_repeated_id_is_refused(tmp_path):
  with refused(tmp_path):
    Tokenizer.load(_write(tmp_path, _renumbered()))


def _without(attribute, value):
  for token in value["added_tokens"]:
    if token["content"] == (SPECIAL_TOKENS | SPEAKERS)[attribute]:
      token["content"] = "<renamed>"
  value["post_processor"] = None
  return value


@pytest.mark.parametrize("attribute", [name for name in SPECIAL_TOKENS if name not in ("pad", "image")])
def test_missing_special_token_is_named(tmp_path, attribute):
  with refused(SPECIAL_TOKENS[attribute]):
    Tokenizer.load(_write(tmp_path, _without(attribute, _golden()))).need("flow", "generation_start")


def test_without_an_image_mark_the_next_free_id_serves(tmp_path):
  tokenizer = Tokenizer.load(_write(tmp_path, _without("image", _golden())))
  assert tokenizer.image == 1007 and tokenizer.vocabulary_size == 1008
  assert tokenizer.decode([tokenizer.image]) == ""


@pytest.mark.parametrize("attribute", ["user", "assistant", "pad"])
def test_a_janus_tokenizer_that_lacks_a_token_is_refused_by_what_needs_it(tmp_path, attribute):
  value = json.loads((JANUS / "tokenizer.json").read_text())
  tokenizer = Tokenizer.load(_write(tmp_path, _without(attribute, value)))
  with refused((SPECIAL_TOKENS | SPEAKERS)[attribute]):
    tokenizer.need("it", "user", "assistant", "pad")


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
  "named, pad", [(SPECIAL_TOKENS["eos"], None), (SPECIAL_TOKENS["bos"], None), ({"content": "<renamed>"}, 1002)]
)
def test_a_pad_that_is_attended_to_is_a_token_of_its_own_in_either_file(tmp_path, file, named, pad):
  value = json.loads((JANUS / "tokenizer.json").read_text())
  (tmp_path / file).write_text(json.dumps({"pad_token": named}))
  tokenizer = Tokenizer.load(_write(tmp_path, _without("pad", value)))
  if pad is None:
    with refused("pad"):
      tokenizer.need("it", "pad")
  else:
    tokenizer.need("it", "pad")
    assert tokenizer.pad == pad


def test_eos_that_special_tokens_map_names_pads_too(tmp_path):
  value = _without("pad", _golden())
  value["added_tokens"][1]["content"] = "</s>"
  (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
  tokenizer = Tokenizer.load(_write(tmp_path, value))
  assert tokenizer.pad == tokenizer.eos == 1001


def test_the_ids_of_a_janus_tokenizer_come_from_the_names(tmp_path):
  tokenizer = Tokenizer.load(str(JANUS))  # its tokenizer_config.json has pad_token null
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1000, 1001, 1002)
  assert (tokenizer.image, tokenizer.image_start, tokenizer.image_end) == (1003, 1004, 1005)
  assert (tokenizer.user, tokenizer.assistant, tokenizer.generation_start) == (1006, 1007, None)
  assert not set(tokenizer.encode("<|User|>: a<|Assistant|>:")) & {1006, 1007}  # a user's text spells no speaker


def test_without_a_pad_token_eos_pads(tmp_path):
  value = _golden()
  value["added_tokens"][2]["content"] = "<renamed>"
  tokenizer = Tokenizer.load(_write(tmp_path, value))
  assert tokenizer.pad == tokenizer.eos == 1001


def test_config_may_name_bos_and_eos(tmp_path):
  value = _golden()
  value["added_tokens"][0]["content"], value["added_tokens"][1]["content"] = "<s>", "</s>"
  value["post_processor"] = None
  config = json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
  tokenizer = Tokenizer.load(_write(tmp_path, value, config))
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1000, 1001, 1002)


@pytest.mark.parametrize("config", ["{", "[]"])
def test_broken_config_is_refused(tmp_path, config):
  with refused(tmp_path):
    Tokenizer.load(_write(tmp_path, _golden(), config))


def test_missing_and_oversized_files_are_refused(tmp_path):
  with refused(str(tmp_path)):
    Tokenizer.load(tmp_path)
  with open(tmp_path / "tokenizer.json", "wb") as file:
    file.truncate(50 * 2**20)
  with refused(str(tmp_path)):
    Tokenizer.load(tmp_path)


def test_training_depends_on_the_texts_alone():
  texts = ["a red circle and a blue star 123"] * 3 + ["two stars"] * 2
  first, second = (tokenizer_lib.train(list(texts), 273) for _ in range(2))
  assert first.files == second.files
  assert first.vocabulary_size == 273
  assert first.bos == 266  # the special tokens are the last ids
  assert first.encode("12") != first.encode("1") and len(first.encode("123")) == 3  # digits stand alone
  with refused("263"):
    tokenizer_lib.train(texts, 200)


def test_shipped_tokenizer_fits_the_small_configs():
  tokenizer = Tokenizer.load(SHIPPED)
  assert tokenizer.vocabulary_size == 1024
  for word in (" red", " circle", " stars", " yes", " left"):
    assert len(tokenizer.encode(word)) == 1


# --- files from elsewhere ----------------------------------------------------------------------------------


def _regex(pattern):
  return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _replace(content, pattern="a"):
  return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _sequence(key, parts):
  return {"type": "Sequence", key: parts}


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_HOSTILE = [
  (dict(pre_tokenizer=_regex("(a+)+$")), "pre_tokenizer"),
  (dict(pre_tokenizer=_regex("(a|a)*b")), "pre_tokenizer"),
  (dict(pre_tokenizer=_regex("a{100000}")), "pre_tokenizer"),
  (dict(pre_tokenizer=_regex("(?:a{1000}){1000}")), "pre_tokenizer"),
  (dict(pre_tokenizer=_regex("a*b*c*d*e*f")), "pre_tokenizer"),
  (dict(pre_tokenizer=_regex("(?<x>a|b\\g<x>c)")), "pre_tokenizer"),
  (dict(pre_tokenizer=_regex("(a)\\1")), "pre_tokenizer"),
  (dict(pre_tokenizer=_regex("[a-z" + "b" * 5000)), "pre_tokenizer"),
  (dict(pre_tokenizer=_regex("[")), "tokenizer"),
  (dict(pre_tokenizer=_sequence("pretokenizers", [_BYTES] * 100)), "pre_tokenizer"),
  (dict(pre_tokenizer={"type": "FixedLength", "length": 0}), "FixedLength"),
  (dict(pre_tokenizer={"type": "Unheard"}), "pre_tokenizer"),
  (dict(pre_tokenizer=[]), "pre_tokenizer"),
  (dict(normalizer=_replace("x" * 1000)), "normalizer"),
  (dict(normalizer=_sequence("normalizers", [_replace("aaaa")] * 12)), "normalizer"),
  (dict(normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+"}, "content": ""}), "normalizer"),
  (dict(normalizer={"type": "Prepend", "prepend": "x" * 10**6}), "Prepend"),
  (dict(normalizer={"type": "Precompiled", "precompiled_charsmap": "?"}), "Precompiled"),
  (dict(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 2**40}), "decoder"),
  (dict(added_tokens=[{"id": -1, "content": "<x>"}]), "added_tokens"),
  (dict(added_tokens=[{"id": 2**40, "content": "<x>"}]), "added_tokens"),
  (dict(added_tokens="<x>"), "added_tokens"),
  (dict(unheard={"a": 1}), "unheard"),
]


@pytest.mark.parametrize("change, part", _HOSTILE, ids=lambda x: str(x)[:50])
def test_what_could_take_time_or_memory_without_end_is_refused(tmp_path, change, part):
  with pytest.raises(UserError) as caught:
    Tokenizer.load(_write(tmp_path, _golden() | change))
  said = str(caught.value)
  assert str(tmp_path) in said and part in said and "\n" not in said and len(said) < 600


@pytest.mark.parametrize(
  "pattern",
  [
    "[\r\n]",
    "\\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
    "\\s+$",
    "[[:alpha:]&&[^\\p{Han}]]+",
  ],
)
def test_expressions_of_published_tokenizers_pass(tmp_path, pattern):
  value = _golden() | {"pre_tokenizer": _sequence("pretokenizers", [_regex(pattern), _BYTES])}
  tokenizer = Tokenizer.load(_write(tmp_path, value))
  text = "It's 12345 naïve 颜色\n\n  end "
  assert tokenizer.decode(tokenizer.encode(text)) == text


def _with(change) -> dict:
  value = _golden()
  change(value)
  return value


@pytest.mark.parametrize(
  "change, part",
  [
    (lambda v: v["model"].update(dropout=0.1), "dropout"),
    (lambda v: v["model"]["vocab"].update({"circle!": -1}), "circle!"),
    (lambda v: v["model"]["vocab"].update({"circle!": 1.5}), "circle!"),
    (lambda v: v["model"].update(vocab=[]), "tokenizer"),
    (lambda v: v["model"].update(type="Unheard"), "Unheard"),
    (lambda v: v["added_tokens"][3].update(id=1500), "<image_placeholder>"),
    (lambda v: v["added_tokens"][3].update(id=5), "<image_placeholder>"),
    (lambda v: v["added_tokens"][3].update(content=""), "added_tokens"),
  ],
)
def test_a_vocabulary_that_is_not_what_it_says_is_refused(tmp_path, change, part):
  with refused(part):
    Tokenizer.load(_write(tmp_path, _with(change)))


def test_a_token_that_the_file_does_not_mark_as_special_stays_text_too(tmp_path):
  value = _with(lambda v: [token.update(special=False) for token in v["added_tokens"]])
  tokenizer = Tokenizer.load(_write(tmp_path, value))
  text = " ".join(SPECIAL_TOKENS.values())
  for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
    assert (
      copy.image == 1003
      and not set(copy.encode(text)) & set(range(1000, 1007))
      and copy.decode(copy.encode(text)) == text
    )


def test_a_special_token_that_is_a_word_is_refused(tmp_path):
  words = {token: i for i, token in enumerate((*SPECIAL_TOKENS.values(), "a"))}
  model = {"type": "WordLevel", "vocab": words, "unk_token": "a"}
  with refused("special"):
    Tokenizer.load(_write(tmp_path, {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}))


def test_a_key_that_stands_twice_is_refused(tmp_path):
  text = (GOLDEN / "tokenizer.json").read_text().replace('"vocab": {', '"vocab": {"!": 7, ', 1)
  with refused("twice"):
    Tokenizer.load(_write(tmp_path, text.encode()))


def test_truncation_and_padding_of_the_file_cut_nothing(tmp_path):
  value = _golden() | {
    "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": {
      "strategy": {"Fixed": 512},
      "direction": "Right",
      "pad_to_multiple_of": None,
      "pad_id": 0,
      "pad_type_id": 0,
      "pad_token": "!",
    },
  }
  assert Tokenizer.load(_write(tmp_path, value)).encode("a red circle") == Tokenizer.load(GOLDEN).encode("a red circle")


@pytest.mark.parametrize(
  "name, value, part",
  [
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "auto_map"),
    ("tokenizer_config.json", {"bos_token": "<nowhere>"}, "bos_token"),
    ("tokenizer_config.json", {"eos_token": 7}, "eos_token"),
    (
      "tokenizer_config.json",
      {"added_tokens_decoder": {"1003": {"content": "<end_of_image>"}}},
      "added_tokens_decoder",
    ),
    ("special_tokens_map.json", {"eos_token": "<image_placeholder>"}, "special_tokens_map.json"),
    ("special_tokens_map.json", [], "special_tokens_map.json"),
    ("added_tokens.json", {"<image_placeholder>": 7}, "added_tokens.json"),
    ("added_tokens.json", {"<unheard>": 1003}, "added_tokens.json"),
  ],
)
def test_files_beside_it_may_not_contradict(tmp_path, name, value, part):
  _write(tmp_path, _golden(), json.dumps({"eos_token": SPECIAL_TOKENS["eos"]}))
  (tmp_path / name).write_text(json.dumps(value))
  with refused(part):
    Tokenizer.load(tmp_path)


def test_a_template_of_the_file_is_never_run(tmp_path):
  canary = tmp_path / "canary"
  template = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
  tokenizer = Tokenizer.load(_write(tmp_path, _golden(), json.dumps({"chat_template": template})))
  assert tokenizer.encode("a red circle") and not canary.exists()


def test_a_sentencepiece_model_is_named_with_the_way_out(tmp_path):
  (tmp_path / "tokenizer.model").write_bytes(b"x")
  with refused("tokenizer.model", "save_pretrained"):
    Tokenizer.load(tmp_path)


@pytest.mark.parametrize("error", [Exception("bare"), type("PanicException", (BaseException,), {})("a panic")])
def test_whatever_the_library_raises_is_one_line(tmp_path, monkeypatch, error):
  tokenizer = Tokenizer.load(GOLDEN)

  class Broken:
    def encode(self, *args, **kwargs):
      raise error

    decode = encode

  monkeypatch.setattr(tokenizer, "_tokenizer", Broken())
  for call in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1])):
    with refused(error):
      call()
