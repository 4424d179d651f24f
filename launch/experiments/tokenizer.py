"""Trains the tokenizer of the small configs on the words of the built-in world and some ordinary English.

  python launch/experiments/tokenizer.py configs/tokenizer

The result depends on this file and on those of jflow.world.source.CODE; retrain it when the world's wording changes,
and then the small models.
"""

import argparse
import pathlib
import sys
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from jflow.data import examples, tokenizer
from jflow.data.prompts import SYSTEM_PROMPT
from jflow.data.sequences import IMAGE_MARK
from jflow.world.source import WorldSource

VOCABULARY_SIZE = 1024
WORLD_RECORDS = 400  # per task

ENGLISH = """
The first thing you notice about the harbour in the morning is the light. It comes over the hills behind the
town and turns the water from grey to silver, and for a few minutes every boat looks new. The fishermen have
been awake for hours. They carry boxes across the wet stones, talk about the weather, and drink coffee from
small white cups. A dog sleeps under the table near the door of the only shop that is open.
When the train left the station, the children pressed their faces to the window and counted the houses until
there were none left. Then came fields, and then a long wood, and at last the mountains with snow on their
tops. Their mother read a book. Their father had fallen asleep with his hat over his eyes.
A photograph is a record of light that fell on a surface for a short time. The camera does not know what it
sees: it measures how bright each small part of the scene is, and in which colour. Everything else is the work
of the person who looks at the picture. You can ask what is in the foreground, what is in the background, what
stands on the left side and what on the right, how many people there are, and what they are doing.
Describe this image in detail. What is the main subject of the photograph? Where was this picture taken? What
is the person holding in her hand? Is there anything unusual about this image? How many cats are there in the
picture? What is the weather like? Which of the two images is brighter? Read the text on the sign. What does
the chart show? The image shows a woman in an orange space suit, standing in front of a flag and a model of
the space shuttle. A cup of coffee stands on a wooden table next to a small spoon. A close-up of a cat with
green eyes. A rocket stands on the launch pad before sunrise. An old stone temple with a red roof among tall
trees. A bright yellow flower against a dark background. A page from an old book with a large letter at the
beginning. Several coins lie in rows on a dark cloth. A man with a camera on a tripod stands in a field of
grass near the river. A motorcycle parked in a garage full of tools. To make bread you need flour, water, salt
and time. Mix the flour with the water and leave it alone for an hour. Then add the salt and fold the dough
over itself a few times. It should feel soft and a little sticky. Let it rest until it has doubled in size,
shape it without pressing out the air, and bake it in a very hot oven until the crust is dark brown. Do not
cut it while it is warm, however good it smells.
Water boils at one hundred degrees at the level of the sea, and at a lower temperature on a mountain, because
there the air presses on it less. That is why it takes longer to cook an egg on a high mountain: the water is
boiling, but it is not as hot. The same effect makes the sound of a kettle change just before it boils.
If a number can be divided by two without a remainder, it is even. If it cannot, it is odd. The sum of two
even numbers is even, and so is the sum of two odd numbers. The product of two odd numbers is odd. These rules
are easy to check and not much harder to prove.
She wrote the letter three times. The first time it was too long, the second time it was too short, and the
third time she wrote only what she wanted to say. Then she walked to the post office through the rain, and it
seemed to her that the whole street was looking at her. Nothing of the kind was true, of course. Everyone was
looking for a dry place. Most of the history of a city is written in its streets. The old ones are narrow and
never straight, since they follow the paths that people and animals took before there were any houses. The new
ones are wide, and meet at right angles, because someone drew them with a ruler. Where the two kinds meet,
there is often a square, a market, or a church. The museum is open from nine in the morning until five in the
afternoon, every day except Monday. Tickets can be bought at the entrance or online. Children under twelve do
not pay. Please do not touch the paintings, and do not use a flash. A program is a list of instructions that a
machine can follow. Each instruction is simple: add two numbers, compare them, store the result, go on with
another instruction. What makes programs powerful is that the machine follows millions of them in a second,
and never gets tired. What makes them difficult is that the machine does exactly what it was told, and not
what we meant.
Birds that live near the sea have to find fresh water, or to get rid of the salt in some other way. Many of
them have a gland above the eyes that takes the salt out of the blood. You can sometimes see the drops running
down their bills. My grandfather used to say that there are two kinds of people: those who read the
instructions and those who find them afterwards. He himself belonged to the second kind, and had a drawer full
of screws to show for it. There was one from the radio, two from the clock, and a large one whose origin
nobody could explain.
In the evening the wind changed. The clouds, which had been low and heavy all day, began to move to the east,
and behind them the sky was clear. We opened the windows. Somewhere down the road someone was playing the
piano, always the same few bars, with the same mistake, and always starting again from the beginning.
Paint a picture of a small house by a lake at sunset. A stunning portrait of a young princess in a red and
white dress. A watercolour of a mountain village in winter, with smoke rising from the chimneys. An astronaut
riding a horse on the moon, in the style of an old photograph. A bowl of fruit on a table by the window, oil
on canvas. A map of an island that does not exist. A tall robot watering plants in a glass house. Two birds on
a branch with pink flowers, ink on paper. You are a helpful language and vision assistant. You are able to
understand the visual content that the user provides, and assist the user with a variety of tasks using
natural language. Answer the question using a single word or phrase. Answer with the letter of the option that
is right. Please answer yes or no. I do not know the answer to this question. There is no such thing in the
image. Yes, there are three of them, two on the left and one in the middle.
"""


def corpus() -> Iterator[str]:
  """Yields the texts to train on."""
  yield from 2 * ENGLISH.strip().split("\n")  # twice: a pair that occurs once makes no token
  yield examples.CAPTION_PROMPT
  yield f"User: {SYSTEM_PROMPT}\n\nAssistant: "
  for task in ("understanding", "generation", "text"):
    source = WorldSource(task, WORLD_RECORDS, seed=0)
    for index in range(len(source)):
      record = source[index]
      yield record.text
      for turn in record.turns:
        yield f"{turn.role.title()}: {turn.text.replace(IMAGE_MARK, '')}\n\n"


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("directory", help="where tokenizer.json goes, configs/tokenizer for the small configs")
  arguments = parser.parse_args()
  trained = tokenizer.train(corpus(), VOCABULARY_SIZE)
  trained.save(arguments.directory)
  print(f"wrote {arguments.directory}: {trained.vocabulary_size} ids")
