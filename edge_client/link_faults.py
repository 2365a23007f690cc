"""Messages for a failed connection to a gateway: what is wrong, and what to do next. Pure."""

import socket
import ssl
from collections.abc import Iterator

import httpx2 as httpx
from h2.exceptions import H2Error

BROKEN = (httpx.HTTPError, httpx.StreamError, H2Error, OSError)
"""Errors that end a connection. H2Error: raised after a GOAWAY."""
HANGING_UP = (httpx.RemoteProtocolError, H2Error, httpx.ReadError, httpx.WriteError)
"""Errors from a server that does not speak HTTP/2. Which one depends on what comes first: its answer, a reset or a
closed pipe."""
NO_GATEWAY = (
    "it is not an edge gateway: it hangs up or does not speak HTTP/2; name the gateway's port (8100 by default), "
    "not the OpenAI endpoint's, and write https:// if it has a certificate"
)
CERTIFICATE_FAULTS = {
    "mismatch": "its certificate is for another name; use a name or an address that the certificate has",
    "expired": "its certificate has expired; ask its operator for a new one",
    "not yet valid": "its certificate is not valid yet; check the clock of this machine",
}
"""Messages by the part of OpenSSL's message that identifies each fault."""
UNKNOWN_AUTHORITY = "its certificate is from an authority that is not trusted here; name that authority with --ca-file"


def what_is_wrong(error: Exception, is_answered: bool) -> str:
    """Why a connection ended. If it was not answered (`is_answered`), the other end may not be a gateway at all."""
    text = str(error) or type(error).__name__
    if is_answered:
        return text
    for cause in _causes(error):
        match cause:
            case ConnectionRefusedError():
                return "nothing listens there; start the server with --speculative-config edge, or correct the port"
            case socket.gaierror():
                return "no host of that name is known here; correct it, or use the server's IP address"
            case httpx.TimeoutException():
                return "it does not answer; correct host and port, or open the port in the firewalls in between"
            case ssl.SSLCertVerificationError():
                said = cause.verify_message
                return next((each for part, each in CERTIFICATE_FAULTS.items() if part in said), UNKNOWN_AUTHORITY)
    if "WRONG_VERSION_NUMBER" in text:
        return "it does not speak TLS; write http://, or name the gateway's port"
    return NO_GATEWAY if isinstance(error, HANGING_UP) else text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its causes, from the latest to the first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
