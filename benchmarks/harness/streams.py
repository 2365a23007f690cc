"""Concurrent streaming completions from an OpenAI endpoint, and when each piece of each answer came to the client.

answers = asyncio.run(ask_all("http://127.0.0.1:8000", "smollm2", prompts, num_tokens=60))
"""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import httpx2 as httpx

LIMIT_S = 600.0
DATA, DONE = "data: ", "[DONE]"


class Chunk(NamedTuple):
    """One event with tokens: when it came, by the monotonic clock in seconds, and how many tokens it had."""

    at_s: float
    num_tokens: int


class Gap(NamedTuple):
    """The time between two chunks of one answer, and how many tokens the second one had."""

    seconds: float
    num_tokens: int


@dataclass
class Answer:
    """One streamed completion, as token ids."""

    sent_s: float
    prompt: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    chunks: list[Chunk] = field(default_factory=list)

    def take(self, line: str, now_s: float) -> None:
        """One line of the event stream. Raises RuntimeError for what the server reports as an error."""
        if not line.startswith(DATA) or line == DATA + DONE:
            return
        event = json.loads(line.removeprefix(DATA))
        if "error" in event:
            raise RuntimeError(f"the server says {event['error']}")
        for choice in event["choices"]:
            self.prompt = tuple(choice.get("prompt_token_ids") or self.prompt)
            tokens = choice.get("token_ids") or ()
            if tokens:
                self.tokens += tuple(tokens)
                self.chunks.append(Chunk(now_s, len(tokens)))

    @property
    def first_token_s(self) -> float:
        """From the request to its first token."""
        return self.chunks[0].at_s - self.sent_s

    def gaps(self) -> Iterator[Gap]:
        for before, after in pairwise(self.chunks):
            yield Gap(after.at_s - before.at_s, after.num_tokens)


async def ask_all(url: str, model: str, prompts: Sequence[str | Sequence[int]], num_tokens: int) -> list[Answer]:
    """Ask all prompts at once for `num_tokens` greedy tokens each; returns when all answers are complete."""
    limits = httpx.Limits(max_connections=len(prompts), max_keepalive_connections=len(prompts))
    async with httpx.AsyncClient(trust_env=False, timeout=LIMIT_S, limits=limits) as client:
        return await asyncio.gather(*(_ask(client, url, model, prompt, num_tokens) for prompt in prompts))


async def _ask(client: httpx.AsyncClient, url: str, model: str, prompt: str | Sequence[int], num_tokens: int) -> Answer:
    body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "return_token_ids": True}
    answer = Answer(time.monotonic())
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{url} answers {response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            answer.take(line, time.monotonic())
    return answer


def decoding(answers: Sequence[Answer]) -> tuple[int, float]:
    """While all decode, from the last first token to the first last one: the tokens that came, and the seconds."""
    start_s = max(answer.chunks[0].at_s for answer in answers)
    end_s = max(start_s, min(answer.chunks[-1].at_s for answer in answers))
    within = (chunk.num_tokens for answer in answers for chunk in answer.chunks if start_s < chunk.at_s <= end_s)
    return sum(within), end_s - start_s


def duration_s(answers: Sequence[Answer]) -> float:
    """From the first request sent to the last token of any."""
    return max(answer.chunks[-1].at_s for answer in answers) - min(answer.sent_s for answer in answers)
