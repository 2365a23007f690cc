"""Choice of a runtime: what is available, what is requested, and what is fastest."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from edge_client.drafters import Candidate, Drafter, DrafterOptions
from edge_client.drafters.choose import INT8, LLAMA_CPP, MLX, RUNTIMES, TRANSFORMERS, Runtime, fastest, load_drafter
from edge_client.drafters.hf import drafter as hf_drafter
from edge_client.drafters.hf import tokenizers
from edge_client.drafters.hf.trees import SlotDrafter
from edge_client.drafters.llama.drafter import LlamaDrafter
from edge_client.drafters.mlx.drafter import MlxDrafter
from edge_client.drafters.profile import MAX_REQUESTS, requests_at_once
from tests.helpers import ListSequence
from vllm_specedge.errors import UserError

from .test_hf_rollbacks import CONFIGS
from .test_llama_family import make
from .test_mlx_drafter import saved


class Machine:
    """Drafters with given pass times, by a simulated clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.said: list[str] = []

    def runtime(self, name: str, pass_s: float, row_s: float) -> Runtime:
        machine = self

        class Taking(ListSequence):
            def append(self, tokens: Sequence[int], width: int) -> list[Candidate]:
                machine.now_s += pass_s + row_s
                return super().append(tokens, width)

            def branch(self, tokens: Sequence[int], parents: Sequence[int], width: int) -> list[list[Candidate]]:
                machine.now_s += pass_s + len(tokens) * row_s
                return super().branch(tokens, parents, width)

        drafter = SimpleNamespace(description=name, max_width=8, max_context_tokens=99)
        drafter.open = lambda: Taking(lambda past: [Candidate(1, 0.5)])
        return Runtime(name, "here", lambda: drafter)

    def fastest(self, *there: Runtime) -> Drafter:
        return fastest(there, self.said.append, lambda: self.now_s)


def fail() -> Drafter:
    raise UserError("it has no room")


def test_the_fastest_is_chosen_and_it_is_said_why() -> None:
    machine = Machine()
    chosen = machine.fastest(machine.runtime(TRANSFORMERS, 0.02, 0.0), machine.runtime(INT8, 0.004, 0.001))
    assert chosen.description == INT8
    assert machine.said == [
        "transformers on here: 12.5 ms per draft token.",
        "int8 on here: 3.5 ms per draft token.",
        "Drafting on here, with the int8 runtime.",
    ]


def test_trees_count_beside_chains() -> None:
    """For example, llama.cpp's rows cost a pass each: what is faster for a chain need not be for a tree."""
    machine = Machine()
    chain, tree = machine.runtime(INT8, 0.0, 0.010), machine.runtime(MLX, 0.011, 0.0)
    assert machine.fastest(chain, tree).description == MLX


def test_what_fails_is_passed_over_while_there_is_another() -> None:
    machine = Machine()
    broken = Runtime(TRANSFORMERS, "cuda", fail)
    for there in ((broken, machine.runtime(INT8, 1, 1)), (machine.runtime(INT8, 1, 1), broken)):
        machine.said.clear()
        assert machine.fastest(*there).description == INT8
        assert "transformers cannot run it: it has no room" in machine.said
    with pytest.raises(UserError, match="no room"):
        machine.fastest(broken, broken)


def test_one_alone_is_not_timed() -> None:
    machine = Machine()
    machine.fastest(machine.runtime(INT8, 1, 1))
    assert machine.now_s == 0.0
    assert machine.said == ["Drafting on here, with the int8 runtime."]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tokenizers, "tokenizer_fingerprint", lambda name: ("f", 300))
    make("qwen2", tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("runtime", "kind"),
    [("auto", LlamaDrafter), (INT8, LlamaDrafter), (TRANSFORMERS, SlotDrafter), (MLX, MlxDrafter)],
)
def test_a_runtime_that_is_asked_for_is_taken(runtime: str, kind: type, model: str) -> None:
    said: list[str] = []
    assert isinstance(load_drafter(DrafterOptions(model, runtime=runtime), said.append), kind)
    assert said[0].startswith("Drafting on the CPU" if runtime == MLX else "Drafting on cpu (no CUDA and no MPS here)")


def test_beside_a_gpu_the_cpu_is_tried_too(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU of an old laptop may be slower than int8 on its CPU."""
    monkeypatch.setattr(hf_drafter, "devices_of_torch", lambda: ["cuda", "cpu"])
    said: list[str] = []
    assert isinstance(load_drafter(DrafterOptions(model), said.append), LlamaDrafter)
    assert said[0].startswith("transformers cannot run it: "), "there is no CUDA here after all"
    for options in (DrafterOptions(model, runtime=TRANSFORMERS), DrafterOptions(model, device="cuda")):
        with pytest.raises((RuntimeError, AssertionError)):
            load_drafter(options)


def test_what_does_not_run_a_model_is_said(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no runtime 'cuda': choose auto, llama\.cpp, int8, transformers, mlx"):
        load_drafter(DrafterOptions(model, runtime="cuda"))
    with pytest.raises(UserError, match=r"does not run in llama\.cpp, which takes GGUF files"):
        load_drafter(DrafterOptions(model, runtime=LLAMA_CPP))
    for runtime in set(RUNTIMES) - {LLAMA_CPP}:
        with pytest.raises(UserError, match=r"runs only in llama\.cpp"):
            load_drafter(DrafterOptions("a.gguf", runtime=runtime))
    other = tmp_path / "other"
    saved(CONFIGS["window"], other)
    with pytest.raises(UserError, match="does not run in int8 on this machine"):
        load_drafter(DrafterOptions(str(other), runtime=INT8))


@pytest.mark.parametrize(
    ("times", "is_sharing", "number"),
    [
        ({1: 0.019, 2: 0.021, 4: 0.025, 8: 0.034}, True, MAX_REQUESTS),
        ({1: 0.019, 2: 0.021, 4: 0.025, 8: 0.034}, False, 5),
        ({1: 0.0195, 8: 0.126}, True, 6),
        ({1: 0.086}, False, 1),
        ({1: 0.5}, False, 1),
        ({1: 0.0}, False, MAX_REQUESTS),
    ],
)
def test_an_edge_takes_as_many_requests_as_it_is_fast_enough_for(
    times: dict[int, float], is_sharing: bool, number: int
) -> None:
    assert requests_at_once(times, is_sharing) == number
