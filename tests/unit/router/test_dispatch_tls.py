"""Router and groups over mutual TLS: same bits, no strangers, no plain tensors between hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from experts.placement import Placement
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from experts.service import ExpertServer, start_expert_server
from protos.certificates import CertificateFiles, Identity, member_identity
from protos.errors import ConfigurationError, GroupLostError
from protos.tls import Access, ClientTls
from protos.v1 import experts_pb2, experts_pb2_grpc
from router.gating.dispatch import ExpertDispatcher
from router.gating.transport import lane as lane_module
from tests.certificates import Authority
from tests.parity.checkpoints import SIZES, make_checkpoint

LAYERS, EXPERTS, TOP_K = SIZES["num_layers"], SIZES["num_experts"], SIZES["top_k"]


class Cluster:
    """Two groups that demand the cluster's certificate, and one that demands nothing."""

    def __init__(self, folder: Path) -> None:
        checkpoint = make_checkpoint(folder / "checkpoint")
        self.stranger = Authority(folder, "stranger")
        authority = Authority(folder)
        issued = authority.issue("member", names=("10.11.12.13",))
        found = member_identity(
            CertificateFiles(
                section="cluster",
                keyfile=str(issued.keyfile),
                certfile=str(issued.certfile),
                ca_certs=str(authority.certfile),
            )
        )
        assert found is not None
        self.identity: Identity = found
        self.placement = plan_placement(LAYERS, EXPERTS, {"a": 2.0, "b": 1.0})
        self.plain_placement = plan_placement(LAYERS, EXPERTS, {"plain": 1.0})
        self.servers = [
            self._start(checkpoint, "a", self.placement, found),
            self._start(checkpoint, "b", self.placement, found),
            self._start(checkpoint, "plain", self.plain_placement, None),
        ]

    @staticmethod
    def _start(
        checkpoint: Path, group_id: str, placement: Placement, identity: Identity | None
    ) -> ExpertServer:
        runtime = ExpertRuntime(group_id=group_id, checkpoint=checkpoint, dtype="float32")
        runtime.load(placement)
        return start_expert_server(runtime, "127.0.0.1", tls=identity and identity.server)

    def connect(self, transport: Any, access: Access | None = None) -> ExpertDispatcher:
        """A dispatcher to the groups with TLS."""
        addresses = dict(zip(("a", "b"), (s.address for s in self.servers), strict=False))
        access = access or Access(tls=self.identity.peer)
        return self._connect(self.placement, addresses, transport, access)

    def connect_plain(self) -> ExpertDispatcher:
        """A dispatcher to the group without."""
        addresses = {"plain": self.servers[2].address}
        return self._connect(self.plain_placement, addresses, "grpc", None)

    @staticmethod
    def _connect(
        placement: Placement, addresses: dict[str, str], transport: Any, access: Access | None
    ) -> ExpertDispatcher:
        return ExpertDispatcher.connect(
            placement,
            addresses,
            router_id="router-test",
            hidden=SIZES["hidden_size"],
            top_k=TOP_K,
            dtype=torch.float32,
            transport=transport,
            timeout_s=20.0,
            access=access,
        )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("tls"))
    yield made
    for server in made.servers:
        server.stop()


def output(dispatcher: ExpertDispatcher) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(33, SIZES["hidden_size"], generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(33)])
    weights = torch.rand(33, TOP_K, generator=generator)
    return dispatcher.combine(dispatcher.dispatch(1, rows, ids.to(torch.int32), weights))


def test_tls_changes_no_bit_on_any_transport(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cluster.connect_plain()
    expected = output(plain)
    plain.close()
    for transport, is_here, names in (
        ("grpc", True, ["grpc", "grpc"]),
        ("lane", True, ["lane-unix", "lane-unix"]),
        ("auto", True, ["lane-unix", "lane-unix"]),
        ("auto", False, ["grpc", "grpc"]),
    ):
        if not is_here:
            monkeypatch.setattr(lane_module, "host_id", lambda: "another-host")
        dispatcher = cluster.connect(transport)
        assert [t.name for t in dispatcher.transports] == names
        assert torch.equal(output(dispatcher), expected)
        dispatcher.close()


def test_a_lane_between_hosts_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "host_id", lambda: "another-host")
    with pytest.raises(ConfigurationError, match="group a demands TLS and is on another host"):
        cluster.connect("lane")
    assert [server.lanes.tcp_address for server in cluster.servers[:2]] == [None, None]


def test_a_group_answers_members_only(cluster: Cluster) -> None:
    member = cluster.identity.peer
    impostor = cluster.stranger.issue("impostor", names=("10.11.12.13",))
    strangers = {
        "plain": Access(),
        "no certificate": Access(tls=ClientTls(ca=member.ca, server_name=member.server_name)),
        "another CA's certificate": Access(
            tls=ClientTls(
                ca=member.ca,
                server_name=member.server_name,
                certificate=impostor.certfile.read_bytes(),
                key=impostor.keyfile.read_bytes(),
            )
        ),
    }

    def state(access: Access) -> str:
        with access.channel(cluster.servers[0].address) as channel:
            stub = experts_pb2_grpc.ExpertServiceStub(channel)
            answer = stub.GetState(experts_pb2.GetStateRequest(), timeout=10)
            return str(answer.state)

    assert state(Access(tls=member)) == "READY"
    for who, access in strangers.items():
        with pytest.raises(grpc.RpcError) as raised:
            state(access)
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE, who
        with pytest.raises(GroupLostError):
            output(cluster.connect("grpc", access))


def test_a_member_does_not_send_rows_to_an_impostor(cluster: Cluster) -> None:
    """A group with a certificate of another CA gets no frame."""
    own = cluster.identity.peer
    trusting_others = ClientTls(
        ca=cluster.stranger.certfile.read_bytes(),
        certificate=own.certificate,
        key=own.key,
        server_name=own.server_name,
    )
    dispatcher = cluster.connect("grpc", Access(tls=trusting_others))
    with pytest.raises(GroupLostError, match="CERTIFICATE_VERIFY_FAILED"):
        output(dispatcher)
    dispatcher.close()
    with Access(tls=trusting_others).channel(cluster.servers[0].address) as channel:
        lane = lane_module.LaneTransport("a", channel, "router-test", connect_timeout_s=0.5)
        with pytest.raises(GroupLostError, match="CERTIFICATE_VERIFY_FAILED"):
            lane.open()
