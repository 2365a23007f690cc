"""These tests need Triton, which `make test-vllm-v2` provides; without it none is collected."""

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from .engines import alike, edge, model, plain  # noqa: F401 - fixtures


def pytest_report_header() -> list[str]:
    return [] if find_spec("triton") else ["tests/vllm_v2 needs Triton: make test-vllm-v2"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "vllm_v2" in item.path.parts:
            item.add_marker(pytest.mark.vllm)
