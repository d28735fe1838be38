"""Sessions of a real service: any router continues them, the command line shows them."""

from __future__ import annotations

import json

import grpc
import pytest

from cluster.status import ask_status
from protos.v1 import generation_pb2, generation_pb2_grpc, session_pb2, session_pb2_grpc
from tests.integration.served import Served, run_cli

pytestmark = pytest.mark.timeout(400)

NUM_NEW = 6
TURNS = ([5, 6, 7], [50, 60], [500, 400, 300, 200])


def turn(address: str, session_id: str, ids: list[int]) -> list[generation_pb2.GenerateResponse]:
    request = generation_pb2.GenerateRequest(
        session_id=session_id,
        tokens=generation_pb2.TokenIds(ids=ids),
        sampling=generation_pb2.Sampling(temperature=0.0),
        stopping=generation_pb2.Stopping(max_tokens=NUM_NEW, ignore_eos=True),
    )
    with grpc.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        return list(stub.Generate(request, timeout=60))


def create(address: str, session_id: str) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        stub.CreateSession(session_pb2.CreateSessionRequest(session_id=session_id), timeout=30)


def tokens_of(messages: list[generation_pb2.GenerateResponse]) -> list[int]:
    return [token for message in messages for token in message.token_ids]


def test_any_router_continues_a_session(served: Served) -> None:
    routers = [router.grpc_address for router in ask_status(served.address).routers]
    answers: dict[str, list[list[int]]] = {}
    for name, order in {"staying": (0, 0, 0), "wandering": (0, 1, 0)}.items():
        create(routers[0], name)
        turns = [turn(routers[router], name, ids) for router, ids in zip(order, TURNS, strict=True)]
        answers[name] = [tokens_of(messages) for messages in turns]
        assert all(messages[-1].finished.persisted for messages in turns)
        assert [messages[0].accepted.turn for messages in turns] == [1, 2, 3]
    assert answers["wandering"] == answers["staying"]
    assert all(len(tokens) == NUM_NEW for tokens in answers["staying"])


def test_the_command_line_lists_shows_forks_and_deletes(served: Served) -> None:
    def run(*words: str) -> str:
        answer = run_cli("sessions", *words, "--url", served.address)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    create(served.address, "first")
    turn(served.address, "first", TURNS[0])
    turn(served.address, "first", TURNS[1])
    listed = {session["session_id"]: session for session in json.loads(run("list", "--json"))}
    assert listed["first"]["num_tokens"] == len(TURNS[0]) + len(TURNS[1]) + 2 * NUM_NEW
    assert "first" in run("list")
    shown = json.loads(run("show", "first", "--json"))
    assert [t["completion_tokens"] for t in shown["turns"]] == [NUM_NEW, NUM_NEW]
    assert "length" in run("show", "first")
    forked = json.loads(run("fork", "first", "--new-id", "second", "--at-tokens", "4", "--json"))
    assert (forked["session_id"], forked["num_tokens"]) == ("second", 4)
    assert run("delete", "first") == "first deleted\n"
    gone = run_cli("sessions", "delete", "first", "second", "--json", "--url", served.address)
    assert gone.returncode == 5
    assert json.loads(gone.stdout) == {"first": False, "second": True}
    assert run_cli("sessions", "show", "first", "--url", served.address).returncode == 2
