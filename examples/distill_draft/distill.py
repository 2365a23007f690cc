"""Making a draft for a target: let it write, keep what it thought, train a few of its layers to think likewise.

    distill.py generate TARGET WORK --tokens 500000     text of the target's own, with its states
    distill.py teach TARGET WORK ANSWERS                the same for text that it wrote earlier
    distill.py hold TARGET WORK                         answers to measure by, on topics never trained on
    distill.py train TARGET WORK                        hours of one core, or minutes of many; resumes where it stopped
    distill.py export TARGET WORK DRAFT                 the draft directory
    distill.py evaluate TARGET DRAFT WORK/heldout.jsonl
    distill.py assemble TARGET DRAFT OUT                an ordinary checkpoint, for vLLM's own draft_model

Every step may be stopped at any time and run again: it goes on from what is on disk.
"""

from __future__ import annotations

import gzip
import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import draft_files
import torch
import typer
from generate import Writer, Writing
from kept import choose_kept
from prompts import HELD_TOPICS, Chat, held_out_chats, training_chats, user
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from shards import loop_start, read_shard, read_shards, write_shard
from target import TargetRows
from teach import batches_by_length, common_prefix, teach_batch
from train import Agreement, Feed, Trainer, Training, held_out, measure
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from edge_client.drafters.llama import FastLlama, Format
from edge_client.drafters.llama_weights import Layer, read_config

app = typer.Typer(add_completion=False, help=__doc__, no_args_is_help=True, rich_markup_mode=None)
console = Console()

Threads = Annotated[int, typer.Option(help="Cores to use.")]
TargetDir = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="The target: a plain Llama checkpoint directory.")
]
WorkDir = Annotated[Path, typer.Argument(file_okay=False, help="Where data and training state live between steps.")]
DraftDir = Annotated[Path, typer.Argument(file_okay=False, help="The draft directory.")]

TRAINED = ("taught-*.safetensors", "made-*.safetensors")
MADE = "made-*.safetensors"
HELD = "held-*.safetensors"
SHARD_ANSWERS = 48
TEACH_BATCH = 12
LONGEST_PROMPT = 250


def _bar(unit: str) -> Progress:
    """A progress bar that says how much, how long so far and how long still."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, refresh_per_second=1)


def _render(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """A chat as the token ids that vLLM would serve it as."""
    encoded: Any = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Token ids as text, without the marks of the chat format."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _stops(target: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The token ids that end an answer."""
    path = target / "generation_config.json"
    ends = json.loads(path.read_text()).get("eos_token_id", []) if path.exists() else []
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}


def _shared_beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What every one-message chat begins with (the system prompt): found, not assumed."""
    chats = [_render(tokenizer, user(text)) for text in ("Why", "a list", "1 3 5")]
    return chats[0][: common_prefix(chats)]


def _passages(tokenizer: PreTrainedTokenizerBase, work: Path) -> list[tuple[str, str]]:
    """Questions and answers so far, as text, for prompts that need something to work on."""
    found = []
    for item in read_shards(sorted((work / "data").glob("taught-*.safetensors")) + sorted((work / "data").glob(MADE))):
        lines = _text(tokenizer, item.prompt).split("\nuser\n")
        if len(lines) == 2:
            answer = _text(tokenizer, item.answer)
            found.append((lines[1].removesuffix("\nassistant\n").strip(), answer))
    return found


def _prompts(
    tokenizer: PreTrainedTokenizerBase, chats: Iterator[Chat], beginning: Sequence[int]
) -> Iterator[list[int]]:
    """Chats as token ids, those left out that are long or begin differently."""
    for chat in chats:
        ids = _render(tokenizer, chat)
        if len(ids) <= LONGEST_PROMPT and ids[: len(beginning)] == list(beginning):
            yield ids


@app.command()
def generate(
    target: TargetDir,
    work: WorkDir,
    tokens: Annotated[
        int, typer.Option(help="Answer tokens to have in the end, those made earlier included.")
    ] = 500_000,
    rows: Annotated[int, typer.Option(help="Answers written side by side.")] = 112,
    threads: Threads = 1,
) -> None:
    """Let the target answer varied prompts, half greedily, half sampled, and store its states (170 tokens/s a core)."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    earlier = sorted((work / "data").glob(MADE))
    done = sum(len(item.answer) for path in earlier for item in read_shard(path))
    beginning = _shared_beginning(tokenizer)
    running = TargetRows(target, rows, LONGEST_PROMPT + Writing().most_tokens + 8)
    running.set_prefix(beginning)
    prompts = _prompts(tokenizer, training_chats(len(earlier), _passages(tokenizer, work)), beginning)
    writer = Writer(running, _stops(target, tokenizer), Writing(), seed=len(earlier))
    with _bar("answer tokens") as bar:
        task = bar.add_task("generate", total=tokens, completed=done)
        answers = writer.answers(prompts, lambda count: bar.advance(task, count))
        number = len(earlier)
        while done < tokens:
            items = list(islice(answers, SHARD_ANSWERS))
            write_shard(work / "data" / f"made-{number:05d}.safetensors", items)
            done += sum(len(item.answer) for item in items)
            number += 1


