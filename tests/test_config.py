import pytest

from vllm_specedge.addresses import is_loopback
from vllm_specedge.config import EdgeOptions, parse_options, split_address
from vllm_specedge.errors import UserError

SECURE = {"tls_cert": "c.pem", "tls_key": "k.pem", "tokens_file": "t.json"}


def refusal_of(**values: object) -> str:
    with pytest.raises(UserError) as caught:
        parse_options(values)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_nothing_need_be_set() -> None:
    assert parse_options({}).listen == "127.0.0.1:8100"


def test_an_unknown_option_is_named_beside_those_there_are() -> None:
    text = refusal_of(listens="127.0.0.1:1")
    assert "'listens'" in text
    for name in EdgeOptions.model_fields:
        assert name in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hold_limit_ms", -1),
        ("hold_limit_ms", 10_001),
        ("hold_limit_ms", "100"),
        ("hold_limit_ms", 1.5),
        ("hold_limit_ms", True),
        ("credit_tokens", -1),
        ("credit_tokens", 65),
        ("max_edges", 0),
        ("max_requests_per_edge", 0),
        ("max_requests_per_edge", 4097),
        ("insecure", "yes"),
        ("insecure", 1),
        ("listen", 8100),
        ("mode", "sometimes"),
        ("tls_cert", None),
        ("ngram", "no"),
        ("prompt_lookup_min", 0),
        ("prompt_lookup_max", 2.0),
    ],
)
def test_a_value_out_of_bounds_is_named(name: str, value: object) -> None:
    assert f"option '{name}'" in refusal_of(**{name: value})


@pytest.mark.parametrize("address", ["0.0.0.0:8100", "[::]:8100", "gpu.example.org:8100", "192.168.1.2:1"])
def test_beyond_loopback_needs_tls_and_tokens_or_the_word(address: str) -> None:
    for missing in SECURE:
        refusal_of(listen=address, **{key: value for key, value in SECURE.items() if key != missing})
    assert "insecure" in refusal_of(listen=address)
    assert parse_options({"listen": address, **SECURE}).listen == address
    assert parse_options({"listen": address, "insecure": True}).insecure


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:8100", "[::1]:8100", "127.8.8.8:65535"])
def test_loopback_needs_nothing(address: str) -> None:
    assert parse_options({"listen": address}).listen == address


@pytest.mark.parametrize("address", ["", "8100", ":8100", "host:", "host:x", "host:-1", "host:65536", "host:8 1"])
def test_an_address_is_host_and_port(address: str) -> None:
    assert "is not HOST:PORT" in refusal_of(listen=address)
    with pytest.raises(ValueError, match="HOST:PORT"):
        split_address(address)


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:8100", ("127.0.0.1", 8100)), ("[::1]:1", ("::1", 1)), ("a.b:65535", ("a.b", 65535))],
)
def test_an_address_is_split_at_its_last_colon(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


def test_certificate_and_key_go_together() -> None:
    assert "go together" in refusal_of(tls_cert="c.pem")
    assert "go together" in refusal_of(tls_key="k.pem")


def test_a_gateway_that_runs_elsewhere_is_an_endpoint() -> None:
    assert "ipc://" in refusal_of(gateway="127.0.0.1:8101")
    for endpoint in ("ipc:///run/x.sock", "tcp://127.0.0.1:8101"):
        # This engine's own listening address does not matter then.
        assert parse_options({"gateway": endpoint, "listen": "0.0.0.0:8100"}).gateway == endpoint


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({}, (5, 5)),
        ({"prompt_lookup_max": 4}, (4, 4)),
        ({"prompt_lookup_min": 7}, (7, 7)),
        ({"prompt_lookup_min": 2, "prompt_lookup_max": 4}, (2, 4)),
    ],
)
def test_the_lookup_window_is_as_in_vllm_s_ngram_method(values: dict[str, int], window: tuple[int, int]) -> None:
    options = parse_options(values)
    assert (options.prompt_lookup_min, options.prompt_lookup_max) == window


def test_the_lookup_window_is_not_upside_down() -> None:
    assert "prompt_lookup_max" in refusal_of(prompt_lookup_min=4, prompt_lookup_max=2)


def test_all_faults_are_told_at_once() -> None:
    text = refusal_of(max_edges=0, credit_tokens=-1)
    assert "max_edges" in text
    assert "credit_tokens" in text


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("localhost.x", False),
    ],
)
def test_loopback_is_told_from_everything_else(host: str, is_local: bool) -> None:
    assert is_loopback(host) is is_local


def test_options_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_options({}).insecure = True
