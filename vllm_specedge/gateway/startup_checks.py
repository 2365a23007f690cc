"""Checks before a gateway starts: its address, its tokens file, its certificate."""

import os
import resource
import socket
import ssl
from pathlib import Path

from vllm_specedge.config import GatewayOptions, split_address
from vllm_specedge.errors import UserError
from vllm_specedge.gateway.credentials import TokenFile

OTHER_FILES, MANY_FILES = 128, 2048
"""Open files in addition to the edges' own: the minimum, and the number to ask for, since connections that are being
refused need files too."""


def check_start(options: GatewayOptions) -> None:
    """Check the options. Raises UserError with one sentence that says what to change."""
    _check_files(options.max_edges)
    _check_listen(options.listen)
    if options.tokens_file:
        TokenFile(Path(options.tokens_file)).records()
    check_certificate(options)


def _check_files(max_edges: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = max_edges + OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        text = f"'max_edges' needs {needed} open files, and this system allows {hard}: lower it, or raise 'ulimit -n'."
        raise UserError(text)


def allow_files(max_edges: int) -> None:
    """Raise the limit of open files. Each edge is one, and services commonly may have 1,024 until they ask for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_edges + MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, max_edges + MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _check_listen(address: str) -> None:
    host, port = split_address(address)
    try:
        # No SO_REUSEPORT: a second gateway on the port must fail here, though the web server itself would allow it.
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        text = f"The edge gateway cannot listen on {address} ({reason}): choose another 'listen' address."
        raise UserError(text) from None


def check_certificate(options: GatewayOptions) -> None:
    """Raises UserError if the TLS files cannot be used, or do not match."""
    certificate, key, authority = options.tls_cert, options.tls_key, options.tls_client_ca
    if not certificate:
        return

    def passphrase() -> str:
        # No terminal to ask on: neither the web server's threads nor a gateway started by its engine have one.
        hint = f"'openssl pkey -in {key}' writes one"
        raise UserError(f"The key {key} is encrypted: give one without a passphrase, in a separate file ({hint}).")

    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, key, passphrase)
        if authority:
            context.load_verify_locations(authority)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or str(error)
        files = f"{certificate} and its key {key}" + (f", or the authority {authority}," if authority else "")
        text = f"The certificate {files} cannot be used ({reason}): give PEM files that match."
        raise UserError(text) from None
