"""Certificates for servers of the tests, from an authority that lives as long as its folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Certificate(NamedTuple):
    """Paths of PEM files."""

    chain: Path
    key: Path
    authority: Path


def make_certificate(folder: Path, host: str) -> Certificate:
    """Write a new authority, and a key and certificate for `host`, into `folder`."""
    import trustme

    authority = trustme.CA()
    issued = authority.issue_cert(host)
    certificate = Certificate(folder / "chain.pem", folder / "key.pem", folder / "authority.pem")
    authority.cert_pem.write_to_path(str(certificate.authority))
    issued.private_key_pem.write_to_path(str(certificate.key))
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(certificate.chain), append=number > 0)
    return certificate
