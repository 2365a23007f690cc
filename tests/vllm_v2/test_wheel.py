"""Every name that this package relies on is in the vLLM for GPUs, which is read and not run."""

import pytest

from vllm_specedge.adapter import hooks

from .wheel import Wheel, downloaded, parameters

VERSION = "0.33.0"


@pytest.fixture(scope="module")
def wheel() -> Wheel:
    path = downloaded(VERSION)
    if path is None:
        pytest.skip(f"vLLM {VERSION} is not to be had here")
    return Wheel(path)


@pytest.mark.parametrize("part", hooks.PARTS)
def test_hooks_are_there_and_take_what_is_given(wheel: Wheel, part: str) -> None:
    for hook in hooks.PARTS[part].hooks:
        found = wheel.find(hook.path.removesuffix(".py_func"))  # numba's, of what it compiles
        assert found is not None, hook.path
        known = parameters(found[1])
        assert known is None or set(hook.parameters) <= known, hook.path


@pytest.mark.parametrize("part", hooks.PARTS)
def test_functions_still_mention_what_is_relied_on(wheel: Wheel, part: str) -> None:
    for path, name in hooks.PARTS[part].sources:
        found = wheel.find(path)
        assert found is not None, path
        assert name in found[0], f"{path}: {name}"


def test_what_is_not_there_is_not_found(wheel: Wheel) -> None:
    assert wheel.find("vllm.v1.request:Request.gone") is None
    assert wheel.find("vllm.v1.gone:Request") is None
