"""A chat in the terminal that shows which tokens were accepted drafts, and the speed of the answer.

A server sends one chunk per step. All tokens of a chunk but the last are accepted drafts, from this machine or from the
server's own n-gram lookup; the last is the target's own. (A client that reads slowly may get two steps in one chunk;
one token too many then counts as a draft.) The text of the answer is what is shown and sent back in the next request.
Its colours come from the tokens, some of which never appear in the text.
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

from edge_client.client import EdgeClient
from edge_client.naming import NOBODY
from edge_client.ways import client_for, trusted
from vllm_specedge.errors import UserError

DRAFTED, OWN = "green", "default"
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 120.0
HELP = "/alone: the server without this machine; /with: with it again; /again: repeat the last question; /quit"

MAX_PENDING_BYTES = 4096
"""Bytes kept of tokens whose text has not arrived yet."""

Message = Mapping[str, str]


@dataclass(frozen=True)
class Chunk:
    """One chunk of the stream: its tokens as bytes, and the text added to the answer or to the reasoning before it."""

    tokens: tuple[bytes, ...]
    text: str = ""
    thought: str = ""


@dataclass
class Colours:
    """Which characters of an answer were drafts, found by matching its text with its tokens.

    A token may appear in no text (an end mark), in a later text (held back by the server), or be part of a character.
    """

    _bytes: bytes = b""
    """Bytes of the tokens since the last text that was found."""
    _is_draft: bytes = b""
    """For each of these bytes, 1 if it was a draft, else 0."""

    def add(self, tokens: Sequence[bytes]) -> None:
        """Add the tokens of one chunk: all but the last were drafts."""
        for number, token in enumerate(tokens, 1):
            self._bytes += token
            self._is_draft += bytes([number < len(tokens)]) * len(token)
        self._bytes, self._is_draft = self._bytes[-MAX_PENDING_BYTES:], self._is_draft[-MAX_PENDING_BYTES:]

    def of(self, text: str) -> list[tuple[str, bool]]:
        """The text in pieces, and whether each was a draft. Text that matches no token counts as not drafted."""
        at = self._bytes.find(text.encode())
        end = at + len(text.encode()) if at >= 0 else 0
        flags = self._is_draft[max(at, 0) : end]
        self._bytes, self._is_draft = self._bytes[end:], self._is_draft[end:]
        pieces: list[tuple[str, bool]] = []
        num_bytes = 0
        for letter in text:
            num_bytes += len(letter.encode())
            is_draft = bool(flags and flags[num_bytes - 1])
            before = pieces.pop()[0] if pieces and pieces[-1][1] == is_draft else ""
            pieces.append((before + letter, is_draft))
        return pieces


@dataclass
class Answer:
    """One answer as it arrived. Times are seconds since the question."""

    question: str
    is_helped: bool
    text: str = ""
    num_tokens: int = 0
    num_accepted: int = 0
    num_chunks: int = 0
    first_s: float = 0.0
    took_s: float = 0.0

    def take(self, chunk: Chunk, at_s: float) -> None:
        if not self.num_chunks:
            self.first_s = at_s
        self.took_s = at_s
        self.text += chunk.text
        self.num_tokens += len(chunk.tokens)
        self.num_accepted += max(0, len(chunk.tokens) - 1)
        self.num_chunks += 1

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second after the first token; 0 for a shorter answer."""
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
    """An OpenAI endpoint."""

    url: str
    api_key: str = ""
    model: str = ""
    """Empty: the first that it lists."""
    max_tokens: int = 512
    temperature: float | None = None
    """None: the server's default."""
    ca_file: str = ""
    has_proxy: bool = True
    client: httpx.AsyncClient = field(init=False)

    def __post_init__(self) -> None:
        """Raises UserError."""
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        timeout = httpx.Timeout(CONNECT_TIMEOUT_S, read=READ_TIMEOUT_S)
        context = trusted(self.ca_file, is_alone=False)
        url = self.url.rstrip("/") + "/"
        self.client = client_for(url, self.has_proxy, verify=context, headers=headers, timeout=timeout)

    async def find_model(self) -> None:
        """Choose a model if none was given. Raises UserError."""
        try:
            answer = await self.client.get("models")
            answer.raise_for_status()
            self.model = self.model or answer.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise UserError(f"{self.url} does not answer as an OpenAI endpoint ({error}): correct --server.") from None

    async def ask(self, messages: Sequence[Message], session: str) -> AsyncIterator[Chunk]:
        """The answer, chunk by chunk. The edge with that session drafts for it, or none does. Raises UserError."""
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), "max_tokens": self.max_tokens}
        body |= {"stream": True, "logprobs": True, "vllm_xargs": {"specedge": session or NOBODY}}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        try:
            async with self.client.stream("POST", "chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise UserError(f"The server answered {answer.status_code}: {_message(await answer.aread())}")
                async for line in answer.aiter_lines():
                    chunk = chunk_of(line)
                    if chunk is not None:
                        yield chunk
        except httpx.HTTPError as error:
            raise UserError(
                f"The server at {self.url} can no longer be reached ({error or type(error).__name__}): try again."
            ) from None


def _message(body: bytes) -> str:
    """The message of an error, in OpenAI's form or any other."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return body.decode(errors="replace")[:500]


def chunk_of(line: str) -> Chunk | None:
    """One line of the stream; None if it adds no tokens and no text. Raises UserError if it reports an error."""
    name, _, data = line.partition(":")
    if name != "data" or data.strip() in ("", "[DONE]"):
        return None
    try:
        said = json.loads(data)
        if said.get("error"):
            raise UserError(f"The server ended its answer: {_message(data.encode(errors='replace'))}")
        choice = (said.get("choices") or [{}])[0]
        delta = choice.get("delta") or {}
        tokens = tuple(_bytes(token) for token in (choice.get("logprobs") or {}).get("content") or [])
        thought = delta.get("reasoning") or delta.get("reasoning_content")
        chunk = Chunk(tokens, as_text(delta.get("content")), as_text(thought))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"The server does not answer as an OpenAI endpoint ({data:.100}): correct --server.") from None
    return chunk if chunk != Chunk(()) else None


def _bytes(token: Mapping[str, Any]) -> bytes:
    """A token's bytes. A token may be part of a character, which its text cannot represent."""
    return bytes(token["bytes"]) if token.get("bytes") else str(token["token"]).encode(errors="replace")


def as_text(said: object) -> str:
    """Text that can be written and sent. Lone surrogates, which JSON and terminals may hold, are replaced."""
    return str(said or "").encode(errors="replace").decode()


@dataclass
class Chat:
    server: Server
    session: Callable[[], str]
    """The edge's current session; empty while it is not connected."""
    console: Console
    messages: list[Message] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    is_helped: bool = True

    async def run(self) -> None:
        self.console.print(Text("accepted drafts", DRAFTED), Text("the target's own", OWN), sep=" | ")
        self.console.print(HELP, style="dim")
        while True:
            line = await read_line(self.console)
            if line is None or line.strip() == "/quit":
                return
            try:
                await self.say(line.strip())
            except UserError as error:  # only this question failed; the next may be answered
                self.console.print(str(error), style="red")

    async def say(self, line: str) -> None:
        line = as_text(line)
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
        colours = Colours()
        try:
            async for chunk in self.server.ask([*self.messages, asked], session):
                answer.take(chunk, time.monotonic() - started_s)
                self._show(chunk, colours)
        finally:
            self.console.print()
        self.console.print(str(answer), style="dim")
        self.messages += [asked, {"role": "assistant", "content": answer.text}]
        self.answers.append(answer)
        self._compare(answer)

    def _show(self, chunk: Chunk, colours: Colours) -> None:
        colours.add(chunk.tokens)
        for piece, is_draft in colours.of(chunk.thought):
            style = f"{DRAFTED if is_draft else OWN} dim"
            self.console.print(Text(piece, style), end="", soft_wrap=True)
        for piece, is_draft in colours.of(chunk.text):
            self.console.print(Text(piece, DRAFTED if is_draft else OWN), end="", soft_wrap=True)

    def _compare(self, answer: Answer) -> None:
        """Print the speedup over the last answer of the other kind (with or without this machine) to this question."""
        others = [each for each in self.answers if each.question == answer.question]
        other = next((each for each in reversed(others) if each.is_helped != answer.is_helped), None)
        if other is None or not other.tokens_per_s or not answer.tokens_per_s:
            return
        helped, alone = (answer, other) if answer.is_helped else (other, answer)
        ratio = helped.tokens_per_s / alone.tokens_per_s
        self.console.print(f"With this machine {ratio:.2f} times as fast as without.", style="dim")


async def read_line(console: Console) -> str | None:
    """A line from the terminal; None at its end. Read in a daemon thread, so that Ctrl-C ends the chat at once."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str | None] = loop.create_future()

    def done(text: str | None) -> None:
        if not line.done():
            line.set_result(text)

    def read() -> None:
        try:
            text: str | None = console.input("> ")
        except (EOFError, OSError, ValueError):  # ValueError: it is closed
            text = None
        loop.call_soon_threadsafe(done, text)

    threading.Thread(target=read, name="input", daemon=True).start()
    return await line


async def chat_beside(chat: Chat, questions: Sequence[str], client: EdgeClient, wait_s: float) -> None:
    """Answer these questions, or typed ones if none, while an edge drafts. Raises UserError, the edge's too."""
    connected = asyncio.Event()
    client.on_change = lambda: connected.set() if client.state == "connected" else None
    drafting = asyncio.create_task(client.run(wait_s))
    asking = asyncio.create_task(_ask_all(chat, questions, connected))
    done, _ = await asyncio.wait({asking, drafting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (asking, drafting):
        task.cancel()
    await asyncio.gather(asking, drafting, return_exceptions=True)
    await chat.server.client.aclose()
    for task in done:
        task.result()


async def _ask_all(chat: Chat, questions: Sequence[str], connected: asyncio.Event) -> None:
    await connected.wait()
    await chat.server.find_model()
    if not questions:
        await chat.run()
    for question in questions:
        chat.console.print(f"> {question}")
        await chat.say(question)
