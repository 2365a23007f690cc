"""Draft models from the Hugging Face hub, downloaded once and kept in its cache."""

import re
from collections.abc import Callable
from pathlib import Path

from vllm_specedge.errors import UserError

PREFIX = "hf:"
"""`hf:OWNER/NAME/FILE.gguf` is one file of a repository."""
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_MODEL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.bin")
"""File patterns of weights. Only the first that a repository has is downloaded: many hold the same weights in both."""


def is_hub_name(draft: str) -> bool:
    """Whether the name is no local path but may be a repository, or `hf:` with a file of one."""
    if draft.startswith(PREFIX):
        return True
    return bool(_NAME.fullmatch(draft)) and not Path(draft).exists()


def fetch(draft: str, is_quiet: bool) -> Path:
    """The local path of a model directory or GGUF file, downloaded with a progress bar if necessary.

    Raises UserError, and ImportError without huggingface_hub.
    """
    from huggingface_hub import hf_hub_download, snapshot_download  # noqa: PLC0415 - an optional extra
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415
    from huggingface_hub.utils.tqdm import disable_progress_bars  # noqa: PLC0415

    if is_quiet:
        disable_progress_bars()
    owner, repo, file = [*draft.removeprefix(PREFIX).split("/", 2), "", ""][:3]
    if draft.startswith(PREFIX) and not file:
        raise UserError(f"'{draft}' names no file: write hf:OWNER/NAME/FILE.gguf.")
    try:
        return Path(hf_hub_download(f"{owner}/{repo}", file)) if file else _snapshot(snapshot_download, draft)
    except HFValidationError:
        raise UserError(f"'{draft}' is not a name on the hub: write OWNER/NAME.") from None
    except LocalEntryNotFoundError:
        text = f"'{draft}' is not on this machine and no model hub can be reached: name a local draft, or 'ngram'."
        raise UserError(text) from None
    except (OSError, ValueError) as error:  # the hub's own errors are OSErrors
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"'{draft}' cannot be fetched ({reason:.120}): name another draft, or 'ngram'.") from None


def _snapshot(download: Callable[..., str], name: str) -> Path:
    directory = Path()
    for weights in _WEIGHTS:
        directory = Path(download(name, allow_patterns=[*_MODEL_FILES, weights]))
        if any(directory.glob(weights)):
            break
    return directory


def model_name(directory: Path) -> str:
    """The common name of the model in a directory. Directories in the hub's cache are named by a commit."""
    if directory.parent.name == "snapshots":
        return directory.parent.parent.name.removeprefix("models--").replace("--", "/")
    return directory.name
