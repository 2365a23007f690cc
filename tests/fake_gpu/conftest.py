"""These tests need what `make test-v2-wheel` installs: vLLM 0.33, Triton, and its server's imports."""

from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def missing() -> str:
    """What is missing here; empty if nothing."""
    lacking = [name for name in ("triton", "orjson") if find_spec(name) is None]
    vllm = find_spec("vllm")
    version = Path(vllm.origin).with_name("_version.py").read_text() if vllm and vllm.origin else ""
    return ", ".join(lacking if "'0.33." in version else [*lacking, "vLLM 0.33"])


MISSING = missing()


def pytest_report_header() -> list[str]:
    return [f"tests/fake_gpu is skipped without {MISSING}: make test-v2-wheel"] if MISSING else []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"{MISSING} cannot be had here: make test-v2-wheel"))
