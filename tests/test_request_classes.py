"""How a request's class is determined, and how it gets the priority of its class."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.config import EdgeOptions, parse_options
from vllm_specedge.errors import UserError
from vllm_specedge.frontend.request_classes import RequestClasses, read_key_groups, with_priority
from vllm_specedge.policy.slo import DEFAULT_CLASS, Target

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda each: st.lists(each) | st.dictionaries(st.text(), each),
)
objects = st.dictionaries(st.text() | st.just("priority"), values)


@given(
    objects, st.integers(-5, 5), st.sampled_from(["utf-8", "utf-16", "utf-32-le"]), st.sampled_from(["", " ", "\n\t"])
)
def test_a_request_gets_a_priority_and_keeps_all_else(
    asked: dict[str, Any], priority: int, encoding: str, blank: str
) -> None:
    body = (blank + json.dumps(asked, ensure_ascii=False) + blank).encode(encoding, "surrogatepass")
    assert json.loads(with_priority(body, priority)) == {**asked, "priority": priority}


@given(st.binary(max_size=60) | st.text('{}[]",:ab1 ').map(str.encode))
def test_what_is_no_object_gets_none(body: bytes) -> None:
    """The application reports what is wrong with it; a body that it accepts has our priority, if any."""
    try:
        before = json.loads(body)
    except ValueError:
        before = None
    try:
        after = json.loads(with_priority(body, 3))
    except ValueError:
        assert before is None
        return
    assert after["priority"] == 3 if isinstance(before, dict) else after == before


@given(
    st.dictionaries(st.sampled_from(["gold", "silver"]), st.integers(-9, 9)), st.sampled_from(["header", "priority"])
)
def test_other_processes_read_what_was_written(tmp_path_factory: Any, priorities: dict[str, int], source: Any) -> None:
    path = tmp_path_factory.mktemp("classes") / "classes"
    classes = RequestClasses(priorities, source, "x-slo-class", {"ab": "gold"})
    classes.write(path)
    assert RequestClasses.read(path) == classes
    assert RequestClasses.read(path.with_name("none")) == RequestClasses()


def test_classes_by_name_have_priorities() -> None:
    slo: Any = {"gold": {"itl_ms": 50, "priority": -1}, "default": {"itl_ms": 200, "priority": 3}}
    options = parse_options({"slo": slo, "slo_by": "header"})
    assert options.slo_priorities == {"gold": -1, "default": 3}
    assert options.targets.of(-1) == Target(itl_s=0.05)
    assert options.targets.of(3) == options.targets.of(0) == Target(itl_s=0.2)
    assert parse_options({"slo": {"05": {}, "-7": {}}}).slo_priorities == {"5": 5, "-7": -7}


@pytest.mark.parametrize(
    ("given_", "sentence"),
    [
        ({"slo": {"gold": {}}}, "targets by priority"),
        ({"slo": {"5": {"priority": 5}}}, 'only if "slo_by" is'),
        ({"slo": {"gold": {}}, "slo_by": "header"}, 'needs its own "priority"'),
        ({"slo": {"gold": {"priority": 0}}, "slo_by": "header"}, "different from the default"),
        ({"slo": {"a": {"priority": 1}, "b": {"priority": 1}}, "slo_by": "header"}, 'needs its own "priority"'),
        ({"slo": {"Gold!": {"priority": 1}}, "slo_by": "header"}, "targets by name"),
        ({"slo_by": "key"}, "slo_keys_file"),
        ({"slo_keys_file": "keys.json"}, "slo_keys_file"),
        ({"slo_header": "X Class"}, "slo_header"),
        ({"slo": {str(number): {} for number in range(17)}}, "slo"),
    ],
)
def test_what_does_not_go_together_is_said(given_: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_options(given_)


def test_key_groups_are_hashes_by_class(tmp_path: Path) -> None:
    path, digest = tmp_path / "keys.json", hashlib.sha256(b"key").hexdigest()
    path.write_text(json.dumps({"gold": [digest.upper()], "default": []}))
    assert read_key_groups(path, {"gold": -1, DEFAULT_CLASS: 0}) == {digest: "gold"}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"gold": "x"}', '{"gold": ["key"]}', '{"gold": [1]}', '{"silver": []}', "[" * 99999]
)
def test_a_keys_file_that_is_none_is_said_without_showing_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(UserError, match="slo_keys_file"):
        read_key_groups(path, {"gold": -1})
    with pytest.raises(UserError, match="cannot be read"):
        read_key_groups(tmp_path / "none.json", {"gold": -1})


def test_a_server_without_targets_has_one_class() -> None:
    assert RequestClasses(EdgeOptions().slo_priorities).names == [DEFAULT_CLASS]
