"""Sessions and predicted texts are in no log of vLLM; with loggers that have vLLM's names."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.adapter.request_log import LOGGERS, hidden, hide_ours

SECRET = "s3cret"
texts = st.text(max_size=12).map(lambda text: f"{SECRET}{text}{SECRET}")
values = texts | st.lists(st.integers(0, 9), max_size=5).map(lambda ids: [*ids, 987654])
ours = st.dictionaries(st.sampled_from(["specedge", "specedge_prediction"]), values)
others = st.dictionaries(st.sampled_from(["mine", "spec", "my_specedge"]), st.text(max_size=8) | st.integers(0, 9))


@given(ours, others)
def test_our_values_are_hidden_and_nothing_else_is(ours: dict[str, object], others: dict[str, object]) -> None:
    for write in (repr, json.dumps, lambda value: json.dumps(value, ensure_ascii=False, separators=(",", ":"))):
        shown = hidden(f"SamplingParams(n=1, extra_args={write({**ours, **others})})")
        assert SECRET not in shown
        assert "987654" not in shown
        for name, value in others.items():
            assert f"{write(name)}:" in shown
            assert write(value) in shown
        assert shown.endswith("})")
        assert hidden(f"{write(others)}") == write(others)


@given(texts, st.integers(0, 40))
def test_a_line_that_is_cut_off_hides_them_too(text: str, length: int) -> None:
    whole = json.dumps({"specedge": text})
    shown = hidden(whole[:length])
    assert SECRET not in shown or length < len('{"specedge": "')


class Params:
    """With the representation of vLLM's SamplingParams."""

    def __repr__(self) -> str:
        return f"SamplingParams(n=1, extra_args={ {'specedge': SECRET, 'specedge_prediction': SECRET} })"


@pytest.mark.parametrize("name", LOGGERS)
def test_what_vllm_logs_of_a_request_has_neither(name: str, caplog: pytest.LogCaptureFixture) -> None:
    hide_ours()
    hide_ours()
    logger = logging.getLogger(name)
    with caplog.at_level(logging.DEBUG, name):
        logger.info("Received request %s: params: %s, lora_request: %s.", "one", Params(), None)
        logger.debug("Request %s JSON body: %s", "two", json.dumps({"vllm_xargs": {"specedge": SECRET}})[:35])
        logger.info("Received request %s: params: %s.", "three", "no arguments")
    assert SECRET not in caplog.text
    assert [record.getMessage() for record in caplog.records] == [
        "Received request one: params: SamplingParams(n=1, extra_args={'specedge': ..., 'specedge_prediction': ...}), "
        "lora_request: None.",
        'Request two JSON body: {"vllm_xargs": {"specedge": ...',
        "Received request three: params: no arguments.",
    ]
    assert len(logger.filters) == 1


class Broken:
    def __repr__(self) -> str:
        raise ZeroDivisionError


def test_what_cannot_be_written_raises_into_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    hide_ours()
    logger = logging.getLogger(LOGGERS[0])
    monkeypatch.setattr(logger, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(logger, "propagate", False)
    logger.warning("%s", Broken())
