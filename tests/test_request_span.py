from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.engine.request_trace import MAX_GROUPS, RequestSpan


def test_a_request_s_steps_are_told_one_by_one() -> None:
    span = RequestSpan(began_s=10.0, num_tokens=7)
    span.step(7, 0, 10.0, 10.5)  # a part of the prompt
    span.step(8, 0, 10.5, 11.0)
    span.is_held = True
    span.step(11, 3, 11.25, 11.5)  # two of three were right
    span.step(12, 2, 11.5, 11.75)  # none of two
    span.step(14, 2, 11.75, 12.0)  # the answer was over before the second
    assert span.attributes() == {
        "specedge.steps": 4,
        "specedge.verified_tokens": 7,
        "specedge.accepted_tokens": 3,
        "specedge.held_steps": 1,
        "specedge.group.ended_ms": [1000, 1500, 1750, 2000],
        "specedge.group.took_ms": [500.0, 250.0, 250.0, 250.0],
        "specedge.group.verified_tokens": [0, 3, 2, 2],
        "specedge.group.accepted_tokens": [0, 2, 0, 1],
        "specedge.group.held": [False, True, False, False],
    }


@given(st.integers(0, 3 * MAX_GROUPS))
def test_a_span_s_size_is_bounded_and_its_totals_are_not(num_steps: int) -> None:
    span = RequestSpan(0.0, 0)
    for number in range(num_steps):
        span.step(2 * (number + 1), 1, number, number + 1)
    attributes = span.attributes()
    lists = [value for value in attributes.values() if isinstance(value, list)]
    assert {len(values) for values in lists} == {min(num_steps, MAX_GROUPS)}
    assert attributes["specedge.steps"] == attributes["specedge.accepted_tokens"] == num_steps
