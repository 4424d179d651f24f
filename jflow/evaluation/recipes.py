"""Every benchmark as data: what is measured, where the data comes from, how the model is asked, the paper's scores.

What the papers leave open is pinned here and printed in every report: 30 Euler steps, 4 pictures per prompt with seeds
0 to 3 (in the built-in world and of MJHQ each picture has noise of its own), greedy answers without a system prompt
(but for MM-Vet). Answers that a closed rule reads end after 512 tokens; where they are free, after VLMEvalKit's 2,048.
"""

from collections.abc import Mapping
from typing import NamedTuple

_KIT = "https://opencompass.openxlab.space/utils"


class Recipe(NamedTuple):
  """One benchmark."""

  name: str
  what: str  # one line for --help and the report
  data: str  # what to download and where to put it
  paper: Mapping[str, Mapping[str, float]] = {}  # score -> {"384", "256"}
  # Reading
  file: str = ""  # name inside the data folder
  prompt: str = ""  # of tables.PROMPTS
  rule: str = ""  # of tables.RULES
  fields: tuple[str, ...] = ("index", "question", "answer")  # that every row must fill
  split: str = ""  # rows of this split only, unless --split names another
  system: str = ""
  max_tokens: int = 512  # of an answer
  # Painting
  steps: int = 30
  guidance: float = 2.0
  pictures: int = 1  # per prompt
  prompts: int = 0  # of those of the data, as many of each category; 0: all


_MJHQ = (
  "download meta_data.json and the unpacked mjhq30k_imgs.zip (one folder per category) of "
  "huggingface.co/datasets/playgroundai/MJHQ-30K into one folder and name it with --data"
)


def _kit(name: str, folder: str = "VLMEval") -> str:
  return f"download {_KIT}/{folder}/{name} and name its folder (or the file) with --data"


def _both(large: float, small: float | None = None) -> dict[str, float]:
  return {"384": large} | ({"256": small} if small is not None else {})


_THINK = (  # VLMEvalKit's for MM-Vet
  "You are a helpful assistant. Please answer truthfully and write out your thinking step by step to be sure you get "
  "the right answer."
)

RECIPES = {
  recipe.name: recipe
  for recipe in (
    Recipe(
      "shapes",
      "the built-in world: pictures judged by program after GenEval's rules, questions, distances; needs no data",
      "made by jflow itself",
      pictures=4,
    ),
    Recipe(
      "pope",
      "POPE: is an object in the picture (F1 of the yes, percent)",
      _kit("POPE.tsv"),
      {"F1": _both(88.0, 85.3)},
      "POPE.tsv",
      "pope",
      "pope",
      ("index", "question", "answer", "category"),
    ),
    Recipe(
      "mme",
      "MME: yes or no, two questions a picture (accuracy + accuracy+, perception at most 2,000)",
      _kit("MME.tsv"),
      {"perception": _both(1333.1, 1203.0)},
      "MME.tsv",
      "yes or no",
      "mme",
      ("index", "question", "answer", "category", "image_path"),
    ),
    Recipe(
      "mmbench",
      "MMBench-dev (English, 1.0): multiple choice, right in every order of the options",
      _kit("MMBench_DEV_EN.tsv", "benchmarks/MMBench"),
      {"overall": _both(74.9, 71.9)},
      "MMBench_DEV_EN.tsv",
      "choice",
      "circular",
      ("index", "question", "answer", "A", "category"),
    ),
    Recipe(
      "seed",
      "SEED-Bench, images: multiple choice",
      _kit("SEEDBench_IMG.tsv", "benchmarks/SEEDBench"),
      {"overall": _both(70.5, 67.6)},
      "SEEDBench_IMG.tsv",
      "choice",
      "choice",
      ("index", "question", "answer", "A"),
    ),
    Recipe(
      "mmmu",
      "MMMU-val: college exams, multiple choice and open",
      _kit("MMMU_DEV_VAL.tsv"),
      {"overall": _both(29.3)},
      "MMMU_DEV_VAL.tsv",
      "choice",
      "choice",
      split="validation",
      max_tokens=2048,
    ),
    Recipe(
      "gqa",
      "GQA testdev, balanced: one word, equal",
      _kit("GQA_TestDev_Balanced.tsv"),
      {"overall": _both(60.3, 58.4)},
      "GQA_TestDev_Balanced.tsv",
      "short",
      "exact",
    ),
    Recipe(
      "chartqa",
      "ChartQA test: relaxed accuracy, people's and machine-made questions",
      _kit("ChartQA_TEST.tsv"),
      {"overall": _both(64.6)},
      "ChartQA_TEST.tsv",
      "short",
      "relaxed",
    ),
    Recipe(
      "textvqa",
      "TextVQA val: VQA score of ten answers, no recognised text given",
      _kit("TextVQA_VAL.tsv"),
      {"overall": _both(55.5)},
      "TextVQA_VAL.tsv",
      "short",
      "vqa",
    ),
    Recipe(
      "mmvet",
      "MM-Vet: free answers for a language model to grade; writes the file to hand in",
      _kit("MMVet.tsv"),
      {},
      "MMVet.tsv",
      "plain",
      "hand in",
      ("index", "question"),
      system=_THINK,
      max_tokens=2048,
    ),
    Recipe(
      "vqav2",
      "VQAv2: VQA score on val; on test-dev the file to hand in",
      "from visualqa.org, put v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and the "
      "COCO images val2014/ (for test-dev: v2_OpenEnded_mscoco_test-dev2015_questions.json and test2015/) into one "
      "folder and name it with --data",
      prompt="short",
      split="val",
    ),
    Recipe(
      "geneval",
      "GenEval: 553 prompts x 4 pictures, objects, counts, colors and places found by a detector",
      "put prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval into a folder and name it with --data",
      {
        "overall": _both(0.63, 0.70),
        "single_object": _both(0.97, 0.98),
        "two_object": _both(0.59, 0.73),
        "counting": _both(0.45, 0.54),
        "colors": _both(0.83, 0.83),
        "position": _both(0.53, 0.63),
        "color_attr": _both(0.42, 0.53),
      },
      pictures=4,
    ),
    Recipe(
      "dpg",
      "DPG-Bench: 1,065 long prompts x 4 pictures, questions answered by mPLUG",
      "put the folder dpg_bench/ of github.com/TencentQQGYLab/ELLA (prompts/*.txt, dpg_bench.csv) somewhere and name it "
      "with --data",
      {
        "overall": _both(80.09, 81.23),
        "global": _both(87.03, 91.20),
        "entity": _both(87.31, 88.83),
        "attribute": _both(87.39, 88.00),
        "relation": _both(89.79, 87.60),
        "other": _both(88.10, 89.53),
      },
      pictures=4,
    ),
    Recipe(
      "mjhq",
      "MJHQ-30K: Frechet distance to 30,000 pictures, similarity of picture and prompt",
      _MJHQ,
      {"FID": _both(9.51, 12.70)},
    ),
    Recipe(
      "mjhq10k",
      "MJHQ as in the paper's ablations: 10,000 prompts, guidance 7.5; figures of its final model F",
      _MJHQ,
      {"FID": {"256": 17.61}, "CLIP similarity": {"256": 26.40}},
      guidance=7.5,
      prompts=10_000,
    ),
  )
}
