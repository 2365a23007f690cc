"""The pseudo language model behind `make bench-emulated`: benchmarks/emulation.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.emulation import VOCAB_SIZE, Pacer, PseudoModel, target
from vllm_specedge.simulation.models import SERVERS

NUM_PROMPT = 12
MODEL = target()
KEY = MODEL.key(7)
ANSWER = [MODEL.token(KEY, position) for position in range(NUM_PROMPT, NUM_PROMPT + 60)]
SERVER = SERVERS["a100-14b"]


def opened() -> PseudoModel:
    model = PseudoModel()
    model.open("r", MODEL.prompt(7, NUM_PROMPT))
    return model


def decode(model: PseudoModel, num_known: int, draft: list[int]) -> list[int]:
    return model.step({"r": 1 + len(draft)}, {"r": NUM_PROMPT + num_known - 1}, {"r": draft} if draft else {})["r"]


def test_a_prompt_in_two_parts_says_its_first_token_with_the_second() -> None:
    model = opened()
    assert model.step({"r": 5}, {"r": 0}, {}) == {"r": []}
    assert model.step({"r": NUM_PROMPT - 5}, {"r": 5}, {}) == {"r": ANSWER[:1]}


@given(st.lists(st.lists(st.booleans(), max_size=5), max_size=10))
def test_whatever_is_drafted_the_answer_is_the_same_and_right_drafts_make_it_longer(drafts: list[list[bool]]) -> None:
    model = opened()
    said = model.step({"r": NUM_PROMPT}, {"r": 0}, {})["r"]
    for rights in drafts:
        wrong_or_not = [
            token if is_right else (token + 1) % VOCAB_SIZE
            for token, is_right in zip(ANSWER[len(said) :], rights, strict=False)
        ]
        more = decode(model, len(said), wrong_or_not)
        assert len(more) == 1 + next((at for at, is_right in enumerate(rights) if not is_right), len(rights))
        said += more
    assert said == ANSWER[: len(said)]


def test_a_request_that_starts_again_from_its_first_token_goes_on_where_it_was() -> None:
    """As after a preemption: its tokens are computed again."""
    model = opened()
    said = model.step({"r": NUM_PROMPT}, {"r": 0}, {})["r"] + decode(model, 1, [])
    assert model.step({"r": NUM_PROMPT + 1}, {"r": 0}, {}) == {"r": []}
    said += model.step({"r": 1}, {"r": NUM_PROMPT + 1}, {})["r"]
    assert said == ANSWER[:3]


def test_those_that_ended_are_forgotten() -> None:
    model = opened()
    model.close("r")
    model.close("r")
    assert len(model) == 0


def test_a_step_takes_what_the_server_takes_and_what_is_between_is_counted_where_requests_go_on() -> None:
    pacer = Pacer(SERVER)
    due_s = pacer.start(4, 24, True, has_more=False, now_s=10.0)
    assert due_s == pytest.approx(10.0 + SERVER.step_s(4, 24, True))
    pacer.end(due_s)
    later_s = pacer.start(4, 4, False, has_more=True, now_s=due_s + 0.003)
    pacer.end(later_s)
    pacer.start(1, 1, False, has_more=False, now_s=later_s + 5.0)
    report = pacer.report()
    assert (report["num_steps"], report["num_between"]) == (3, 1)
    assert report["between_s"] == pytest.approx(0.003)
    assert report["modelled_s"] == pytest.approx(SERVER.step_s(4, 24) + SERVER.step_s(4, 4) + SERVER.step_s(1, 1))


def test_a_step_that_is_scheduled_ahead_waits_for_the_one_before() -> None:
    pacer, step_s = Pacer(SERVER), SERVER.step_s(4, 4)
    first_s = pacer.start(4, 4, False, has_more=False, now_s=10.0)
    second_s = pacer.start(4, 4, False, has_more=True, now_s=10.001)
    assert second_s == pytest.approx(first_s + step_s)
    pacer.end(first_s)
    pacer.start(4, 4, False, has_more=True, now_s=first_s + 0.003)
    pacer.end(second_s)
    pacer.start(4, 4, False, has_more=True, now_s=second_s + step_s + 0.002)
    pacer.end(second_s + 2 * step_s + 0.002)
    pacer.start(1, 1, False, has_more=False, now_s=20.0)
    pacer.start(4, 4, False, has_more=True, now_s=20.001)  # nothing has come out since
    report = pacer.report()
    assert report["between_s"] == pytest.approx(0.003 + step_s + 0.002)
    assert report["idle_s"] == pytest.approx(0.002)
