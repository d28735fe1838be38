"""Ray's own autoscaler brings and ends the nodes of expert groups, with requests all the time.

Nodes are processes of one host (`fake_nodes.py`); Ray, its autoscaler, the service, its own
autoscaler and sockets are real. The tests follow the life of one service, in the order of this
file: it sleeps without a request, the first ones bring both groups back, and one of the groups
leaves again because somebody wants one alone. Every answer is that of an undisturbed run.
"""

from __future__ import annotations

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.status import ask_status
from protos.client import Client, ClientConfig
from protos.errors import DeadlineExceededError
from protos.tls import Access
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from tests.chaos.traffic import PROMPTS, Traffic, generate
from tests.cluster.fake_nodes import FakeNodes
from tests.eventually import eventually

pytestmark = pytest.mark.timeout(600)

CHANGE_S = 240.0
"""Several times what a quiet machine needs for any change."""


@pytest.fixture(scope="module")
def address(fake_nodes: FakeNodes) -> str:
    """A service of two groups that come and go with the load."""
    checkpoint = fake_nodes.folder / "tiny"
    return fake_nodes.serve(
        checkpoint,
        *("--expert-groups", "2", "--autoscale", "apply", "--min-expert-groups", "0"),
        env={
            "EXPERTMESH_AUTOSCALE__INTERVAL_S": "0.5",
            "EXPERTMESH_AUTOSCALE__LOOK_BACK_PERIOD_S": "3",
            "EXPERTMESH_AUTOSCALE__DOWNSCALE_TO_ZERO_DELAY_S": "2",
        },
    )


@pytest.fixture(scope="module")
def expected(fake_nodes: FakeNodes, address: str) -> list[list[int]]:
    """The answers, asked for before anything changes."""
    with Client(address) as client:
        return [generate(client, prompt) for prompt in PROMPTS]


def test_without_requests_the_groups_go_and_ray_ends_their_nodes(
    fake_nodes: FakeNodes, address: str, expected: list[list[int]]
) -> None:
    eventually(lambda: ask_status(address).scaling.is_asleep, CHANGE_S, 0.2)
    status = ask_status(address)
    assert (status.state, list(status.groups)) == ("READY", [])
    assert (status.scaling.target_groups, status.scaling.is_settled) == (0, True)
    eventually(lambda: fake_nodes.num_nodes() == 0, CHANGE_S, 0.2)
    with Access().channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING, "it takes requests"


def test_the_first_requests_bring_them_back_and_wait_within_their_deadlines(
    fake_nodes: FakeNodes, address: str, expected: list[list[int]]
) -> None:
    with (
        Client(address, ClientConfig(timeout_s=0.5, max_attempts=1)) as impatient,
        pytest.raises(DeadlineExceededError),
    ):
        generate(impatient, PROMPTS[0])
    with Traffic([address], expected=expected) as traffic:
        eventually(lambda: traffic.num_done >= 3 or traffic.failures, CHANGE_S)
        # The first group may serve while the other still waits for its node.
        eventually(lambda: len(ask_status(address).groups) == 2, CHANGE_S, 0.2)
        eventually(lambda: fake_nodes.num_nodes() == 2, CHANGE_S, 0.2)
        with Access().channel(address) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            stub.Scale(cluster_pb2.ScaleRequest(expert_groups=1), timeout=20)
        eventually(lambda: len(ask_status(address).groups) == 1, CHANGE_S, 0.2)
        eventually(lambda: fake_nodes.num_nodes() == 1, CHANGE_S, 0.2)
        before = traffic.num_done
        eventually(lambda: traffic.num_done >= before + 3 or traffic.failures, CHANGE_S)
    said = "\n".join(line for _, line in fake_nodes.lines)
    assert traffic.failures == [], said
    assert traffic.is_whole()
    assert "autoscale wants 0 expert groups instead of 2: idle for" in said
