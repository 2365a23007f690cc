"""Prompts for servers, and arrival times of each chunk of each answer at the client."""

import asyncio
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import Any, NamedTuple

import httpx2 as httpx

from harness.replay import Recording

LIMIT_S = 600.0
DATA, DONE = "data: ", "[DONE]"

# -- prompts ---------------------------------------------------------------------------------------------------------

CHAT, SUMMARISE, CODE, REWRITE = KINDS = ("chat", "summarise", "code", "rewrite")
"""By how much of the answer is already in the question: next to nothing, some, most, nearly all."""
MIXED = "mixed"
"""All kinds in turn."""
QUESTIONS = (
    "Write a short story about an old lighthouse and a grey cat.",
    "Explain in detail to a ten-year-old why the sky is blue.",
    "How do I make a simple vegetable soup? Give me all the steps.",
    "Write an e-mail to my landlord: the heating has been broken since Monday.",
    "What is the difference between weather and climate? Give examples.",
    "Give me ten tips for a job interview and explain each of them.",
    "Describe the history of the bicycle, from its first days until now.",
    "Plan a weekend trip to the mountains for a family of four.",
)
"""Their answers are longer than --tokens, so that all tokens are text. The shipped draft was not trained on them."""
TEXTS = (
    "The ferry leaves the harbour at seven in the morning and needs four hours to the outer islands. Its captain, Ruth "
    "Hale, has made the crossing for eighteen years. In summer the boat carries hikers and bicycles; in winter it "
    "brings flour, post and diesel to the forty families who stay. When the swell is higher than three metres it "
    "waits in the lee of the cape, sometimes for a day, and the passengers play cards in the saloon.",
    "The library was moved to the old brewery in 1998. Its reading room lies under the copper vault, where it is cool "
    "even in August, and the children's books are in the former malt loft. A volunteer, Peter Lindqvist, repairs "
    "torn bindings every Thursday. Last year the library lent sixty thousand books, more than in any year before, "
    "and it now stays open until nine in the evening so that people can come after work.",
    "Bees find their way home by the position of the sun and by landmarks that they learn on their first flights. A "
    "forager that has found flowers tells the others by a dance: its direction says where to fly, its length says how "
    "far. On cloudy days they use the pattern of polarised light in the sky. A hive of forty thousand bees brings in "
    "up to a kilogram of nectar on a good day in June.",
    "The bridge over the gorge is built of larch, without a single nail. Each of its beams was drawn in full size on "
    "the floor of the workshop before it was cut. The carpenters assembled it once on a meadow, took it apart again, "
    "and carried the parts to the gorge on mules, because no road led there. It has stood for a hundred and ten "
    "years; only the planks of its deck were renewed, the last time in 2004.",
)
PROGRAMS = (
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n"
    "    return total / len(values)\n\n"
    "def variance(values):\n    middle = mean(values)\n    total = 0\n    for value in values:\n"
    "        total += (value - middle) ** 2\n    return total / len(values)\n",
    "class Account:\n    def __init__(self, owner):\n        self.owner = owner\n        self.balance = 0\n\n"
    "    def deposit(self, amount):\n        self.balance += amount\n\n    def withdraw(self, amount):\n"
    "        if amount > self.balance:\n            raise ValueError('not enough money')\n"
    "        self.balance -= amount\n",
    "def read_table(path):\n    rows = []\n    with open(path) as file:\n        for line in file:\n"
    "            fields = line.strip().split(',')\n            if len(fields) == 3:\n"
    "                rows.append({'name': fields[0], 'city': fields[1], 'age': int(fields[2])})\n    return rows\n",
    "def words(text):\n    counts = {}\n    for word in text.lower().split():\n"
    "        counts[word] = counts.get(word, 0) + 1\n    return counts\n\ndef most_common(text, number):\n"
    "    counts = words(text)\n    return sorted(counts, key=counts.get, reverse=True)[:number]\n",
)
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def question(kind: str, number: int) -> str:
    """The `number`-th question of a kind; all are different, so that none finds another's prefix in a cache."""
    text, program = TEXTS[number % len(TEXTS)], PROGRAMS[number % len(PROGRAMS)]
    asked = {
        CHAT: QUESTIONS[number % len(QUESTIONS)],
        SUMMARISE: f"Summarise this text in three sentences.\n\n{text}",
        CODE: f"Add type hints to this code and change nothing else.\n\n{program}",
        REWRITE: f"Copy this text, but write 'people' in place of 'they'.\n\n{text}",
    }[kind]
    return f"Task {number + 1}: {asked}"


