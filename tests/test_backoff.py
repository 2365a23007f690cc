from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.backoff import MAX_PAUSE_S, Backoff


def test_pauses_double_up_to_a_limit() -> None:
    backoff = Backoff()
    assert [backoff.ended(0.0) for _ in range(8)] == [1.0, 2.0, 4.0, 8.0, 16.0, MAX_PAUSE_S, MAX_PAUSE_S, MAX_PAUSE_S]


@given(st.lists(st.floats(0, 59.9), max_size=3000), st.floats(60, 1e6))
def test_what_lasted_begins_anew_however_often_it_failed_before(failed: list[float], lasted_s: float) -> None:
    backoff = Backoff()
    for seconds in failed:
        assert backoff.ended(seconds) <= MAX_PAUSE_S
    assert backoff.ended(lasted_s) == 1.0
