"""A chat in the terminal that shows what drafting does: which tokens were accepted drafts, and how fast they come.

A server sends a chunk a step. All tokens of a chunk but the last were drafts that the target accepted, this machine's
or those of the server's own lookup; the last is the target's own. (A client that reads slowly may get two steps in one
chunk: then one token too many counts as a draft.)
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx
from rich.console import Console
from rich.text import Text

from vllm_specedge.errors import UserError

DRAFTED, OWN = "green", "default"
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 120.0
HELP = "/alone: the server without this machine; /with: with it again; /again: the last question once more; /quit"

Message = Mapping[str, str]


@dataclass(frozen=True)
class Chunk:
    """What came at once: the texts of its tokens."""

    tokens: tuple[str, ...]


@dataclass
class Answer:
    """One answer, as it came. Times are seconds from the question on."""

    question: str
    is_helped: bool
    text: str = ""
    num_tokens: int = 0
    num_accepted: int = 0
    """Tokens that were drafts."""
    num_chunks: int = 0
    first_s: float = 0.0
    took_s: float = 0.0

    def take(self, chunk: Chunk, at_s: float) -> None:
        if not self.num_chunks:
            self.first_s = at_s
        self.took_s = at_s
        self.text += "".join(chunk.tokens)
        self.num_tokens += len(chunk.tokens)
        self.num_accepted += len(chunk.tokens) - 1
        self.num_chunks += 1

    @property
    def tokens_per_s(self) -> float:
        """After the first one; 0 for a shorter answer."""
        return (self.num_tokens - 1) / (self.took_s - self.first_s) if self.took_s > self.first_s else 0.0

    def __str__(self) -> str:
        part = self.num_accepted / self.num_tokens if self.num_tokens else 0.0
        how = "with" if self.is_helped else "without"
        return (
            f"{self.num_tokens} tokens {how} this machine, {part:.0%} of them accepted drafts; "
            f"{self.tokens_per_s:.1f} tokens/s, the first after {self.first_s:.2f} s"
        )


@dataclass
class Server:
    """An OpenAI endpoint that can be asked."""

    url: str
    api_key: str = ""
    model: str = ""
    """Empty: the first that it names."""
    max_tokens: int = 512
    temperature: float | None = None
    """None: as the server likes."""
    client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
        self.client = httpx.AsyncClient(base_url=self.url.rstrip("/") + "/", headers=headers, timeout=timeout)

    async def find_model(self) -> None:
        """Choose a model, if none was. Raises UserError."""
        try:
            answer = await self.client.get("models")
            answer.raise_for_status()
            self.model = self.model or answer.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise UserError(f"{self.url} does not answer as an OpenAI endpoint ({error}): see --server.") from None

    async def ask(self, messages: Sequence[Message], session: str) -> AsyncIterator[Chunk]:
        """The answer, chunk by chunk; drafted for by the edge of that session, if one is named. Raises UserError."""
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "max_tokens": self.max_tokens}
        body |= {"stream": True, "logprobs": True}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if session:
            body["vllm_xargs"] = {"specedge": session}
        try:
            async with self.client.stream("POST", "chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise UserError(f"The server answered {answer.status_code}: {_message(await answer.aread())}")
                async for line in answer.aiter_lines():
                    chunk = _chunk(line)
                    if chunk is not None:
                        yield chunk
        except httpx.HTTPError as error:
            raise UserError(f"The server at {self.url} is gone ({error or type(error).__name__}).") from None


def _message(body: bytes) -> str:
    """What an error says, in OpenAI's form or any other."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body.decode(errors="replace")[:500]


def _chunk(line: str) -> Chunk | None:
    """One line of the stream; None for those without tokens."""
    name, _, data = line.partition(":")
    if name != "data" or data.strip() in ("", "[DONE]"):
        return None
    choices = json.loads(data).get("choices") or [{}]
    tokens = (choices[0].get("logprobs") or {}).get("content") or []
    return Chunk(tuple(_text(token) for token in tokens)) if tokens else None


