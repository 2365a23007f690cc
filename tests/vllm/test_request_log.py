"""The real vLLM's logs of a request have neither its session nor its predicted answer."""

import inspect
import logging

import pytest

from vllm_specedge.adapter.request_log import LOGGERS, hide_ours

SECRET = "s3cret"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines written by the loggers of `LOGGERS` since."""
    from vllm.entrypoints.serve.utils import request_logger
    from vllm.logging_utils import dump_input

    written: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(record.getMessage())

    assert {request_logger.logger.name, dump_input.logger.name} <= set(LOGGERS)
    for logger in (request_logger.logger, dump_input.logger):
        monkeypatch.setattr(logger, "handlers", [Kept()])
        monkeypatch.setattr(logger, "level", logging.DEBUG)
    hide_ours()
    return written


def test_neither_is_in_its_logs_of_requests_or_of_what_an_engine_was_at(lines: list[str]) -> None:
    from vllm import SamplingParams
    from vllm.entrypoints.serve.utils.request_logger import RequestLogger
    from vllm.logging_utils.dump_input import _dump_engine_exception
    from vllm.v1.core.sched.output import NewRequestData

    extra = {"specedge": SECRET, "specedge_prediction": f'it\'s "{SECRET}"', "other": 1}
    parameters = SamplingParams(extra_args=extra)
    RequestLogger(max_log_len=None).log_inputs("one", "prompt", [1], None, parameters, None)
    known = {"sampling_params": parameters, "req_id": "one", "prompt_token_ids": [1]}
    fields = inspect.signature(NewRequestData).parameters
    _dump_engine_exception("config", {"one": NewRequestData(**{name: known.get(name) for name in fields})}, None)
    shown = [line for line in lines if "'specedge': ..., 'specedge_prediction': ..., 'other': 1" in line]
    assert len(shown) == 2
    assert SECRET not in "".join(lines)
