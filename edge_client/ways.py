"""How to reach a server: its address, the proxy in between, and the trusted certificate authorities."""

import ssl
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2 as httpx

from vllm_specedge.addresses import is_loopback
from vllm_specedge.errors import UserError

GATEWAY_EXAMPLE, SERVER_EXAMPLE = "https://gpu.example.org:8100", "https://gpu.example.org/v1"


def checked_gateway_url(text: str) -> str:
    """The checked address of a gateway. Raises UserError."""
    return _checked(text, "gateway", GATEWAY_EXAMPLE)


def checked_server_url(text: str) -> str:
    """The checked address of an OpenAI endpoint. Raises UserError."""
    url = _checked(text, "server", SERVER_EXAMPLE)
    if not urlsplit(url).path.strip("/"):
        raise UserError(
            f"'{text}' is not the URL of an OpenAI endpoint (it has no path, mostly /v1): write {url.rstrip('/')}/v1."
        )
    return url


def _checked(text: str, what: str, example: str) -> str:
    fault = _fault(text)
    if fault:
        raise UserError(f"'{text}' is not a {what} URL ({fault}): write it as {example}.")
    return text


def _fault(url: str) -> str:
    """What is wrong with an address; empty if nothing is."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        return "host or port are not valid: a port is a number up to 65535, and an IPv6 address is written in brackets"
    if parts.scheme not in ("http", "https"):
        return "it must start with http:// or https://"
    if not host:
        return "it names no host"
    if port == 0:
        return "port 0 cannot be used"
    if any(letter.isspace() for letter in url):
        return "it contains a space"
    return "it contains a ? or a #" if parts.query or parts.fragment else ""


def proxy_for(url: str, proxies: Mapping[str, str], is_bypassed: Callable[[str], Any]) -> str | None:
    """The proxy for an address, from the environment's proxies by scheme; None: connect directly, as to loopback."""
    parts = urlsplit(url)
    chosen = proxies.get(parts.scheme) or proxies.get("all")
    if not chosen or is_loopback(parts.hostname) or is_bypassed(parts.netloc.rpartition("@")[2]):
        return None
    chosen = chosen if "://" in chosen else f"http://{chosen}"
    return chosen.replace("socks://", "socks5://", 1) if chosen.startswith("socks://") else chosen


def client_for(url: str, has_proxy: bool = True, **options: Any) -> httpx.AsyncClient:
    """A client for one server, through the environment's proxy if `has_proxy`. `options` are httpx's.

    HTTP/2 without TLS cannot pass an HTTP proxy, so a client that only speaks that uses none. Raises UserError.
    """
    proxy = proxy_for(url, getproxies(), proxy_bypass) if has_proxy else None
    is_only_http2 = not options.get("http1", True) and urlsplit(url).scheme == "http"
    if proxy is not None and is_only_http2 and not proxy.startswith("socks"):
        proxy = None
    try:
        return httpx.AsyncClient(base_url=url, proxy=proxy, trust_env=False, **options)
    except ImportError:
        text = f"The proxy {_named(proxy)} uses SOCKS: pip install 'vllm-specedge[socks]', or use --no-proxy."
        raise UserError(text) from None
    except (ValueError, httpx.InvalidURL):
        raise UserError(
            f"The environment's proxy {_named(proxy)} is not valid: correct it, or use --no-proxy."
        ) from None


def _named(proxy: str | None) -> str:
    """The proxy's URL without user name and password, for messages that may be logged."""
    scheme, _, rest = (proxy or "").partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def trusted(ca_file: str, is_alone: bool) -> ssl.SSLContext:
    """A TLS context that trusts the system's authorities and those of `ca_file`, or only the latter if `is_alone`.

    Raises UserError.
    """
    try:
        if ca_file and is_alone:
            return ssl.create_default_context(cafile=ca_file)
        context = httpx.create_ssl_context()
        if ca_file:
            context.load_verify_locations(ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"The CA file {ca_file} cannot be used: {error}.") from None
    return context
