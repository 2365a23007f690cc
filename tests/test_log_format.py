import json
import logging
import sys

from vllm_specedge.gateway.log_format import JsonFormatter


def test_a_record_is_one_line_whatever_it_says() -> None:
    try:
        raise ValueError("two\nlines \u2028 and a separator")
    except ValueError:
        failure = sys.exc_info()
    record = logging.LogRecord(
        "vllm_specedge.gateway.connections", logging.ERROR, "", 0, "%s\nfailed", ("It",), failure
    )
    record.created = 1.5
    line = JsonFormatter().format(record)
    assert len(line.splitlines()) == 1
    entry = json.loads(line)
    trace = entry.pop("exception")
    assert trace.startswith("Traceback")
    assert trace.endswith("ValueError: two\nlines \u2028 and a separator")
    assert entry == {
        "time": "1970-01-01T00:00:01.500+00:00",
        "level": "error",
        "logger": "vllm_specedge.gateway.connections",
        "message": "It\nfailed",
    }
