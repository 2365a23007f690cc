"""Make a draft for a target: let it write, store its hidden states, train a few of its layers to reproduce them.

    distill.py ask TARGET WORK                  prompts that the target itself writes (or a larger model: --writer)
    distill.py answer TARGET WORK               the target's answers to them, and to templates
    distill.py teach TARGET WORK [ANSWERS]      its states for these answers, and for others that it wrote earlier
    distill.py hold TARGET WORK                 answers to measure agreement on, of topics and kinds never trained on
    distill.py train TARGET WORK                resumes where it stopped; picks up what `teach` adds meanwhile
    distill.py export TARGET WORK DRAFT         the draft directory
    distill.py evaluate TARGET DRAFT WORK/ordinary.jsonl
    distill.py assemble TARGET DRAFT OUT        an ordinary checkpoint, for vLLM's own draft_model

Every step may be stopped at any time and run again: it resumes from what is on disk.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, repeat
from pathlib import Path
from typing import Annotated, Any

import draft_files
import torch
import typer
from ask import instructions, listed, usable
from draft_model import Draft
from prompts import HELD_QUESTIONS, Chat, held_out_chats, is_held, training_chats, user
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from shards import Pair, loop_start, read_shards, write_shard
from teach import batches_by_length, choose_kept, common_prefix, teach_batch
from train import Feed, Trainer, Training
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from write import Asked, Writer, Written

from edge_client.drafters.llama.drafter import FastLlama, Format
from edge_client.drafters.llama.weights import Layer, load_llama, read_config

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True, rich_markup_mode=None)
console = Console()

Threads = Annotated[int, typer.Option(help="Cores to use.")]
TargetDir = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="The target: a plain Llama checkpoint directory.")
]
WorkDir = Annotated[Path, typer.Argument(file_okay=False, help="Directory for data and training state between steps.")]
DraftDir = Annotated[Path, typer.Argument(file_okay=False, help="The draft directory.")]

Rows = Annotated[int, typer.Option(help="Texts written in one batch.")]
Part = Annotated[int, typer.Option(help="A distinct number for each process that runs this step in parallel.")]
Name = Annotated[str, typer.Option(help="Name of the training state's file: one for each variant.")]

TRAINED = "taught-*.safetensors"
PROMPTS_A_FILE = 200
ANSWERS_A_FILE = 128
PASSAGE_FILES = 40
WRITTEN_SHARE = 0.75
GREEDY, WARM = 0.5, 0.25
"""Shares of the answers that are written greedily, and at temperature 1."""
LONGEST_PROMPT = 320
MOST_TOKENS = 320
POSITIONS = 1024
SHORTEST_ANSWER = 8
TEACH_BATCH = 16
BATCHES_A_FILE = 8


def _bar(unit: str) -> Progress:
    """A progress bar with the amount done, the elapsed and the remaining time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=1)


def _render(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """A chat as token ids, as vLLM renders it."""
    encoded: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Token ids as text, without the chat format's special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _stops(target: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    path = target / "generation_config.json"
    ends = json.loads(path.read_text()).get("eos_token_id", []) if path.exists() else []
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}


def _write_lines(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write JSON lines to a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    aside.write_text("".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines))
    aside.rename(path)


def _read_lines(paths: Iterable[Path]) -> list[dict[str, Any]]:
    contents = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in paths]
    return [json.loads(line) for content in contents for line in content.splitlines()]


def _user_texts(found: Iterator[Written], tokenizer: PreTrainedTokenizerBase, told: bool) -> Iterator[str]:
    """The prompts that a model wrote: one per answer, or the entries of a list if it was told to write six."""
    for written in found:
        text = _text(tokenizer, written.answer).strip()
        for prompt in listed(text) if told else [text]:
            if usable(prompt) and not is_held(prompt):
                yield prompt


