"""Asks a router for one token: the whole path works, and is warm."""

from __future__ import annotations

import grpc

from protos.errors import from_rpc_error
from protos.tls import Access
from protos.v1 import generation_pb2, generation_pb2_grpc


def check_answers(address: str, timeout_s: float, access: Access) -> None:
    """Ask for a token and wait for it.

    The port is open already: a connection that fails is an error at once, not after the timeout.

    Raises:
        ExpertMeshError: What the router answered.
    """
    request = generation_pb2.GenerateRequest(
        tokens=generation_pb2.TokenIds(ids=[0]),
        sampling=generation_pb2.Sampling(temperature=0.0),
        stopping=generation_pb2.Stopping(max_tokens=1, ignore_eos=True),
    )
    with access.channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        try:
            for _ in stub.Generate(request, timeout=timeout_s):
                pass
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
