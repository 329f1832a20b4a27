"""Requests that Ray knows of by a message, and that come over HTTP.

A lease is held from the moment in which the ingress has chosen the replica until the replica has answered. It is what
Ray counts: for the number of replicas, and for when one that is to end has nothing to do any more.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = "x-gossamer-lease"
_NAME = HEADER.encode()
COMES_WITHIN = 30.0  # seconds between the two messages of a request


class _Lease:
    def __init__(self) -> None:
        self.begun, self.ended = asyncio.Event(), asyncio.Event()
        self.usage: dict[str, Any] | None = None


class Leases:
    """The leases of one replica."""

    def __init__(self) -> None:
        self._leases: dict[str, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    async def hold(self, lease_id: str) -> dict[str, Any] | None:
        """Until the request with this lease has been answered, or has not come in time.

        Returns:
            The ``usage`` of the answer, if it has one.
        """
        lease = self._leases.setdefault(lease_id, _Lease())
        try:
            async with asyncio.timeout(COMES_WITHIN):
                await lease.begun.wait()
            await lease.ended.wait()
        except TimeoutError:
            pass  # whoever asked for the lease is gone, or does without
        finally:
            self._leases.pop(lease_id, None)
        return lease.usage

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, whose requests with a lease end it."""

        async def leased(scope: Scope, receive: Receive, send: Send) -> None:
            found = (value for name, value in scope.get("headers", ()) if name == _NAME)
            lease_id = next(found, b"").decode("latin-1")
            if not lease_id:
                await app(scope, receive, send)
                return
            lease = self._leases.setdefault(lease_id, _Lease())
            lease.begun.set()
            try:
                await app(scope, receive, send)
            finally:
                body = scope.get("gossamer.body")
                lease.usage = None if body is None else body.usage
                lease.ended.set()
                # The other message may still come; it ends at once then.
                asyncio.get_running_loop().call_later(COMES_WITHIN, self._leases.pop, lease_id, None)

        return leased
