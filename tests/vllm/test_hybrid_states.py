"""States of linear attention in vLLM's worker: where a step resumes after any number of drafts and skipped steps."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

from vllm_specedge.adapter import hybrids
from vllm_specedge.adapter.worker import cpu_states, held_states
from vllm_specedge.errors import UserError

K, WIDTH, DIM = 5, 4, 32


# -- the convolution -----------------------------------------------------------------------------------------------


class Layer:
    """A delta net's convolution, as in vLLM's CPU code."""

    activation = "silu"

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.weight = torch.randn(DIM, WIDTH)
        self.conv1d = SimpleNamespace(weight=self.weight, bias=None, _cpu_unpacked_conv_weight=self.weight)
        self.A_log = self.dt_bias = None

    def rearrange_mixed_qkv(self, convolved: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return convolved[None], convolved[None], convolved[None]


def run_steps(spec_forward: Any, seed: int, num_drafts: Any) -> bool:
    """Whether each step's convolution equals that over each request's whole text."""
    chance, layer, num_rows = random.Random(seed), Layer(), 3
    buffer = torch.zeros(num_rows + 2, WIDTH - 1 + K, DIM).transpose(1, 2)
    slots = torch.tensor([[4] * (K + 1), [1] * (K + 1), [2] * (K + 1)], dtype=torch.int32)
    texts = [torch.zeros(WIDTH - 1, DIM) for _ in range(num_rows)]
    accepted = [1] * num_rows
    for _ in range(12):
        lengths = [1 + num_drafts(chance) for _ in range(num_rows)]
        new = [torch.randn(length, DIM) for length in lengths]
        metadata = SimpleNamespace(
            num_spec_decodes=num_rows,
            spec_state_indices_tensor=slots,
            spec_query_start_loc=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            num_accepted_tokens=torch.tensor(accepted),
        )
        try:
            got = spec_forward(layer, metadata, torch.cat(new), None, None, buffer, None, WIDTH, WIDTH - 1 + K)
        except RuntimeError:
            return False
        wanted = [
            functional.silu(
                functional.conv1d(
                    torch.cat([text, own])[-len(own) - WIDTH + 1 :].T[None], layer.weight[:, None], groups=DIM
                )
            )[0].T
            for text, own in zip(texts, new, strict=True)
        ]
        if not torch.allclose(got, torch.cat(wanted), atol=1e-4):
            return False
        accepted = [1 + chance.randint(0, length - 1) for length in lengths]
        texts = [torch.cat([text, own[:number]]) for text, own, number in zip(texts, new, accepted, strict=True)]
    return True


@pytest.fixture
def convolution_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recurrence returns its input; the weights are laid out as without matrix extensions."""
    monkeypatch.setattr(gdn_attention.ops, "fused_sigmoid_gating_delta_rule_update_spec_cpu", lambda q, **_: q)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.usefixtures("convolution_alone")
@pytest.mark.parametrize("seed", range(20))
def test_a_window_ends_with_the_last_accepted_token_whatever_was_drafted(seed: int) -> None:
    assert run_steps(cpu_states.spec_forward, seed, lambda chance: chance.randint(0, K))
    assert run_steps(cpu_states.spec_forward, seed, lambda chance: 0)


@pytest.mark.usefixtures("convolution_alone")
def test_vllm_s_own_is_right_with_all_drafts_only_or_is_not_replaced() -> None:
    own, is_replaced = gdn_attention._spec_forward, False
    assert run_steps(own, 0, lambda chance: K)
    right = [run_steps(own, 0, drafts) for drafts in (lambda chance: 0, lambda chance: chance.randint(0, K))]
    try:
        cpu_states.mend()
        is_replaced = gdn_attention._spec_forward is cpu_states.spec_forward
        cpu_states.mend()
        assert run_steps(gdn_attention._spec_forward, 0, lambda chance: chance.randint(0, K))
    finally:
        gdn_attention._spec_forward = own
    assert right == [not is_replaced] * 2


# -- held requests -------------------------------------------------------------------------------------------------


class Batch:
    """vLLM's rows with their counts: a request that leaves loses its row, a new one gets a count of 1."""

    def __init__(self) -> None:
        self.req_id_to_index: dict[str, int] = {}
        self.num_accepted_tokens_cpu = [1] * 8


def step(runner: Any, scheduled: list[str], **changed: Any) -> None:
    def update_states(self: Any, output: Any) -> None:
        batch = self.input_batch
        batch.req_id_to_index = {
            id_: row for id_, row in batch.req_id_to_index.items() if id_ in output.num_scheduled_tokens
        }
        for id_ in output.num_scheduled_tokens:
            if id_ not in batch.req_id_to_index or id_ in output.scheduled_cached_reqs.resumed_req_ids:
                row = min(set(range(8)) - set(batch.req_id_to_index.values()))
                batch.req_id_to_index[id_], batch.num_accepted_tokens_cpu[row] = row, 1

    output = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(scheduled, 1),
        finished_req_ids=set(changed.get("finished", ())),
        preempted_req_ids=changed.get("preempted"),
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set(changed.get("resumed", ()))),
        scheduled_new_reqs=[SimpleNamespace(req_id=id_) for id_ in changed.get("new", ())],
    )
    held_states._remembering(update_states)(runner, output)


