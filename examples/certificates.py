"""A private certificate authority, to try TLS with: python examples/certificates.py DIRECTORY NAME ...

Writes cert.pem and key.pem for a server with these names, and ca.pem for edges to trust (`edge-client connect
--ca-file`). Not for production: the authority's key is not kept.
"""

import os
import sys
from datetime import datetime
from pathlib import Path

import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key


def write_certificate(
    directory: Path,
    authority: trustme.CA,
    *names: str,
    not_after: datetime | None = None,
    key_type: trustme.KeyType = trustme.KeyType.ECDSA,
    key_format: PrivateFormat = PrivateFormat.PKCS8,
) -> list[str]:
    """Write a server's certificate, key and authority, each file atomically; return the gateway's options for them."""
    certificate = authority.issue_cert(*(names or ("localhost",)), not_after=not_after, key_type=key_type)
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    files = {
        "key.pem": key.private_bytes(Encoding.PEM, key_format, NoEncryption()),
        "cert.pem": b"".join(part.bytes() for part in certificate.cert_chain_pems),
        "ca.pem": authority.cert_pem.bytes(),
    }
    for name, data in files.items():
        unfinished = directory / f"{name}.new"
        unfinished.touch(mode=0o600)
        unfinished.write_bytes(data)
        os.replace(unfinished, directory / name)
    return ["--tls-cert", str(directory / "cert.pem"), "--tls-key", str(directory / "key.pem")]


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    print(" ".join(write_certificate(Path(sys.argv[1]), trustme.CA(), *sys.argv[2:])))
