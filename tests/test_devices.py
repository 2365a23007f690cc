"""Where a draft model runs."""

import pytest

from edge_client.drafters.devices import choose_device
from vllm_specedge.errors import UserError


@pytest.mark.parametrize(
    ("there", "device", "why"),
    [
        (["cuda", "mps", "cpu"], "cuda", "the fastest there is here"),
        (["mps", "cpu"], "mps", "the fastest there is here"),
        (["cpu"], "cpu", "no CUDA and no MPS here"),
    ],
)
def test_auto_takes_the_best_there_is(there: list[str], device: str, why: str) -> None:
    assert choose_device("auto", there) == (device, why)


def test_what_was_asked_for_is_taken_if_it_is_there() -> None:
    assert choose_device("cpu", ["cuda", "cpu"]) == ("cpu", "set by --device")
    assert choose_device("cuda:1", ["cuda", "cpu"]).device == "cuda:1"
    for wanted in ("tpu", "mps"):
        with pytest.raises(UserError, match=rf"no device '{wanted}' here: choose cuda, cpu\."):
            choose_device(wanted, ["cuda", "cpu"])