@app.command()
def ask(
    target: TargetDir,
    work: WorkDir,
    writer: Annotated[Path | None, typer.Option(help="A larger chat model that writes; by default the target.")] = None,
    count: Annotated[int, typer.Option(help="Total number of prompts, including those written earlier.")] = 6000,
    rows: Rows = 128,
    part: Part = 0,
    threads: Threads = 1,
) -> None:
    """Let models write what users might ask, except prompts of held-out kinds and topics."""
    torch.set_num_threads(threads)
    model = writer or target
    tokenizer = AutoTokenizer.from_pretrained(model)
    name = f"{'told' if writer else 'own'}-{part}"
    earlier = sorted((work / "prompts").glob(f"{name}-*.jsonl"))
    done, number = len(_read_lines(earlier)), len(earlier)
    if writer:
        asked = (Asked(_render(tokenizer, user(text)), 0.9, 400) for text in instructions(1000 * part + number))
    else:
        asked = repeat(Asked(_users_turn(tokenizer), 1.0, 120))
    found = Writer(model, rows, 1024, stops=_stops(model, tokenizer)).answers(asked)
    prompts = _user_texts(found, tokenizer, told=writer is not None)
    with _bar("prompts") as bar:
        task = bar.add_task(f"ask {name}", total=count, completed=done)
        while done < count:
            texts = list(dict.fromkeys(islice(prompts, min(PROMPTS_A_FILE, count - done))))
            _write_lines(work / "prompts" / f"{name}-{number:04d}.jsonl", [{"user": text} for text in texts])
            done, number = done + len(texts), number + 1
            bar.update(task, completed=done)


def _users_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning of a chat up to the user's text: the common prefix of all one-message chats."""
    chats = [_render(tokenizer, user(text)) for text in ("Why", "a list", "1 3 5")]
    return chats[0][: common_prefix(chats)]