@app.command()
def teach(
    target: TargetDir,
    work: WorkDir,
    answers: Annotated[Path, typer.Argument(exists=True, help="JSON lines (.gz) of prompt_ids and answer_ids.")],
    threads: Threads = 1,
) -> None:
    """Store the target's states for answers it wrote earlier; those on held-out topics go to the held-out files."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    content = gzip.decompress(answers.read_bytes()) if answers.suffix == ".gz" else answers.read_bytes()
    lines = [json.loads(line) for line in content.splitlines()]
    unique = {(tuple(line["prompt_ids"]), tuple(line["answer_ids"])) for line in lines if len(line["answer_ids"]) >= 8}
    pairs = [(list(prompt), list(answer)) for prompt, answer in sorted(unique)]
    held_words = re.compile(r"\b(" + "|".join(HELD_TOPICS) + r")\b")
    held = [pair for pair in pairs if held_words.search(_text(tokenizer, pair[0]))]
    rest = [
        (prompt, answer[: loop_start(answer)])
        for prompt, answer in pairs
        if not held_words.search(_text(tokenizer, prompt))
    ]
    running = TargetRows(target, TEACH_BATCH, max(len(prompt) + len(answer) for prompt, answer in pairs))
    beginning = pairs[0][0][: common_prefix([prompt for prompt, _ in pairs])]
    running.set_prefix(beginning)
    with _bar("answer tokens") as bar:
        for name, part in (("held", held), ("taught", rest)):
            task = bar.add_task(f"teach {name}", total=sum(len(answer) for _, answer in part))
            batches = batches_by_length(part, TEACH_BATCH)
            for at in range(0, len(batches), 4):
                group = batches[at : at + 4]
                path = work / "data" / f"{name}-{at // 4:05d}.safetensors"
                if not path.exists():
                    write_shard(path, [item for batch in group for item in teach_batch(running, batch)])
                bar.advance(task, sum(len(answer) for batch in group for _, answer in batch))


@app.command()
def hold(
    target: TargetDir, work: WorkDir, count: Annotated[int, typer.Option(help="Prompts.")] = 72, threads: Threads = 1
) -> None:
    """Write the target's greedy answers to held-out prompts: unseen topics, half of them in unseen templates."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    prompts = [_render(tokenizer, chat) for chat in held_out_chats(0, count)]
    writing = Writing(greedy_share=1.0, stop_loops=False)
    running = TargetRows(target, min(count, 36), max(map(len, prompts)) + writing.most_tokens)
    running.set_prefix(_shared_beginning(tokenizer))
    writer = Writer(running, _stops(target, tokenizer), writing, seed=0)
    with _bar("tokens") as bar:
        task = bar.add_task("hold", total=count * writing.most_tokens)
        items = list(writer.answers(iter(prompts), lambda step: bar.advance(task, step)))
    write_shard(work / "data" / "held-chats.safetensors", items)
    lines = [
        json.dumps({"prompt_ids": item.prompt, "answer_ids": item.answer}, separators=(",", ":")) for item in items
    ]
    (work / "heldout.jsonl").write_text("\n".join(lines) + "\n")
    console.print(f"{count} held-out prompts, {sum(len(item.answer) for item in items)} greedy answer tokens")


