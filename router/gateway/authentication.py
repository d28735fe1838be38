"""Who may call: API keys, checked before a call reaches its service.

A key travels as `authorization: Bearer KEY`. Keys are kept and compared as digests, all of them on
every call, so that the time says nothing of a key. Health stays open: load balancers have no key.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc

from protos.errors import UnauthenticatedError
from protos.tls import API_KEY_HEADER, API_KEY_PREFIX

OPEN_SERVICE = "/grpc.health.v1.Health/"


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without a known key, whether or not there is such a method.

    Args:
        keys: The known ones.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the call's handler, or one that refuses the call."""
        if handler_call_details.method.startswith(OPEN_SERVICE):
            return await continuation(handler_call_details)
        metadata = handler_call_details.invocation_metadata or ()
        shown = [str(value) for name, value in metadata if name == API_KEY_HEADER]
        if not shown:
            return _refusal(f"send the header {API_KEY_HEADER}: {API_KEY_PREFIX}API_KEY")
        if len(shown) > 1 or not self._is_known(shown[0]):
            return _refusal("the API key is not known")
        return await continuation(handler_call_details)

    def _is_known(self, value: str) -> bool:
        scheme, _, key = value.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return any(matches) and scheme.lower() == API_KEY_PREFIX.strip().lower()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _refusal(detail: str) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that ends any kind of call at once, before its first message."""
    error = UnauthenticatedError(detail)

    async def refuse(requests: AsyncIterator[Any], context: Any) -> None:
        await context.abort(error.code, error.message, error.trailers())

    return grpc.stream_stream_rpc_method_handler(refuse)
