from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from server.api.access.tls import TlsContext
from server.config import ConfigError
from tests.api.access.live import Raw, serving

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "chain.pem", tmp_path / "key.pem"


def write(files: tuple[Path, Path], leaf: trustme.LeafCert) -> int:
    chain, key = files
    chain.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    return x509.load_pem_x509_certificate(leaf.cert_chain_pems[0].bytes()).serial_number


def issue(authority: trustme.CA, key_type: trustme.KeyType = trustme.KeyType.ECDSA) -> trustme.LeafCert:
    return authority.issue_cert("localhost", key_type=key_type)


def shown(raw: Raw) -> int:
    certificate: dict[str, Any] = raw.writer.get_extra_info("peercert")
    return int(certificate["serialNumber"], 16)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("rsa_first", [True, False])
def test_a_new_certificate_for_new_connections(
    authority: trustme.CA,
    files: tuple[Path, Path],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
    rsa_first: bool,
) -> None:
    kinds = [trustme.KeyType.RSA, trustme.KeyType.ECDSA]
    first, second = kinds if rsa_first else reversed(kinds)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def main() -> None:
        old = write(files, issue(authority, first))
        tls = TlsContext(*files)
        app = web.Application()
        app.add_routes([web.get("/", hello)])
        async with serving(app, ssl_context=tls.context) as server:
            before = await Raw.connect(server, trusting)
            assert shown(before) == old
            new = write(files, issue(authority, second))
            assert tls.reload() is None
            assert shown(await Raw.connect(server, trusting)) == new
            await before.send(GET)
            assert (await before.answer()).body == b"hello"
            files[1].write_bytes(b"broken")
            problem = tls.reload()
            assert problem is not None and problem.startswith("tls_key: ")
            after = await Raw.connect(server, trusting)
            assert shown(after) == new
            await after.send(GET)
            assert (await after.answer()).body == b"hello"

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


async def hello(request: web.Request) -> web.Response:
    return web.Response(text="hello")


async def test_old_protocols_are_refused(authority: trustme.CA, files: tuple[Path, Path]) -> None:
    write(files, issue(authority))
    context = TlsContext(*files).context
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def encrypted(leaf: trustme.LeafCert) -> bytes:
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


def test_what_cannot_be_used_is_one_line_that_names_the_file(authority: trustme.CA, files: tuple[Path, Path]) -> None:
    chain, key = files
    leaf, other = issue(authority), issue(authority)

    def problem(match: str) -> None:
        with pytest.raises(ConfigError, match=match) as caught:
            TlsContext(chain, key)
        assert "\n" not in str(caught.value)

    problem(r"^tls_certificate: '.*chain\.pem' cannot be read \(No such file or directory\)")
    write(files, leaf)
    key.unlink()
    problem(r"^tls_key: '.*key\.pem' cannot be read")
    key.write_bytes(other.private_key_pem.bytes())
    problem(r"^tls_key: '.*key\.pem' is not the key of the certificate '.*chain\.pem'")
    key.write_bytes(encrypted(leaf))
    problem(r"^tls_key: '.*key\.pem' is encrypted; use a key without a passphrase")
    key.write_bytes(chain.read_bytes())
    problem(r"^tls_key: '.*key\.pem' has no private key")
    write(files, leaf)
    chain.write_text("hello")
    problem(r"^tls_certificate: '.*chain\.pem' has no certificate chain")
    chain.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    problem(r"^tls_certificate: '.*chain\.pem' with tls_key '.*key\.pem' cannot be used: ")


def test_off_without_files() -> None:
    assert TlsContext.from_settings(None, None) is None