def chat_prompt(question: str) -> str:
    """A prompt in SmolLM2's own chat template."""
    turns = (("system", SYSTEM), ("user", question))
    return "".join(f"<|im_start|>{who}\n{text}<|im_end|>\n" for who, text in turns) + "<|im_start|>assistant\n"


def prompts(kind: str, count: int, first: int = 0) -> Sequence[str]:
    """`count` prompts of a kind, starting with number `first`."""
    numbers = range(first, first + count)
    kinds = [KINDS[number % len(KINDS)] if kind == MIXED else kind for number in numbers]
    return [chat_prompt(question(each, number)) for each, number in zip(kinds, numbers, strict=True)]


# -- answers ---------------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """One event with tokens: its arrival time by the monotonic clock in seconds, and its number of tokens."""

    at_s: float
    num_tokens: int


class Gap(NamedTuple):
    """The time between two chunks of one answer, and the number of tokens of the second."""

    seconds: float
    num_tokens: int


@dataclass
class Answer:
    """One completion, as token ids: streamed, or whole in one chunk."""

    sent_s: float
    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    chunks: list[Chunk] = field(default_factory=list)

    def take(self, line: str, now_s: float) -> None:
        """Read one line of the response. Raises RuntimeError if the server reports an error."""
        text = line.removeprefix(DATA)
        if not text or text == DONE:
            return
        event = json.loads(text)
        if "error" in event:
            raise RuntimeError(f"the server reports {event['error']}")
        # In a completion they are in the choice, in a chat in the event.
        self.prompt = tuple(event.get("prompt_token_ids") or self.prompt)
        for choice in event["choices"]:
            self.prompt = tuple(choice.get("prompt_token_ids") or self.prompt)
            tokens = choice.get("token_ids") or ()
            if tokens:
                self.tokens += tuple(tokens)
                self.chunks.append(Chunk(now_s, len(tokens)))

    @property
    def first_token_s(self) -> float:
        """Seconds from the request to its first token."""
        return self.chunks[0].at_s - self.sent_s

    @property
    def recording(self) -> Recording:
        return Recording(self.prompt, self.tokens)

    def gaps(self) -> Iterator[Gap]:
        for before, after in pairwise(self.chunks):
            yield Gap(after.at_s - before.at_s, after.num_tokens)


async def ask_all(url: str, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Send all requests to an endpoint at once; returns when all answers are complete."""
    limits = httpx.Limits(max_connections=len(bodies), max_keepalive_connections=len(bodies))
    async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S, limits=limits) as client:
        return await asyncio.gather(*(_ask(client, url, body) for body in bodies))


async def ask_for(url: str, bodies: Sequence[Mapping[str, Any]], at_once: int, seconds: float) -> list[Answer]:
    """Cycle through the requests, `at_once` at a time, starting none after `seconds`. Returns all complete answers."""
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    left, until_s, answers = cycle(bodies), time.monotonic() + seconds, list[Answer]()

    async def ask_on(client: httpx.AsyncClient) -> None:
        while time.monotonic() < until_s:
            answers.append(await _ask(client, url, next(left)))

    async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S, limits=limits) as client:
        await asyncio.gather(*(ask_on(client) for _ in range(at_once)))
    return answers


async def _ask(client: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> Answer:
    answer = Answer(time.monotonic())
    async with client.stream("POST", url, json={**body, "return_token_ids": True}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{url} answers {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            answer.take(line, time.monotonic())
    return answer


def decoding(answers: Sequence[Answer]) -> tuple[int, float]:
    """Tokens and seconds of the time in which all decode: from the latest first token to the earliest last one."""
    start_s = max(answer.chunks[0].at_s for answer in answers)
    end_s = max(start_s, min(answer.chunks[-1].at_s for answer in answers))
    within = (chunk.num_tokens for answer in answers for chunk in answer.chunks if start_s < chunk.at_s <= end_s)
    return sum(within), end_s - start_s


def duration_s(answers: Sequence[Answer]) -> float:
    """Seconds from the first request to the last token of any answer."""
    return max(answer.chunks[-1].at_s for answer in answers) - min(answer.sent_s for answer in answers)
