"""Whether a Ray cluster lets anybody in: asked of the cluster, as a stranger."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from gossamer.distributed.extra import require_ray
from gossamer.errors import ConfigurationError

_SECONDS = 10.0


def check_address(address: str, *, insecure: bool) -> str:
    """Whether there is a cluster that asks for a token; returns its address as host and port.

    Ray itself waits for most of a minute for an address where nothing is, and then ends the process.

    Args:
        address: ``auto`` or ``host:port``.
        insecure: take one that asks nobody for a token.

    Raises:
        ConfigurationError: there is none, or it lets everybody in.
    """
    require_ray()
    if address.startswith("ray://"):
        raise ConfigurationError(
            "a ray:// address is not taken, as Ray's client passes all through one proxy; run this command on a "
            "machine of the cluster, with the address auto or HOST:PORT (6379 by default)"
        )
    found = _resolved(address)
    asks = _answers(found, {})
    if not asks:
        return _present_token(found)
    if not insecure:
        raise ConfigurationError(
            f"the Ray cluster at {found} asks for no token: whoever reaches its ports can run code on it. Start it "
            "with RAY_AUTH_MODE=token (https://docs.ray.io/en/latest/ray-security/token-auth.html), or say "
            "--insecure if its network is yours alone"
        )
    return found


def _resolved(address: str) -> str:
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address(address)
    except Exception:  # of several kinds
        found = None
    if not found:
        raise ConfigurationError(
            f"there is no Ray cluster at {address!r}: give auto (on a machine of a cluster) or HOST:PORT; "
            "`ray start --head` starts one"
        )
    return str(found)


def _answers(address: str, headers: dict[str, str]) -> bool:
    """Whether the cluster answers to who shows this.

    Raises:
        ConfigurationError: nothing is there.
    """
    import grpc  # type: ignore[import-untyped]

    messages: Any = import_module("ray.core.generated.gcs_service_pb2")
    stubs: Any = import_module("ray.core.generated.gcs_service_pb2_grpc")
    with grpc.insecure_channel(address) as channel:
        stub = stubs.NodeInfoGcsServiceStub(channel)
        try:
            shown = [(name.lower(), value) for name, value in headers.items()]
            stub.GetClusterId(messages.GetClusterIdRequest(), timeout=_SECONDS, metadata=shown)
            return True
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            raise ConfigurationError(
                f"no Ray cluster answers at {address} ({error.code().name}); `ray status` on a machine of the cluster "
                "tells whether it runs"
            ) from None


def _present_token(address: str) -> str:
    """Have Ray show the token that it finds here: it does so by itself only where the address is ``auto``."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    logging.getLogger("ray").setLevel(logging.ERROR)
    loader: Any = import_module("ray._raylet").AuthenticationTokenLoader
    if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False) or not (
        headers := loader.instance().get_token_for_http_header()
    ):
        raise ConfigurationError(
            f"the Ray cluster at {address} asks for a token: give it in RAY_AUTH_TOKEN, or in ~/.ray/auth_token, and "
            "leave RAY_AUTH_MODE out or set it to token"
        )
    if not _answers(address, headers):
        raise ConfigurationError(f"the Ray cluster at {address} does not take the token that is given here")
    return address
