"""How a client reaches its coordinator: address, TLS, token, channel options, defaults."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from coordinator.client.errors import REQUEST_ID, InvalidInputError
from coordinator.retry import RetryPolicy

Pem = bytes | str | Path | None
Options = Sequence[tuple[str, Any]]
_LONGEST_ID = 128  # what the coordinator takes; a longer one it would replace

_CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # A model's tensors are as large as they are; the server has its own limit and says so.
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A restarted coordinator is back within a second. gRPC's own reconnection pauses go up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Channels to one address share a connection otherwise, and with it a 16 MiB response's head-of-line blocking.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class Tls:
    """What TLS needs: ``ca`` verifies the server (None: the system's roots); ``cert`` and ``key`` are for mutual TLS.

    Each is a path or PEM bytes. ``server_name`` is the name expected in the certificate, where it is not the target's.
    """

    ca: Pem = None
    cert: Pem = None
    key: Pem = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises InvalidInputError for a file that cannot be read, or a certificate without its key."""
        if (self.cert is None) != (self.key is None):
            raise InvalidInputError("mutual TLS needs both the certificate and its key")
        return grpc.ssl_channel_credentials(
            root_certificates=_pem(self.ca, "CA"),
            private_key=_pem(self.key, "key"),
            certificate_chain=_pem(self.cert, "certificate"),
        )


TlsSetting = Tls | grpc.ChannelCredentials | bool | str | Path | bytes | None


def _pem(source: Pem, what: str) -> bytes | None:
    if source is None or isinstance(source, bytes):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InvalidInputError(f"cannot read the TLS {what} {str(source)!r}: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Connection:
    """The arguments that both clients share, checked."""

    target: str
    token: str | None
    credentials: grpc.ChannelCredentials | None
    policy: RetryPolicy
    timeout: float | None
    options: tuple[tuple[str, Any], ...] = field(default=())
    customized: bool = False
    """The user gave channel options."""

    @property
    def local(self) -> bool:
        """Whether the target is on this host, so that no proxy is asked."""
        return _local(self.target)

    @classmethod
    def of(
        cls,
        target: str,
        token: str | None,
        tls: TlsSetting,
        retries: RetryPolicy | int | bool | None,
        timeout: float | None,
        options: Options | None,
    ) -> Connection:
        """``tls``: None or False is plaintext, True the system's roots, a path or PEM bytes the CA, or a `Tls`."""
        if not target or any(character.isspace() for character in target):
            raise InvalidInputError(f"target {target!r} is not an address; give HOST:PORT or unix:/path")
        if not _is_word(token or ""):
            raise InvalidInputError("the token must be printable ASCII without spaces")  # and stay out of messages
        settings = dict(_CHANNEL_OPTIONS) | ({"grpc.enable_http_proxy": 0} if _local(target) else {})
        if tls is True:
            tls = Tls()
        elif isinstance(tls, (str, Path, bytes)):
            tls = Tls(ca=tls)
        if isinstance(tls, Tls):
            if tls.server_name is not None:
                settings["grpc.ssl_target_name_override"] = tls.server_name  # type: ignore[assignment]
            tls = tls.credentials()
        return cls(
            target=target,
            token=token,
            credentials=tls or None,
            policy=RetryPolicy.of(retries),
            timeout=timeout,
            options=tuple((settings | dict(options or ())).items()),
            customized=bool(options),
        )

    def metadata(self, request_id: str) -> tuple[tuple[str, str], ...]:
        pairs = ((REQUEST_ID, request_id),) if request_id else ()
        return (*pairs, ("authorization", f"Bearer {self.token}")) if self.token else pairs


def new_request_id(given: str | None = None) -> str:
    """Made here rather than by the coordinator, so that an error has it even if nothing was reached."""
    if not given:
        return uuid.uuid4().hex
    if not (_is_word(given) and len(given) <= _LONGEST_ID):
        raise InvalidInputError(
            f"request id {given[:40]!r} must be printable ASCII, at most {_LONGEST_ID} characters, no spaces"
        )
    return given


def _is_word(text: str) -> bool:
    """Whether it can travel in gRPC's metadata, which takes printable ASCII alone."""
    return all("!" <= character <= "~" for character in text)


def _local(target: str) -> bool:
    return target.startswith(("unix:", "unix-abstract:", "127.", "localhost", "[::1]", "ipv4:127."))