def _chats(work: Path, seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[Chat]:
    """Chats for the target to answer: prompts by models, templates, and prompts about its own earlier answers."""
    rng = random.Random(seed)
    texts = list(dict.fromkeys(line["user"] for line in _read_lines(sorted((work / "prompts").glob("*.jsonl")))))
    rng.shuffle(texts)
    answered = _read_lines(sorted((work / "answers").glob("*.jsonl"))[-PASSAGE_FILES:])
    passages = [(line["user"], _text(tokenizer, line["answer_ids"])) for line in answered if line["user"]]
    written, made = cycle(texts), training_chats(seed, passages)
    while True:
        chat = user(next(written)) if texts and rng.random() < WRITTEN_SHARE else next(made)
        if not is_held(chat[-1]["content"]):
            yield chat


@app.command()
def answer(
    target: TargetDir,
    work: WorkDir,
    tokens: Annotated[
        int, typer.Option(help="Total number of answer tokens, including those of this part written earlier.")
    ] = 1_000_000,
    rows: Rows = 128,
    part: Part = 0,
    threads: Threads = 1,
) -> None:
    """Let the target answer: greedily, at its default temperature of 1, and at temperatures in between."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    earlier = sorted((work / "answers").glob(f"answers-{part}-*.jsonl"))
    done, number = sum(len(line["answer_ids"]) for line in _read_lines(earlier)), len(earlier)
    seed = 1000 * part + number
    rng = random.Random(seed)
    users: dict[tuple[int, ...], str] = {}

    def asked() -> Iterator[Asked]:
        for chat in _chats(work, seed, tokenizer):
            ids = _render(tokenizer, chat)
            if len(ids) <= LONGEST_PROMPT:
                users[tuple(ids)] = chat[0]["content"] if len(chat) == 1 else ""
                dice = rng.random()
                heat = 0.0 if dice < GREEDY else 1.0 if dice < GREEDY + WARM else round(rng.uniform(0.3, 0.9), 2)
                yield Asked(ids, heat, MOST_TOKENS)

    found = Writer(target, rows, LONGEST_PROMPT + MOST_TOKENS, stops=_stops(target, tokenizer)).answers(asked())
    with _bar("answer tokens") as bar:
        task = bar.add_task(f"answer {part}", total=tokens, completed=done)
        while done < tokens:
            lines: list[dict[str, Any]] = []
            while done < tokens and len(lines) < ANSWERS_A_FILE:
                one = next(found)
                ids, heat = one.asked.prompt, one.asked.temperature
                asked_as = users.pop(tuple(ids), "")
                lines.append({"prompt_ids": ids, "answer_ids": one.answer, "temperature": heat, "user": asked_as})
                done += len(one.answer)
                bar.update(task, completed=done)
            _write_lines(work / "answers" / f"answers-{part}-{number:04d}.jsonl", lines)
            number += 1


@app.command()
def teach(
    target: TargetDir,
    work: WorkDir,
    answers: Annotated[
        list[Path] | None, typer.Argument(exists=True, help="More JSON lines (.gz) of prompt_ids and answer_ids.")
    ] = None,
    threads: Threads = 1,
) -> None:
    """Store the target's states for its answers (2,000 tokens/s), except those on held-out topics and kinds."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    sources = [*(answers or []), *sorted((work / "answers").glob("*.jsonl"))]
    model = Draft(target, list(range(read_config(target)["num_hidden_layers"])), POSITIONS)  # the target, whole
    with _bar("answers") as bar:
        for source in bar.track(sources, description="teach"):
            batches = batches_by_length(_pairs(tokenizer, source), TEACH_BATCH)
            for at in range(0, len(batches), BATCHES_A_FILE):
                path = work / "data" / f"taught-{source.name.partition('.')[0]}-{at:04d}.safetensors"
                if not path.exists():
                    group = batches[at : at + BATCHES_A_FILE]
                    write_shard(path, [item for batch in group for item in teach_batch(model, batch)])


def _pairs(tokenizer: PreTrainedTokenizerBase, source: Path) -> list[Pair]:
    """The distinct answers of a file, each cut where it begins to loop, except those on held-out topics and kinds."""
    lines = _read_lines([source])
    unique = {(tuple(line["prompt_ids"]), tuple(line["answer_ids"])) for line in lines}
    return [
        Pair(list(prompt), list(said[: loop_start(said)]))
        for prompt, said in sorted(unique)
        if len(said) >= SHORTEST_ANSWER and not is_held(_text(tokenizer, prompt).split("\nuser\n", 1)[-1])
    ]


@app.command()
def hold(
    target: TargetDir,
    work: WorkDir,
    count: Annotated[int, typer.Option(help="Prompts of held-out topics.")] = 72,
    threads: Threads = 1,
) -> None:
    """Write the answers that agreement is measured on, in float32: greedy and sampled, to held-out questions."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    stops = _stops(target, tokenizer)
    writer = Writer(target, 32, LONGEST_PROMPT + MOST_TOKENS, dtype="float32", stops=stops)
    ordinary = [user(text) for text in HELD_QUESTIONS[:count]]
    for name, chats, heat, most in (
        ("ordinary", ordinary, 0.0, 160),
        ("ordinary-sampled", ordinary, 1.0, 160),
        ("heldout", held_out_chats(0, count), 0.0, 256),
    ):
        if (work / f"{name}.jsonl").exists():
            continue
        asked = [Asked(_render(tokenizer, chat), heat, most) for chat in chats]
        lines = [
            {"prompt_ids": one.asked.prompt, "answer_ids": one.answer}
            for one in writer.answers(iter(asked), stop_loops=False)
        ]
        _write_lines(work / f"{name}.jsonl", lines)
        console.print(f"{name}: {len(lines)} answers, {sum(len(line['answer_ids']) for line in lines)} tokens")


def _held(work: Path) -> dict[str, list[Pair]]:
    paths = [work / f"{name}.jsonl" for name in ("ordinary", "ordinary-sampled", "heldout")]
    return {
        path.stem: [Pair(line["prompt_ids"], line["answer_ids"]) for line in _read_lines([path])]
        for path in paths
        if path.exists()
    }


def _kept(target: Path, work: Path, rows: int, stops: set[int]) -> torch.Tensor:
    """The head's kept ids, chosen once when training first starts."""
    path = work / f"kept-{rows}.pt"
    if not path.exists():
        items = read_shards(sorted((work / "data").glob(TRAINED)))
        torch.save(choose_kept(items, load_llama(target, keep=[]).head, rows, sorted(stops)), path)
    kept: torch.Tensor = torch.load(path, weights_only=True)
    return kept


@app.command()
def train(
    target: TargetDir,
    work: WorkDir,
    layers: Annotated[str, typer.Option(help="The target's layers to start from.")] = "0,1,2,28,29",
    start: Annotated[Path | None, typer.Option(help="A draft directory to start from instead.")] = None,
    tokens: Annotated[int, typer.Option(help="Answer tokens to train on, including repeats.")] = 1_500_000,
    head_rows: Annotated[int, typer.Option(help="Rows of the target's head to keep.")] = 12_288,
    batch: Annotated[int, typer.Option(help="Answers per step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    name: Name = "state",
    threads: Threads = 1,
) -> None:
    """Train the draft; run it again to continue, or to train on more tokens."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    kept = _kept(target, work, head_rows, _stops(target, tokenizer))
    feed = Feed(work / "data", TRAINED, batch)
    chosen = [int(layer) for layer in layers.split(",")]
    draft = Draft(target, chosen, POSITIONS)
    if start:
        draft.put(*draft_files.load_blocks(start))
    trainer = Trainer(draft, chosen, kept, feed, Training(tokens=tokens, rate=rate), work / f"{name}.pt")
    held = _held(work)
    with _bar("tokens") as bar:
        task = bar.add_task("train", total=tokens, completed=trainer.seen)

        def progress(now: Trainer) -> None:
            bar.update(task, completed=min(now.seen, tokens), description=f"train, loss {now.loss:.2f}")

        def report(now: Trainer) -> None:
            agreed = ", ".join(f"{part} {now.agreement(pairs):.3f}" for part, pairs in held.items())
            bar.console.print(f"{now.seen:>9} tokens, {now.seconds:.0f} s, loss {now.loss:.3f}: agreement {agreed}")

        if trainer.step == 0:
            report(trainer)
        trainer.run(progress, report)
        report(trainer)


@app.command()
def export(target: TargetDir, work: WorkDir, draft: DraftDir, name: Name = "state") -> None:
    """Write the trained draft as a directory small enough for a repository."""
    saved = torch.load(work / f"{name}.pt", weights_only=True)
    weights = saved["draft"]
    layers = []
    for index in range(len(saved["layers"])):
        names = (*draft_files.MATRICES, "norm_in", "norm_mid")
        layers.append(Layer(**{name: weights[f"blocks.{index}.{name}"] for name in names}))
    draft_files.save_draft(draft, layers, weights["norm"], saved["kept"].tolist(), read_config(target))
    metrics = {
        "layers_from": saved["layers"],
        "tokens_trained": saved["seen"],
        "distinct_tokens": saved["distinct"],
        "training_cpu_seconds": round(saved["seconds"]),
        "steps": saved["step"],
    }
    (draft / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    size = sum(path.stat().st_size for path in draft.iterdir())
    console.print(f"{draft}: {size / 1e6:.1f} MB")


@app.command()
def evaluate(
    target: TargetDir,
    draft: DraftDir,
    answers: Annotated[Path, typer.Argument(exists=True, help="A file from `hold`.")],
    number_format: Annotated[str, typer.Option(help="float32 or int8.")] = "int8",
    record: Annotated[bool, typer.Option(help="Write the result into the draft's metrics.json.")] = False,
    threads: Threads = 1,
) -> None:
    """Measure agreement and time as on the edge: with the CPU runtime, one token per pass."""
    torch.set_num_threads(threads)
    chosen: Format = "float32" if number_format == "float32" else "int8"
    blocks, kept = draft_files.load_draft(draft, target)
    model = FastLlama(blocks, chosen, kept)
    right, total, shares, times = 0, 0, [], []
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    with _bar("answers") as bar:
        for line in bar.track(lines, description="evaluate"):
            sequence = model.open()
            said = sequence.append(line["prompt_ids"], 1)
            for token in line["answer_ids"][:-1]:
                began = time.perf_counter()
                said += sequence.append([token], 1)
                times.append(time.perf_counter() - began)
            hits = sum(ours.token == theirs for ours, theirs in zip(said, line["answer_ids"], strict=True))
            right, total = right + hits, total + len(said)
            shares.append(hits / len(said))
    result = {
        "prompts": len(lines),
        "answer_tokens": total,
        "agreement": round(right / total, 4),
        "agreement_median_answer": round(statistics.median(shares), 4),
        "ms_per_token": round(1000 * statistics.median(times), 2),
    }
    console.print_json(json.dumps({number_format: result}))
    if record:
        path = draft / "metrics.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {f"{answers.stem}_{number_format}": result}, indent=1) + "\n")


@app.command()
def assemble(
    target: TargetDir,
    draft: DraftDir,
    out: Annotated[Path, typer.Argument(help="The checkpoint directory to write.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
) -> None:
    """Join a draft with its target's embedding and full head into an ordinary Llama checkpoint."""
    draft_files.assemble(draft, target, out, getattr(torch, dtype))
    console.print(f"{out} is a checkpoint that transformers and vLLM load")


if __name__ == "__main__":
    app()