def counts(runner: Any) -> dict[str, int]:
    batch = runner.input_batch
    return {id_: batch.num_accepted_tokens_cpu[row] for id_, row in batch.req_id_to_index.items()}


def runner_of(is_hybrid: bool = True) -> Any:
    return SimpleNamespace(
        input_batch=Batch(), num_accepted_tokens_event=None, model_config=SimpleNamespace(is_hybrid=is_hybrid)
    )


def accept(runner: Any, **numbers: int) -> None:
    for id_, number in numbers.items():
        runner.input_batch.num_accepted_tokens_cpu[runner.input_batch.req_id_to_index[id_]] = number


def test_a_held_request_goes_on_where_it_was() -> None:
    runner = runner_of()
    step(runner, ["a", "b"], new=["a", "b"])
    accept(runner, a=4, b=3)
    step(runner, ["b"])
    accept(runner, b=2)
    step(runner, [])
    step(runner, ["a", "c"], new=["c"])
    assert counts(runner) == {"a": 4, "c": 1}
    accept(runner, a=1, c=5)
    step(runner, ["b", "c", "a"])
    assert counts(runner) == {"b": 2, "c": 5, "a": 1}


@pytest.mark.parametrize(
    "changed", [{"finished": ["a"]}, {"preempted": {"a"}}, {"new": ["a"]}, {"resumed": ["a"]}], ids=str
)
def test_one_that_begins_anew_does_not(changed: dict[str, Any]) -> None:
    runner = runner_of()
    step(runner, ["a"], new=["a"])
    accept(runner, a=4)
    if changed.keys() & {"finished", "preempted"}:
        step(runner, [], **changed)
        step(runner, ["a"])
    else:
        step(runner, [])
        step(runner, ["a"], **changed)
    assert counts(runner) == {"a": 1}
    assert not runner.__dict__[held_states._KEPT]


def test_models_with_attention_alone_are_left_as_they_are() -> None:
    runner = runner_of(is_hybrid=False)
    step(runner, ["a"], new=["a"])
    accept(runner, a=4)
    step(runner, [])
    step(runner, ["a"])
    assert counts(runner) == {"a": 1}


# -- what is refused -----------------------------------------------------------------------------------------------


def config_of(kind: str, dtype: str = "torch.bfloat16", **changed: Any) -> Any:
    model = {"is_hybrid": True, "is_attention_free": False, "architecture": kind, "dtype": dtype} | changed
    options = {"specedge": {"hybrid": changed.get("hybrid", False)}}
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        additional_config=options,
        cache_config=SimpleNamespace(enable_prefix_caching=True),
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (config_of("MambaForCausalLM", is_hybrid=False, is_attention_free=True), "models without attention"),
        (config_of("JambaForCausalLM"), "no state of its Mamba-1"),
        (config_of("GraniteMoeHybridForCausalLM"), "on CPUs: vLLM's Mamba-2"),
        (config_of("Qwen3NextForCausalLM", "torch.float32"), "add --dtype bfloat16"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_cannot_be_verified_is_refused(config: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        hybrids.check(config)


def test_what_can_is_not() -> None:
    hybrids.check(config_of("Qwen3NextForCausalLM"))
    hybrids.check(config_of("LlamaForCausalLM", "torch.float32", is_hybrid=False))


def test_on_gpus_it_is_untested(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", SimpleNamespace(is_cpu=lambda: False))
    config = config_of("GraniteMoeHybridForCausalLM")
    with pytest.raises(UserError, match='"hybrid": true'):
        hybrids.check(config)
    config.additional_config["specedge"]["hybrid"] = True
    hybrids.check(config)
    assert "untested on GPUs" in caplog.text
    assert not hybrids.drop_prefix_caching(SimpleNamespace(), config, is_asked=True)


def test_prefix_caching_is_off_where_it_cannot_be() -> None:
    args = SimpleNamespace(enable_prefix_caching=True)  # as vLLM writes its default
    assert hybrids.drop_prefix_caching(args, config_of("Qwen3NextForCausalLM"), is_asked=False)
    assert args.enable_prefix_caching is False
    assert not hybrids.drop_prefix_caching(args, config_of("LlamaForCausalLM", is_hybrid=False), is_asked=True)
    with pytest.raises(UserError, match="only without prefix caching"):
        hybrids.drop_prefix_caching(args, config_of("Qwen3NextForCausalLM"), is_asked=True)