def _kept(target: Path, work: Path, rows: int, stops: set[int]) -> torch.Tensor:
    """The head's kept ids: chosen once, when training first starts, and then fixed."""
    path = work / "kept.pt"
    if not path.exists():
        items = [item for pattern in TRAINED for item in read_shards(sorted((work / "data").glob(pattern)))]
        head = TargetRows(target, 1, 8).model.head
        torch.save(choose_kept(items, head, rows, sorted(stops)), path)
    kept: torch.Tensor = torch.load(path, weights_only=True)
    return kept


@app.command()
def train(
    target: TargetDir,
    work: WorkDir,
    layers: Annotated[str, typer.Option(help="The target's layers to start from.")] = "0,1,2,28,29",
    tokens: Annotated[int, typer.Option(help="Answer tokens to train on, repeats counted.")] = 1_500_000,
    head_rows: Annotated[int, typer.Option(help="Rows of the target's head to keep.")] = 8192,
    batch: Annotated[int, typer.Option(help="Answers a step.")] = 6,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 1.5e-3,
    threads: Threads = 1,
) -> None:
    """Train the draft (430 tokens/s on a core, 5 layers of width 576); run it again to go on, or with more tokens."""
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(target)
    kept = _kept(target, work, head_rows, _stops(target, tokenizer))
    feed = Feed(work / "data", TRAINED, batch)
    chosen = [int(layer) for layer in layers.split(",")]
    trainer = Trainer(target, chosen, kept, feed, Training(tokens=tokens, batch=batch, rate=rate), work / "state.pt")
    held = held_out(work / "data", limit=40)
    with _bar("tokens") as bar:
        task = bar.add_task("train", total=tokens, completed=trainer.seen)

        def progress(now: Trainer) -> None:
            bar.update(task, completed=min(now.seen, tokens), description=f"train, loss {now.loss:.2f}")

        def report(now: Trainer, agreed: Agreement) -> None:
            bar.console.print(
                f"{now.seen:>9} tokens: agreement {agreed.greedy:.3f} in greedy answers, {agreed.overall:.3f} in all"
            )

        trainer.run(held, progress, report)
    final = measure(trainer.draft, trainer.head, kept, held_out(work / "data"))
    console.print(
        f"agreement on all {final.tokens} held-out tokens: greedy {final.greedy:.3f}, overall {final.overall:.3f}"
    )


@app.command()
def export(target: TargetDir, work: WorkDir, draft: DraftDir) -> None:
    """Write the trained draft as a directory small enough for a repository, measured as it will be run."""
    saved = torch.load(work / "state.pt", weights_only=True)
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
    answers: Annotated[Path, typer.Argument(exists=True, help="heldout.jsonl, from `hold`.")],
    number_format: Annotated[str, typer.Option(help="float32 or int8.")] = "int8",
    record: Annotated[bool, typer.Option(help="Write the result into the draft's metrics.json.")] = False,
    threads: Threads = 1,
) -> None:
    """Measure agreement and time as the edge will see them: the CPU runtime, one token a pass, greedy answers."""
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
        "agreement_greedy": round(right / total, 4),
        "agreement_median_answer": round(statistics.median(shares), 4),
        "ms_per_token": round(1000 * statistics.median(times), 2),
    }
    console.print_json(json.dumps({number_format: result}))
    if record:
        path = draft / "metrics.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {f"heldout_{number_format}": result}, indent=1) + "\n")


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
