"""A whole service with TLS on every port, client certificates and API keys."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest

from cluster.status import ask_status
from protos.client import Client, ClientConfig
from protos.errors import UnauthenticatedError, UnreachableError
from protos.tls import Access, ClientTls
from protos.v1 import experts_pb2, experts_pb2_grpc
from tests.certificates import SERVER_ONLY, Authority
from tests.integration.served import Served, run_cli
from tests.ports import free_port

pytestmark = pytest.mark.timeout(400)

KEY, OTHER_KEY = "sk-first-secret", "sk-second-secret"
PROMPT = [5, 6, 7]
ONCE = ClientConfig(timeout_s=60, short_timeout_s=10, max_attempts=1)


def tokens_of(address: str, tls: ClientTls | None = None, api_key: str | None = None) -> list[int]:
    with Client(address, ONCE, tls=tls, api_key=api_key) as client:
        answer = client.complete(PROMPT, max_tokens=8, temperature=0.0, ignore_eos=True)
        return list(answer.token_ids)


def test_a_service_with_tls_and_keys_everywhere(
    served: Served, checkpoint: Path, tmp_path: Path
) -> None:
    ports, clients, members = (
        Authority(tmp_path, name) for name in ("ports", "clients", "members")
    )
    port = ports.issue("port", names=("127.0.0.1", "mesh.test"), usages=SERVER_ONLY)
    client = clients.issue("client")
    member = members.issue("member", names=("member.test",))
    status_port = free_port()
    keys = tmp_path / "keys"
    keys.write_text(f"{OTHER_KEY}\n")
    flags = (
        *("--expert-groups", "2", "--routers", "2", "--no-state"),
        *("--status-port", str(status_port)),
        *("--ssl-keyfile", str(port.keyfile), "--ssl-certfile", str(port.certfile)),
        *("--ssl-ca-certs", str(clients.certfile), "--api-key-file", str(keys)),
        *("--cluster-ssl-keyfile", str(member.keyfile)),
        *("--cluster-ssl-certfile", str(member.certfile)),
        *("--cluster-ssl-ca-certs", str(members.certfile)),
    )
    tls = ClientTls.from_files(ports.certfile, client.certfile, client.keyfile)
    with Served(checkpoint, *flags, env={"EXPERTMESH_ROUTER__API_KEYS": KEY}) as service:
        address = service.address
        expected = tokens_of(served.address)
        assert len(expected) == 8
        assert tokens_of(address, tls, KEY) == expected
        assert tokens_of(f"grpcs://{address}", tls, OTHER_KEY) == expected

        with pytest.raises(UnauthenticatedError, match="not known"):
            tokens_of(address, tls, "sk-third")
        with pytest.raises(UnauthenticatedError, match="API_KEY"):
            tokens_of(address, tls)
        for stranger in (None, ClientTls.from_files(ports.certfile)):
            with pytest.raises(UnreachableError):
                tokens_of(address, stranger, KEY)

        environment = {
            "EXPERTMESH_TLS_CA": str(ports.certfile),
            "EXPERTMESH_TLS_CERT": str(client.certfile),
            "EXPERTMESH_TLS_KEY": str(client.keyfile),
            "EXPERTMESH_API_KEY": KEY,
        }
        ids = run_cli("status", "--url", address, "--json", env=environment)
        assert ids.returncode == 0, ids.stderr
        status = json.loads(ids.stdout)
        assert [router["state"] for router in status["routers"]] == ["READY", "READY"]
        assert [group["state"] for group in status["groups"]] == ["READY", "READY"]
        assert {group["transport"] for group in status["groups"]} == {"lane-unix"}
        front = f"127.0.0.1:{status_port}"
        told = run_cli("status", "--url", front, "--json", env=environment)
        assert told.returncode == 0, told.stderr
        assert [router["state"] for router in json.loads(told.stdout)["routers"]] == ["READY"] * 2
        for stranger in (None, ClientTls.from_files(ports.certfile)):
            with pytest.raises(UnreachableError):
                ask_status(front, Access(tls=stranger, api_key=KEY))
        with pytest.raises(UnauthenticatedError):
            ask_status(front, Access(tls=tls, api_key="sk-third"))
        refused = run_cli("status", "--url", address, env={**environment, "EXPERTMESH_API_KEY": ""})
        assert "not authenticated" in refused.stderr
        assert refused.returncode != 0
        text = run_cli("complete", "Once", "--url", address, "--max-tokens", "4", env=environment)
        assert text.returncode == 0, text.stderr

        group = status["groups"][0]["grpc_address"]
        for access in (Access(), Access(tls=tls)):
            with access.channel(group) as channel:
                stub = experts_pb2_grpc.ExpertServiceStub(channel)
                with pytest.raises(grpc.RpcError) as raised:
                    stub.GetState(experts_pb2.GetStateRequest(), timeout=10)
            assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    said = "".join(service.errors) + service.ready
    assert KEY not in said
    assert OTHER_KEY not in said


def test_a_wrong_certificate_is_said_before_anything_starts(
    checkpoint: Path, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    old = authority.issue("old", days=-1)
    answer = run_cli(
        *("serve", str(checkpoint), "--port", "0"),
        *("--ssl-keyfile", str(old.keyfile), "--ssl-certfile", str(old.certfile)),
    )
    assert answer.returncode == 3
    assert "router.ssl_certfile has expired" in answer.stderr
