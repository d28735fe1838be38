"""`GenerationService`: from a client's request to the engine, and its output back.

Decides how long a request lives: it ends with its last sequence, with its deadline, with
`CancelRequests`, or with its client. Every way out goes through `LiveRequests.enter`, which frees
what the engine still holds. Must not know the model or the cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc

from protos.errors import DeadlineExceededError, UnsupportedFeatureError
from protos.ids import is_valid_session_id, new_request_id
from protos.v1 import generation_pb2, generation_pb2_grpc
from protos.validate import validate_cancel, validate_detokenize, validate_tokenize
from router.engine.chain import tenant_namespace
from router.gateway.authentication import Callers
from router.gateway.continuation import SystemPrefixes
from router.gateway.defaults import SamplingDefaults
from router.gateway.forwarding import Forwarder
from router.gateway.live import STALL_TIMEOUT_S, EngineCalls, LiveRequests
from router.gateway.request_reader import RequestReader, ServedModel, in_thread_if_large
from router.gateway.stream import MAX_PENDING_TOKENS, RequestStream
from router.gateway.text import TextProcessor
from router.gateway.turn import SessionTurns
from router.gateway.turn_figures import TurnStats
from router.state.sessions import SessionStore

Context = grpc.aio.ServicerContext[Any, Any]


class GenerationServicer(generation_pb2_grpc.GenerationServiceServicer):
    """Serves one model.

    Args:
        engine: Runs the requests.
        text: The checkpoint's tokeniser and template.
        model: What is served.
        defaults: Values of unset sampling fields.
        clock: The engine's.
        max_pending_tokens: What may wait for one client that reads slowly.
        stall_timeout_s: How long a client may take nothing from its connection.
        address: Returns the router's own `host:port`, for `Accepted`.
        store: Of sessions; None: there are none.
        forwarder: Passes requests on to routers that start them sooner; None: nothing is passed on.
        callers: Says whose calls they are; None: the unnamed tenant's.
        namespace: Of the router's cached values; a tenant's is made of it.
    """

    def __init__(
        self,
        engine: EngineCalls,
        text: TextProcessor,
        model: ServedModel,
        defaults: SamplingDefaults | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_pending_tokens: int = MAX_PENDING_TOKENS,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        address: Callable[[], str] = str,
        store: SessionStore | None = None,
        forwarder: Forwarder | None = None,
        callers: Callers | None = None,
        namespace: str = "",
    ) -> None:
        self._callers = callers or Callers()
        self._namespace = namespace
        self._forwarder = forwarder
        self._store = store
        self._reader = RequestReader(text, model, defaults, max_pending_tokens)
        self._live = LiveRequests(engine, stall_timeout_s)
        self._clock = clock
        self._address = address
        self._prefixes = SystemPrefixes(text)
        self._turns: SessionTurns | None = None
        if store is not None:
            self._turns = SessionTurns(
                store,
                self._reader,
                self._live,
                self._prefixes,
                clock=clock,
                address=address,
                namespace=namespace,
            )

    def turn_stats(self) -> TurnStats | None:
        """Return what turns of sessions have gone through; None where there are no sessions."""
        return None if self._turns is None else self._turns.figures.stats()

    async def settle(self) -> None:
        """Wait, some seconds at most, until every turn that has ended is written."""
        if self._turns is not None:
            await self._turns.settle_all()

    async def Generate(self, request: generation_pb2.GenerateRequest, context: Context) -> None:
        """Stream a request's output; see `generation.proto`."""
        deadline, tenant = self._deadline(context), self._tenant_of(context)
        reader = self._reader
        if request.session_id:
            if self._turns is None:
                raise UnsupportedFeatureError("session_id: this router has no session store")
            if not await self._forwards_turn(request, context, tenant):
                await self._turns.generate(request, context, deadline, tenant)
            return
        prompt_ids = await in_thread_if_large(request.ByteSize(), reader.check_and_encode, request)
        forwarder = self._forwarder
        if forwarder is not None and await forwarder.forward(request, prompt_ids, context, tenant):
            return
        request_id = request.request_id or new_request_id()
        is_resumed = request.HasField("resume_from")
        async with self._live.enter(tenant, request_id, context, takes_over=is_resumed) as live:
            forced_ids = tuple(request.resume_tokens.ids)
            engine_request = reader.engine_request(
                request,
                request_id=live.engine_id,
                prompt_ids=prompt_ids,
                deadline=deadline,
                forced_ids=forced_ids,
                namespace=tenant_namespace(self._namespace, tenant),
                junctions=await in_thread_if_large(
                    request.ByteSize(), self._prefixes.junctions, request, prompt_ids, tenant
                ),
            )
            stream = RequestStream(
                [reader.text_stream(request, forced_ids) for _ in range(engine_request.sampling.n)],
                reader.stream_options(request, len(prompt_ids)),
                on_overflow=lambda: live.release("slow reader"),
                num_sent=request.resume_from,
                num_tokens=len(forced_ids),
            )
            position = live.submit(engine_request, stream.put)
            if not request.resume_from:
                accepted = generation_pb2.Accepted(
                    request_id=request_id,
                    queue_position=position,
                    prompt_tokens=len(prompt_ids),
                    seed=engine_request.sampling.seed,
                    router_address=self._address(),
                )
                await live.write(stream.number(generation_pb2.GenerateResponse(accepted=accepted)))
            while True:
                await stream.wait()
                for message in stream.take():
                    await live.write(message)
                if stream.has_news:  # more came while the client read
                    continue
                if stream.error is not None:
                    raise stream.error
                if stream.is_ended:
                    return

    async def Tokenize(
        self, request: generation_pb2.TokenizeRequest, context: Context
    ) -> generation_pb2.TokenizeResponse:
        """Return the token ids of a text or chat; see `generation.proto`."""
        reader = self._reader
        validate_tokenize(request, reader.limits)

        def encode() -> list[int]:
            if request.WhichOneof("input") == "chat":
                return reader.encode_chat(request.chat)
            add = not request.HasField("add_special_tokens") or request.add_special_tokens
            return reader.text.encode(request.text, add_special_tokens=add)

        return generation_pb2.TokenizeResponse(
            token_ids=await in_thread_if_large(request.ByteSize(), encode),
            max_model_len=reader.model.max_model_len,
        )

    async def Detokenize(
        self, request: generation_pb2.DetokenizeRequest, context: Context
    ) -> generation_pb2.DetokenizeResponse:
        """Return the text of token ids; see `generation.proto`."""
        skip = not request.HasField("skip_special_tokens") or request.skip_special_tokens

        def decode() -> str:
            validate_detokenize(request, self._reader.limits)
            return self._reader.text.decode(list(request.token_ids), skip_special_tokens=skip)

        text = await in_thread_if_large(request.ByteSize(), decode)
        return generation_pb2.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: generation_pb2.ListModelsRequest, context: Context
    ) -> generation_pb2.ListModelsResponse:
        """Return the served model; see `generation.proto`."""
        return generation_pb2.ListModelsResponse(models=[self._reader.description])

    async def CancelRequests(
        self, request: generation_pb2.CancelRequestsRequest, context: Context
    ) -> generation_pb2.CancelRequestsResponse:
        """Cancel requests by id; see `generation.proto`."""
        validate_cancel(request)
        tenant = self._tenant_of(context)
        answer = generation_pb2.CancelRequestsResponse()
        for request_id in dict.fromkeys(request.request_ids):
            live = self._live.get(tenant, request_id)
            is_live = live is not None and live.cancel("CancelRequests")
            if live is None and self._forwarder is not None:
                metadata = context.invocation_metadata() or ()
                is_live = await self._forwarder.cancel(request_id, metadata, tenant)
            (answer.cancelled if is_live else answer.unknown).append(request_id)
        return answer

    async def _forwards_turn(
        self, request: generation_pb2.GenerateRequest, context: Context, tenant: str
    ) -> bool:
        """Pass a session's turn on; return whether another router has served it."""
        forwarder, store = self._forwarder, self._store
        if forwarder is None or store is None or not is_valid_session_id(request.session_id):
            return False
        return await forwarder.forward_turn(
            request, lambda: store.get(tenant, request.session_id), context, tenant
        )

    def _tenant_of(self, context: Context) -> str:
        return self._callers.tenant_of(context.invocation_metadata())

    def _deadline(self, context: Context) -> float | None:
        left_s = context.time_remaining()
        if left_s is None:
            return None
        if left_s <= 0:
            raise DeadlineExceededError("the request, on arrival,")
        return self._clock() + left_s
