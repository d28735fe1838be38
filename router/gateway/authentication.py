"""Who may call, and for which tenant: API keys, checked before a call reaches its service.

A key travels as `authorization: Bearer KEY`. Keys are kept and compared as digests, all of them on
every call, so that the time says nothing of a key. Health stays open: load balancers have no key.

A *tenant* is whose sessions and cached values a call may meet; the key says it, never the request.
The *unnamed* tenant (`""`) is that of all keys without one, and of all calls where there are no
keys. It runs the service: other tenants may look at `ClusterService`, and change nothing by it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos.errors import ExpertMeshError, PermissionDeniedError, UnauthenticatedError
from protos.tls import API_KEY_HEADER, API_KEY_PREFIX

OPEN_SERVICE = "/grpc.health.v1.Health/"
OPERATORS_SERVICE = "/expertmesh.v1.ClusterService/"
LOOKS = frozenset({"GetStatus", "WatchStatus", "PlanPlacement", "ExplainAutoscale"})
"""Its methods that change nothing; clients find the other routers by the first."""
UNNAMED = ""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key, and whose it is."""

    key: str = field(repr=False)
    tenant: str = UNNAMED


class Callers:
    """Knows callers by the keys that their calls carry.

    Args:
        keys: The known ones; none: nobody needs one.
    """

    def __init__(self, keys: Sequence[ApiKey] = ()) -> None:
        self._known = [(_digest(key.key), key.tenant) for key in keys]

    def tenant_of(self, metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
        """Return the tenant of a call.

        Args:
            metadata: That the call came with.

        Raises:
            UnauthenticatedError: It has no key, more than one, or one that is not known.
        """
        if not self._known:
            return UNNAMED
        shown = [str(value) for name, value in metadata or () if name == API_KEY_HEADER]
        if not shown:
            raise UnauthenticatedError(f"send the header {API_KEY_HEADER}: {API_KEY_PREFIX}API_KEY")
        scheme, _, key = shown[0].partition(" ")
        digest = _digest(key.strip())
        tenants = [tenant for known, tenant in self._known if hmac.compare_digest(digest, known)]
        is_bearer = scheme.lower() == API_KEY_PREFIX.strip().lower()
        if len(shown) > 1 or not is_bearer or not tenants:
            raise UnauthenticatedError("the API key is not known")
        return tenants[0]


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without a known key, whether or not there is such a method.

    Args:
        callers: Knows the keys.
    """

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the call's handler, or one that refuses the call."""
        method = handler_call_details.method
        if not method.startswith(OPEN_SERVICE):
            try:
                tenant = self._callers.tenant_of(handler_call_details.invocation_metadata)
            except UnauthenticatedError as error:
                return _refusal(error)
            if tenant != UNNAMED and _changes_the_service(method):
                detail = "a key without a tenant is needed to change the service"
                return _refusal(PermissionDeniedError(detail))
        return await continuation(handler_call_details)


def _changes_the_service(method: str) -> bool:
    service, _, name = method.rpartition("/")
    return f"{service}/" == OPERATORS_SERVICE and name not in LOOKS


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _refusal(error: ExpertMeshError) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that ends any kind of call at once, before its first message."""

    async def refuse(requests: AsyncIterator[Any], context: Any) -> None:
        await context.abort(error.code, error.message, error.trailers())

    return grpc.stream_stream_rpc_method_handler(refuse)
