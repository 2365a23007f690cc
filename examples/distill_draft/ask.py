"""Prompts written by models: by the target, continuing a chat at the user's turn, or by a larger, instructed model.

A chat model that is given the beginning of a chat up to the user's turn writes what users write: as varied as what it
was tuned on, and exactly the kind of question that it knows. A larger model adds what the target does not think of.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from prompts import TOPICS, split_bars

SHORTEST, LONGEST = 8, 1200
"""Length limits of a prompt, in characters."""

KINDS = split_bars("""questions about facts|requests to explain a concept|requests for step-by-step instructions|
requests for advice on a personal problem|requests for an e-mail or a letter|requests to write a story or a scene|
requests to write a poem or a song|requests for a list of ideas|requests for Python code|
questions about an error in a program, with the code|requests for code in JavaScript, SQL, C or Bash|
word problems in arithmetic|questions about algebra, geometry or probability|logic puzzles to solve|
requests to summarize a short text, with the text|requests to rewrite a sentence, with the sentence|
requests to correct the grammar of a sentence, with the sentence|requests to translate a sentence, with the sentence|
requests to classify or extract something from a short text, with the text|
requests to compare two things|requests for an opinion or a debate|small talk and greetings|
requests to play a role|requests for a plan or a schedule|requests for a table or JSON|
requests for a description of a product or a place|requests for names, titles or slogans|quiz questions|
requests to define a word and use it in a sentence|questions about health or food|questions about work and money|
questions about history and culture|questions about science and nature|questions about technology and computers|
requests for a dialogue|requests for a speech, a review or an article|questions that follow an earlier answer|
commands of a few words, without politeness|questions with a longer background told first""")

PERSONAS = split_bars("""a child of ten|a student|a teacher|a nurse|an engineer|a shop owner|a retired person|a parent|
a traveller|a programmer|a manager|a writer|a farmer|an artist|someone learning English|a scientist|a gardener|
someone in a hurry""")

STYLES = split_bars("""Plain and short|Polite and detailed|Casual, with a typing mistake or two|Formal|
One or two sentences each|Of very different lengths|In simple English|
With details such as names, numbers and places""")

LANGUAGES = ("English",) * 8 + ("Spanish", "French", "German", "Italian")

_NUMBERED = re.compile(r"^\s*\**\d+[.):]\**\s+", re.MULTILINE)


def instructions(seed: int) -> Iterator[str]:
    """An endless stream of instructions to a model to write six prompts."""
    rng = random.Random(seed)
    while True:
        first, second, third = rng.sample(TOPICS, 3)
        yield (
            f"Write six different messages that {rng.choice(PERSONAS)} could send to an AI assistant. All of them are "
            f"{rng.choice(KINDS)}. Topics: {first}, {second}, {third}, and others. {rng.choice(STYLES)}. "
            f"Language: {rng.choice(LANGUAGES)}. Number them 1 to 6. Write only the complete messages, no answers."
        )


def listed(text: str) -> list[str]:
    """The usable entries of a numbered list, without quotes or emphasis around them."""
    parts = [part.strip().strip('"“”*').strip() for part in _NUMBERED.split(text)[1:]]
    return [part for part in parts if usable(part)]


def usable(text: str) -> bool:
    """Whether a text can be a prompt: neither trivial nor a whole page, and without special or broken characters."""
    return SHORTEST <= len(text) <= LONGEST and "<|" not in text and "\ufffd" not in text
