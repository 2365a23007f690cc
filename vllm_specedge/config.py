"""The operator's options, each documented where it is defined. Unknown keys are errors."""

import os
import re
import sys
from collections.abc import Mapping
from math import inf
from typing import Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_specedge.addresses import is_loopback
from vllm_specedge.errors import UserError
from vllm_specedge.policy.situation import HoldLimits
from vllm_specedge.policy.slo import DEFAULT_CLASS, MAX_CLASSES, Target, Targets

DEFAULT_SPEC_TOKENS = 5
_HOLD = HoldLimits()
MAX_SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""Maximum path of a socket in the file system (unix(7), sun_path)."""
MAX_SPEC_TOKENS = 128
"""The longest draft of vLLM's rejection sampler (v1/sample/rejection_sampler.py, MAX_SPEC_LEN)."""


class SloTarget(BaseModel):
    """The latency targets of one class of requests."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    ttft_ms: float = Field(inf, gt=0)
    """Target of the time to the first token."""
    itl_ms: float = Field(inf, gt=0)
    """Target of the time from one token to the next."""
    priority: int | None = Field(None, ge=-(1 << 31), lt=1 << 31)
    """vLLM's priority, for a class that a header or a key names: lower is more important. Default class: 0."""


class GatewayOptions(BaseModel):
    """The options of a gateway: flags of `vllm-specedge gateway`, and part of an engine's options."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    listen: str = "127.0.0.1:8100"
    """Address that edges connect to, HOST:PORT. Beyond loopback it requires TLS and tokens, or `insecure`."""
    tokens_file: str = ""
    """File with the tokens of edges, made by `vllm-specedge token issue`. Without it any edge may connect, on loopback
    only."""
    tls_cert: str = ""
    """PEM certificate chain of the gateway; with it, the gateway only accepts TLS."""
    tls_key: str = ""
    """Private key of `tls_cert`, PEM (PKCS#8, PKCS#1 or SEC1), without a passphrase. When either file changes, the
    gateway restarts with the new ones."""
    tls_client_ca: str = ""
    """Accept only edges with a certificate of this authority (PEM), in addition to their token."""
    insecure: bool = False
    """Listen beyond loopback without TLS or without tokens. For closed networks only."""
    credit_tokens: int = Field(default=32, ge=1, le=64)
    """How many tokens past the last committed one an edge may draft."""
    max_edges: int = Field(default=256, ge=1, le=100_000)
    """Maximum edges connected at once."""
    max_requests_per_edge: int = Field(default=32, ge=1, le=4096)
    """Maximum requests that one edge drafts for at once."""
    public_names: bool = False
    """Show the names of edges to everybody who can reach the status page, not only on the gateway's machine."""

    @model_validator(mode="after")
    def _together(self) -> Self:
        host, _ = split_address(self.listen)
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key go together: give both or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        is_safe = is_loopback(host) or self.insecure or bool(self.tls_cert and self.tokens_file)
        if self.starts_gateway and not is_safe:
            raise ValueError(
                f"listening on {host} needs tls_cert, tls_key and tokens_file, or insecure on a closed network"
            )
        return self

    @property
    def starts_gateway(self) -> bool:
        """Whether a gateway is started with these options."""
        return True


class EdgeOptions(GatewayOptions):
    """The keys next to `method` and `num_speculative_tokens` in `--speculative-config '{"method": "edge", ...}'`."""

    gateway: str = ""
    """Use a gateway that already runs: its engine endpoint, `ipc:///...` or `tcp://127.0.0.1:...`."""
    hold_limit_ms: int = Field(round(1000 * _HOLD.hold_limit_s), ge=0, le=10_000)
    """Maximum time to hold a request for its draft; 0: never hold."""
    mode: Literal["auto", "wait", "never-wait", "budget"] = "auto"
    """`auto`: verify and hold when it pays. For comparisons: `wait` (always hold, up to the limit, and verify all),
    `never-wait` (verify all drafts that are there), `budget` (verify what pays, never hold)."""
    max_slowdown: float = Field(_HOLD.max_slowdown, ge=1)
    """A request's tokens may take at most this many times as long as without any drafts, its own or others'. Requests
    that get more tokens per step may have longer steps."""
    max_stretch: float = Field(_HOLD.max_stretch, ge=1)
    """A step may take at most this many times as long as without drafts, waiting included, unless tokens come twice as
    fast with it. Bounds the time between two chunks of a stream; costs throughput where verification takes long."""
    slo: dict[str, SloTarget] = Field(default_factory=dict, max_length=MAX_CLASSES - 1)
    """Latency targets, `ttft_ms` and `itl_ms`, by class: vLLM's priorities, as text, or those of `slo_by`, and
    "default". Speculation is shed before a target is missed. With
    `--middleware vllm_specedge.admission.AdmissionMiddleware`, requests that would miss their target or break others'
    are refused: 429, or 503 if no retry could help."""
    slo_by: Literal["priority", "header", "key"] = "priority"
    """What determines a request's class: its own priority; the header `slo_header`, with the class's name; or its API
    key, by `slo_keys_file`. Header and key give the request the `priority` of its class, whatever it sets itself.
    Clients can send any header: have a proxy set it, or use keys, if they must not choose."""
    slo_header: str = Field("x-slo-class", pattern="^[a-z0-9-]{1,64}$")
    """Name of the header, in lower case."""
    slo_keys_file: str = ""
    """JSON file with SHA-256 hashes of API keys, in hexadecimal digits, by class. vLLM decides which keys are valid."""
    tell_seeds: bool = True
    """Send a sampled request's seed to its edge, which then drafts with the target's noise; docs/security.md says what
    an edge can do with a seed. A request's text does not depend on this option, its speed does."""
    hybrid: bool = False
    """On GPUs, also serve models with linear attention or state space layers: untested there, and else refused."""
    ngram: bool = True
    """If no edge has a draft, verify what vLLM's own n-gram lookup finds, when that pays."""
    prompt_lookup_min: int = Field(5, ge=1)
    """Minimum n-gram length of the lookup, as in vLLM's `ngram` method."""
    prompt_lookup_max: int = Field(5, ge=1)
    """Maximum n-gram length of the lookup. If only one of the two is given, it applies to both."""

    @model_validator(mode="before")
    @classmethod
    def _lookup(cls, values: dict[str, object]) -> dict[str, object]:
        """Use one lookup length for both if only one is given, as vLLM does for its `ngram` method
        (config/speculative.py)."""
        given = {name: values[name] for name in ("prompt_lookup_min", "prompt_lookup_max") if name in values}
        if len(given) != 1:
            return values
        (size,) = given.values()
        return {**values, "prompt_lookup_min": size, "prompt_lookup_max": size}

    @property
    def targets(self) -> Targets:
        """The targets in the policy's form."""
        by_name = {name: Target(each.ttft_ms / 1000, each.itl_ms / 1000) for name, each in self.slo.items()}
        default = by_name.pop(DEFAULT_CLASS, Target())
        return Targets({self._priority(name): target for name, target in by_name.items()}, default)

    @property
    def slo_priorities(self) -> dict[str, int]:
        """The priority of each class by its name; the default class is included if all of its requests have one."""
        names = self.slo.keys() - {DEFAULT_CLASS}
        if self.slo_by == "priority":
            return {str(self._priority(name)): self._priority(name) for name in names}
        return {name: self._priority(name) for name in {*names, DEFAULT_CLASS}}

    def _priority(self, name: str) -> int:
        if self.slo_by == "priority":
            return int(name)
        target = self.slo.get(name)
        return (target.priority if target is not None else None) or 0

    @property
    def hold_limits(self) -> HoldLimits:
        """The limits in the policy's form."""
        return HoldLimits(self.hold_limit_ms / 1000, self.mode, _HOLD.max_misses, self.max_slowdown, self.max_stretch)

    @property
    def starts_gateway(self) -> bool:
        return not self.gateway

    @model_validator(mode="after")
    def _of_engine(self) -> Self:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("prompt_lookup_min must not be above prompt_lookup_max")
        self._check_classes()
        if self.gateway:
            check_endpoint(self.gateway, self.insecure)
        return self

    def _check_classes(self) -> None:
        names = self.slo.keys() - {DEFAULT_CLASS}
        if bool(self.slo_keys_file) != (self.slo_by == "key"):
            raise ValueError('slo_keys_file and "slo_by": "key" go together: give both or neither')
        if self.slo_by == "priority":
            if not all(re.fullmatch("-?[0-9]{1,9}", name) for name in names):
                raise ValueError('slo has targets by priority, such as {"default": {"itl_ms": 100}, "5": {}}')
            if any(target.priority is not None for target in self.slo.values()):
                raise ValueError('a class of slo has its own priority only if "slo_by" is "header" or "key"')
            return
        if not all(re.fullmatch("[a-z][a-z0-9_-]{0,31}", name) for name in names):
            raise ValueError('slo has targets by name, such as {"gold": {"itl_ms": 100, "priority": -1}}')
        given = [self.slo[name].priority for name in names]
        if None in given or len({*given, self._priority(DEFAULT_CLASS)}) <= len(given):
            raise ValueError('each class of slo needs its own "priority", different from the default class\'s')

    def of_gateway(self) -> GatewayOptions:
        """The options of the gateway that is started with these."""
        return GatewayOptions(**{name: getattr(self, name) for name in GatewayOptions.model_fields})


_Options = TypeVar("_Options", bound=GatewayOptions)


def parse_options(values: Mapping[str, object]) -> EdgeOptions:
    """Check an engine's options. Raises UserError with one sentence that says what to change."""
    return parse_as(EdgeOptions, values)


def parse_as(model: type[_Options], values: Mapping[str, object]) -> _Options:
    """Check options of this model. Raises UserError with one sentence that says what to change."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(
            "; ".join(_sentence(model, entry["loc"], entry["type"], entry["msg"]) for entry in error.errors())
        ) from None


def _sentence(model: type[GatewayOptions], location: tuple[int | str, ...], kind: str, message: str) -> str:
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        return f"edge drafting has no option '{key:.50}'; it has {', '.join(model.model_fields)}"
    text = message.removeprefix("Value error, ")
    return f"option '{key}': {text[0].lower()}{text[1:]}" if key else text


def split_address(address: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPv6]:PORT. Raises ValueError with a sentence."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"'{address}' is not HOST:PORT, such as 127.0.0.1:8100")
    return host.removeprefix("[").removesuffix("]"), int(port)


def check_endpoint(endpoint: str, insecure: bool) -> None:
    """An engine endpoint carries prompts in the clear and trusts everyone who connects, so it must be a socket file or
    on loopback unless `insecure`. Raises ValueError with a sentence."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc" and rest:
        if len(os.fsencode(rest)) > MAX_SOCKET_PATH_BYTES:
            raise ValueError(f"a socket's path may have at most {MAX_SOCKET_PATH_BYTES} bytes, unlike '{rest}'")
        return
    if scheme != "tcp":
        raise ValueError(f"'{endpoint}' is not an endpoint such as ipc:///run/specedge.sock or tcp://127.0.0.1:8101")
    host, _ = split_address(rest)
    if not is_loopback(host) and not insecure:
        raise ValueError(
            f"the engines' endpoint on {host} is neither encrypted nor authenticated: use ipc:// or loopback"
        )
