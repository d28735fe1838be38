"""The RPC boundary: what a handler raises becomes a status with details.

An `ExpertMeshError` keeps its code, reason and fields. Anything else is a fault of ours: it is
logged with its traceback under the request id, and the client gets that id and no internals.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from protos.errors import ExpertMeshError, InternalError
from protos.ids import new_request_id

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 5.0
"""How long a client may take to receive the status of a call that failed."""

Context = grpc.aio.ServicerContext[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler that is a coroutine function or an async generator."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler with its errors mapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        streams = (handler.request_streaming, handler.response_streaming)
        attribute, make = _KINDS[streams]
        function = getattr(handler, attribute)
        if inspect.isasyncgenfunction(function):
            wrapped: Any = _wrap_generator(function, method)
        elif inspect.iscoroutinefunction(function):
            wrapped = _wrap_coroutine(function, method)
        else:
            return handler
        return make(
            wrapped,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


_KINDS: dict[tuple[bool, bool], tuple[str, Any]] = {
    (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
}


def _wrap_coroutine(function: Any, method: str) -> Any:
    async def call(request: Any, context: Context) -> Any:
        try:
            return await function(request, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(error, request, context, method)

    return call


def _wrap_generator(function: Any, method: str) -> Any:
    async def stream(request: Any, context: Context) -> Any:
        try:
            async for message in function(request, context):
                yield message
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(error, request, context, method)

    return stream


async def _abort(error: Exception, request: Any, context: Context, method: str) -> None:
    if not isinstance(error, ExpertMeshError):
        request_id = getattr(request, "request_id", "") or new_request_id()
        logger.error("rpc.failed method=%s id=%s", method, request_id, exc_info=error)
        error = InternalError(f"unexpected {type(error).__name__}", request_id)
    try:
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            await context.abort(error.code, error.message, error.trailers())
    except TimeoutError:
        # Behind messages that the client does not read, the status is not sent either: drop the
        # call, which resets its stream.
        logger.info("rpc.dropped method=%s error=%s", method, error.reason)
        raise asyncio.CancelledError from error
