"""A rate for each class, lowered when latencies are late and raised when they are not."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from vllm_specedge.simulation.admitted_rate import INTERVAL_S, LEAST_RATE, AdmittedRates

CLASSES = ["gold", "silver", "default"]
latenesses = st.floats(0.0, 20.0)
seconds = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.lists(latenesses, max_size=20)),
    min_size=1,
    max_size=40,
)


def second(rates: AdmittedRates, at_s: float, offered: dict[str, int], lateness: float | None = None) -> dict[str, int]:
    """Send requests evenly over a second, with this lateness of the admitted ones; returns the number admitted."""
    admitted = dict.fromkeys(offered, 0)
    for tenth in range(10):
        now_s = at_s + tenth / 10
        for name, number in offered.items():
            for _ in range((number * (tenth + 1)) // 10 - (number * tenth) // 10):
                if rates.ask(name, now_s):
                    admitted[name] += 1
                    if lateness is not None:
                        rates.observe(name, lateness)
        rates.decide(now_s)
    return admitted


def test_nobody_is_limited_before_anything_is_late() -> None:
    rates = AdmittedRates(CLASSES)
    for at_s in range(20):
        assert second(rates, at_s, {"gold": 50, "default": 50}, 0.99) == {"gold": 50, "default": 50}
    assert all(rates.rate(name) == inf for name in CLASSES)


def test_the_least_important_class_is_lowered_first() -> None:
    rates = AdmittedRates(CLASSES)
    rates.ended(30.0)  # the effect of a decrease is not seen before that
    for at_s in range(6):
        second(rates, at_s, {"gold": 20, "default": 20}, 1.5)
    assert LEAST_RATE < rates.rate("default") < 20
    assert rates.rate("gold") == inf
    for at_s in range(6, 200):
        second(rates, at_s, {"gold": 20, "default": 20}, 1.5)
    assert rates.rate("default") == LEAST_RATE
    assert rates.rate("gold") < 20


def test_the_most_important_class_is_raised_first_and_in_the_end_nobody_is_limited() -> None:
    rates = AdmittedRates(CLASSES)
    for at_s in range(60):
        second(rates, at_s, {"gold": 20, "default": 20}, 3.0)
    gold, default = rates.rate("gold"), rates.rate("default")
    for at_s in range(60, 64):
        second(rates, at_s, {"gold": 20, "default": 20}, 0.2)
    assert rates.rate("gold") > gold
    assert rates.rate("default") == default
    for at_s in range(64, 300):
        second(rates, at_s, {"gold": 20, "default": 20}, 0.2)
    assert second(rates, 300, {"gold": 20, "default": 20}) == {"gold": 20, "default": 20}


def test_it_settles_near_what_a_server_can_do() -> None:
    """A server that is in time up to 10 requests per second, and late beyond."""
    rates, admitted = AdmittedRates(["all"]), [30]
    for at_s in range(200):
        rates.ended(1.0)
        admitted.append(second(rates, at_s, {"all": 30}, admitted[-1] / 10)["all"])
    last = admitted[-100:]
    assert 6 <= sum(last) / len(last) <= 12


@given(seconds)
def test_rates_stay_positive_and_lateness_never_raises_one(happened: list[tuple[int, int, int, list[float]]]) -> None:
    rates = AdmittedRates(CLASSES)
    for at_s, (*offered, lateness) in enumerate(happened):
        before = {name: rates.rate(name) for name in CLASSES}
        for name, number in zip(CLASSES, offered, strict=True):
            for index in range(number):
                rates.ask(name, at_s + index / 30)
            for each in lateness:
                rates.observe(name, each)
        rates.decide(at_s + 1.0)
        for name in CLASSES:
            assert rates.rate(name) >= LEAST_RATE
            if lateness and min(lateness) > 1.0:
                assert rates.rate(name) <= before[name]
            if lateness and max(lateness) < 0.9:
                assert rates.rate(name) >= before[name]


@given(st.integers(1, 200), st.floats(1.1, 5.0))
def test_no_more_are_let_in_than_the_rate_and_a_burst_allow(offered: int, lateness: float) -> None:
    rates = AdmittedRates(["all"])
    for at_s in range(10):
        second(rates, at_s, {"all": offered}, lateness)
    for at_s in range(10, 20):
        before = rates.rate("all")
        admitted = second(rates, at_s, {"all": offered}, lateness)["all"]
        assert admitted <= 2 * max(before, rates.rate("all"), 1.0) + 1


def test_time_that_stands_still_or_goes_back_changes_nothing() -> None:
    rates = AdmittedRates(["all"])
    second(rates, 0.0, {"all": 50}, 3.0)
    second(rates, 1.0, {"all": 50}, 3.0)
    rate = rates.rate("all")
    for _ in range(100):
        rates.observe("all", 9.0)
        rates.decide(1.9 + INTERVAL_S / 2 - 0.3)
    assert rates.rate("all") == rate
