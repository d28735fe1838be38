"""The gRPC services of one router, made of its parts; a service is added here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.config import BatchSection
from cluster.router_experts import RouterExperts
from cluster.router_model import RouterModel
from cluster.router_state import RouterState
from cluster.service import ClusterServicer
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from router.engine.engine import Engine
from router.gateway.authentication import ApiKey, Callers
from router.gateway.batch_roots import BatchRoots
from router.gateway.batches import BatchServicer, BatchTerms
from router.gateway.gating import GatingServicer
from router.gateway.generation import GenerationServicer
from router.gateway.request_reader import ServedModel
from router.gateway.server import (
    GrpcService,
    batch_service,
    gating_service,
    generation_service,
    session_service,
)
from router.gateway.sessions import SessionServicer


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterServices:
    """What a router's port answers."""

    generation: GenerationServicer
    gating: GatingServicer | None
    """None: the model is dense."""
    registered: tuple[GrpcService, ...]
    """All of them, for the server."""


def router_services(
    engine: Engine,
    model: RouterModel,
    *,
    model_name: str,
    address: Callable[[], str],
    api_keys: tuple[ApiKey, ...],
    cluster: ClusterServicer,
    experts: RouterExperts,
    shared: RouterState | None,
    session_ttl_s: float,
    batch: BatchSection,
) -> RouterServices:
    """Make the services of a router whose engine and connections are there.

    Args:
        engine: Runs the requests.
        model: Its text and defaults.
        model_name: As clients call the model.
        address: Returns the router's own `host:port`, once the port is open.
        api_keys: One of them is demanded; none: calls need no key.
        cluster: Answers for the whole service.
        experts: Their second dispatcher serves `GatingService`.
        shared: Sessions and ways to other routers; None: neither.
        session_ttl_s: How long a session lives where its client does not say.
        batch: Which submitted batches are taken.
    """
    callers = Callers(api_keys)
    generation = GenerationServicer(
        engine,
        model.text,
        ServedModel(
            name=model_name,
            model_type=model.config.model_type,
            max_model_len=model.max_model_len,
            vocab_size=model.config.vocab_size,
            dtype=model.dtype_name,
            weights_digest=model.digest,
        ),
        model.defaults,
        address=address,
        store=shared.store if shared else None,
        forwarder=shared.forwarder if shared else None,
        callers=callers,
        namespace=engine.config.namespace,
    )
    services = [
        generation_service(generation),
        GrpcService(
            cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name,
            cluster,
            cluster_pb2_grpc.add_ClusterServiceServicer_to_server,
        ),
    ]
    if shared is not None:
        sessions = SessionServicer(
            shared.store, shared.namespace, callers, default_ttl_s=session_ttl_s
        )
        terms = BatchTerms(model=model_name, roots=BatchRoots(batch.roots), ttl_s=batch.ttl_s)
        batches = BatchServicer(shared.batches, terms, callers)
        services += [session_service(sessions), batch_service(batches)]
    gating = None
    if experts.gating is not None:
        gating = GatingServicer(model.gate, experts.gating, model_name)
        services.append(gating_service(gating))
    return RouterServices(generation=generation, gating=gating, registered=tuple(services))
