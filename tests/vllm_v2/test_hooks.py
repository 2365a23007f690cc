"""Every vLLM name that this package relies on exists in the vLLM that these tests run with."""

import pytest
import vllm

from vllm_specedge.adapter import hooks


@pytest.mark.parametrize("part", hooks.PARTS)
def test_all_hooks_are_there(part: str) -> None:
    if part == hooks.EXTENSION and vllm.__version__.startswith("0.32."):
        pytest.skip("a worker extension is told that it begins from vLLM 0.33 on")
    assert hooks.problems(part) == []


def test_the_version_has_been_tried() -> None:
    assert hooks.version_problem() is None
