"""Which of vLLM's model runners a server with edges gets, and the message if it cannot have the requested one."""

from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm import envs
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext

from vllm_specedge.adapter import hooks, plugin
from vllm_specedge.adapter.config_rewrite import ASYNC_SCHEDULER, PROPOSER, SCHEDULER, WORKER

from . import interpreter

pytestmark = pytest.mark.skipif(vllm.__version__.startswith("0.32."), reason="it stays on the V1 runner")
LISTEN = "127.0.0.1:0"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_specedge.adapter.config_rewrite.check_start", lambda options: None)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    envs.disable_envs_cache()  # an engine of this process has cached the environment
    plugin.register()


def config(model: Path, **options: Any) -> Any:
    edge = {"method": "edge", "listen": LISTEN}
    args = EngineArgs(model=str(model), max_model_len=256, speculative_config=edge, **options)
    return args.create_engine_config(UsageContext.LLM_CLASS)


def test_a_server_keeps_vllm_s_own_runner_and_scheduling(model: Path) -> None:
    made = config(model)
    assert made.use_v2_model_runner
    assert made.scheduler_config.async_scheduling
    assert made.scheduler_config.scheduler_cls == ASYNC_SCHEDULER
    assert made.parallel_config.worker_extension_cls == WORKER
    lengths = [length for _, _, length in made.speculative_config.num_speculative_tokens_per_batch_size]
    assert lengths == [5, 3, 1, 0]


def test_scheduling_is_left_as_the_user_wants_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "is_asynchronous", False)
    made = config(model, async_scheduling=False)
    assert made.use_v2_model_runner
    assert made.scheduler_config.scheduler_cls == SCHEDULER


def test_graphs_of_several_lengths_need_as_many_requests(model: Path) -> None:
    made = config(model, max_num_seqs=2)
    assert made.use_v2_model_runner
    assert made.speculative_config.num_speculative_tokens_per_batch_size is None


@pytest.mark.parametrize(
    ("options", "environment"),
    [({"worker_extension_cls": "mine.Worker"}, {}), ({}, {"VLLM_USE_V2_MODEL_RUNNER": "0"})],
)
def test_what_cannot_be_had_beside_it_leaves_the_first_runner(
    model: Path, options: dict[str, Any], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interpreter, "is_asynchronous", False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = config(model, **options)
    assert not made.use_v2_model_runner
    assert made.speculative_config.model == PROPOSER
    assert made.scheduler_config.scheduler_cls == SCHEDULER
    assert made.parallel_config.worker_extension_cls == options.get("worker_extension_cls", "")


def test_what_vllm_itself_refuses_there_leaves_the_first_runner(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter, "is_asynchronous", False)
    unsupported = "vllm.config.vllm.VllmConfig._get_v2_model_runner_unsupported_features"
    monkeypatch.setattr(unsupported, lambda self: ["something of tomorrow"])
    made = config(model)
    assert not made.use_v2_model_runner
    assert made.scheduler_config.scheduler_cls == SCHEDULER
    assert made.parallel_config.worker_extension_cls == ""


@pytest.mark.parametrize(
    ("options", "environment", "sentence"),
    [
        ({"worker_extension_cls": "mine.Worker", "async_scheduling": True}, {}, "leave --async-scheduling out"),
        ({"worker_extension_cls": "mine.Worker"}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}, "unset VLLM_USE_V2_MODEL_RUNNER"),
    ],
)
def test_what_contradicts_itself_is_one_sentence(
    model: Path,
    options: dict[str, Any],
    environment: dict[str, str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence) as caught:
        config(model, **options)
    assert "\n" not in str(caught.value)


def test_a_missing_hook_leaves_a_plain_engine(model: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from .engines import ASYNCHRONOUS, with_edges
    from .test_same_tokens import PROMPTS, greedy

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    gone = hooks.Part("Nothing", (hooks.Hook("vllm:gone"),))
    monkeypatch.setitem(hooks.PARTS, hooks.V2, gone)
    said = plain.tokens(PROMPTS, greedy(16))
    for engine in with_edges(model, ASYNCHRONOUS):
        assert engine.drafting is None
        assert engine.tokens(PROMPTS, greedy(16)) == said
