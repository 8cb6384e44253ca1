"""TLS of the HTTP server: certificate and key from PEM files, renewed without dropping a connection."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

from server.config import ConfigError

logger = logging.getLogger(__name__)


class TlsContext:
    """`context` is what the listening socket gets, for good; `reload()` changes what it shows to new connections.

    Every handshake asks for the newest certificate (OpenSSL's server-name callback, which runs for clients that send no
    name too). Loading a new chain into a context in use would not do: OpenSSL keeps one certificate per key type, so
    after a change from RSA to ECDSA it would go on showing the old one to some clients; and a pair that fails half way
    would leave none. Raises ConfigError naming the file that is wrong.
    """

    def __init__(self, certificate: str | Path, key: str | Path) -> None:
        self._certificate, self._key = Path(certificate), Path(key)
        self._newest = self.context = _context(self._certificate, self._key)
        self.context.sni_callback = self._choose

    @classmethod
    def from_settings(cls, certificate: str | None, key: str | None) -> TlsContext | None:
        """None where TLS is off."""
        return None if certificate is None or key is None else cls(certificate, key)

    def reload(self) -> str | None:
        """Reads both files again. What is wrong, logged, where they cannot be used; the old certificate then stays."""
        try:
            self._newest = _context(self._certificate, self._key)
        except ConfigError as error:
            logger.error("the certificate is not reloaded, the old one stays: %s", error)
            return str(error)
        logger.info("certificate reloaded from %s", self._certificate)
        return None

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._newest


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    for name, path in (("tls_certificate", certificate), ("tls_key", key)):
        _require_pem(name, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without the callback OpenSSL asks for the passphrase on the terminal, and start-up would hang.
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except _EncryptedError:
        raise ConfigError(f"tls_key: {str(key)!r} is encrypted; use a key without a passphrase") from None
    except (ssl.SSLError, OSError) as error:
        raise _explained(certificate, key, error) from error
    return context


class _EncryptedError(Exception):
    pass


def _no_passphrase() -> str:
    raise _EncryptedError


def _require_pem(name: str, path: Path) -> None:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {str(path)!r} cannot be read ({error.strerror}); use a PEM file") from error
    kind = b"CERTIFICATE-----" if name == "tls_certificate" else b"PRIVATE KEY-----"
    if b"-----BEGIN " not in text or kind not in text:
        wanted = "certificate chain" if name == "tls_certificate" else "private key"
        raise ConfigError(f"{name}: {str(path)!r} has no {wanted}; use a PEM file that has one")


def _explained(certificate: Path, key: Path, error: OSError) -> ConfigError:
    reason = getattr(error, "reason", None) or str(error)
    if reason == "KEY_VALUES_MISMATCH":
        return ConfigError(
            f"tls_key: {str(key)!r} is not the key of the certificate {str(certificate)!r}; use the pair"
        )
    return ConfigError(f"tls_certificate: {str(certificate)!r} with tls_key {str(key)!r} cannot be used: {reason}")