def _text(token: Mapping[str, Any]) -> str:
    """A token may be a part of a letter, which only its bytes say."""
    return bytes(token["bytes"]).decode(errors="replace") if token.get("bytes") else str(token["token"])


@dataclass
class Chat:
    """What was said, and how it went."""

    server: Server
    session: Callable[[], str]
    """The edge's at the moment; empty while it is not connected."""
    console: Console
    messages: list[Message] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    is_helped: bool = True

    async def run(self) -> None:
        """Until the end of the input, or /quit."""
        self.console.print(Text("accepted drafts", DRAFTED), Text("the target's own", OWN), sep=" | ")
        self.console.print(HELP, style="dim")
        while True:
            line = await read_line(self.console)
            if line is None or line.strip() == "/quit":
                return
            try:
                await self.say(line.strip())
            except UserError as error:  # one question's fault; the next may be answered
                self.console.print(str(error), style="red")

    async def say(self, line: str) -> None:
        """A question, or what changes how it is answered."""
        if line in ("/alone", "/with"):
            self.is_helped = line == "/with"
        elif line == "/again" and self.answers:
            del self.messages[-2:]
            await self._answer(self.answers[-1].question)
        elif line.startswith("/"):
            self.console.print(HELP, style="dim")
        elif line:
            await self._answer(line)

    async def _answer(self, question: str) -> None:
        session = self.session() if self.is_helped else ""
        asked = {"role": "user", "content": question}
        answer, started_s = Answer(question, bool(session)), time.monotonic()
        async for chunk in self.server.ask([*self.messages, asked], session):
            answer.take(chunk, time.monotonic() - started_s)
            for number, token in enumerate(chunk.tokens, 1):
                style = DRAFTED if number < len(chunk.tokens) else OWN
                self.console.print(Text(token, style), end="", soft_wrap=True)
        self.console.print()
        self.console.print(str(answer), style="dim")
        self.messages += [asked, {"role": "assistant", "content": answer.text}]
        self.answers.append(answer)
        self._compare(answer)

    def _compare(self, answer: Answer) -> None:
        """With the last answer of the other kind to the same question."""
        others = [each for each in self.answers if each.question == answer.question]
        other = next((each for each in reversed(others) if each.is_helped != answer.is_helped), None)
        if other is None or not other.tokens_per_s or not answer.tokens_per_s:
            return
        helped, alone = (answer, other) if answer.is_helped else (other, answer)
        ratio = helped.tokens_per_s / alone.tokens_per_s
        self.console.print(f"With this machine {ratio:.2f} times as fast as without.", style="dim")


async def read_line(console: Console) -> str | None:
    """A line of the terminal's; None at its end. In a thread that nothing waits for: Ctrl-C ends the chat at once."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str | None] = loop.create_future()

    def done(text: str | None) -> None:
        if not line.done():
            line.set_result(text)

    def read() -> None:
        try:
            text: str | None = console.input("> ")
        except EOFError:
            text = None
        loop.call_soon_threadsafe(done, text)

    threading.Thread(target=read, name="input", daemon=True).start()
    return await line


async def chat_beside(chat: Chat, questions: Sequence[str], drafting: "asyncio.Task[None]") -> None:
    """Answer these questions, or those that are typed, while an edge drafts. Raises UserError, also the edge's."""
    asking = asyncio.create_task(_ask_all(chat, questions))
    done, _ = await asyncio.wait({asking, drafting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (asking, drafting):
        task.cancel()
    await asyncio.gather(asking, drafting, return_exceptions=True)
    await chat.server.client.aclose()
    for task in done:
        task.result()


async def _ask_all(chat: Chat, questions: Sequence[str]) -> None:
    await chat.server.find_model()
    if not questions:
        await chat.run()
    for question in questions:
        chat.console.print(f"> {question}")
        await chat.say(question)
