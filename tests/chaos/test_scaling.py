"""The numbers of expert groups and routers change under traffic, and groups die; nobody notices.

Real Ray, real processes: no request may fail, and every token is the one of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.status import ask_status
from protos.errors import ExpertMeshError
from protos.v1 import cluster_pb2
from tests.chaos.traffic import Traffic
from tests.eventually import eventually
from tests.integration.served import Served, run_cli
from tests.parity.checkpoints import make_checkpoint

pytestmark = pytest.mark.timeout(420)

CHANGE_S = 150.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One group and one router of a tiny mixture of experts in float32."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("scaling"), tokenizer=True)
    flags = ("--expert-groups", "1", "--shutdown-timeout", "3")
    with Served(checkpoint, *flags) as served:
        yield served


@pytest.fixture(scope="module")
def traffic(service: Served) -> Iterator[Traffic]:
    with Traffic([service.address]) as running:
        yield running
    assert running.failures == []
    assert running.is_whole()


def scale(service: Served, *numbers: str) -> dict[str, Any]:
    answer = run_cli(
        *("scale", "--url", service.address, "--wait", "--timeout", str(CHANGE_S), "--json"),
        *numbers,
        timeout_s=CHANGE_S + 30,
    )
    assert answer.returncode == 0, answer.stderr
    document: dict[str, Any] = json.loads(answer.stdout)
    return document


def groups(service: Served) -> dict[str, cluster_pb2.GroupStatus]:
    return {group.group_id: group for group in ask_status(service.address).groups}


def goes_on(traffic: Traffic) -> None:
    """Wait until every client has had an answer more."""
    before = traffic.num_done
    eventually(lambda: traffic.num_done >= before + 3 or bool(traffic.failures), CHANGE_S)
    assert traffic.failures == []


def test_groups_come_and_go(service: Served, traffic: Traffic) -> None:
    whole = groups(service)["group-0"]
    assert scale(service, "--expert-groups", "3")["target_groups"] == 3
    three = groups(service)
    assert sorted(three) == ["group-0", "group-1", "group-2"]
    assert sum(g.num_experts for g in three.values()) == whole.num_experts, "old copies are gone"
    assert three["group-0"].resident_bytes < whole.resident_bytes
    assert three["group-0"].pid == whole.pid
    goes_on(traffic)
    assert all(g.num_calls > 0 for g in groups(service).values())
    scale(service, "--expert-groups", "2")
    two = groups(service)
    assert sorted(two) == ["group-0", "group-1"]
    assert [two[g].pid for g in two] == [three[g].pid for g in two]
    assert sum(g.num_experts for g in two.values()) == whole.num_experts
    goes_on(traffic)


def test_a_group_that_is_killed_is_not_missed(service: Served, traffic: Traffic) -> None:
    scale(service, "--expert-groups", "2")
    doomed = groups(service)["group-1"]
    epoch = ask_status(service.address).placement_epoch
    os.kill(doomed.pid, signal.SIGKILL)

    def is_back() -> bool:
        status = ask_status(service.address)
        now = {g.group_id: g for g in status.groups}
        is_settled = status.scaling.is_settled and status.placement_epoch > epoch
        return is_settled and now["group-1"].pid != doomed.pid

    eventually(is_back, CHANGE_S, 0.2)
    goes_on(traffic)
    assert all(group.num_experts > 0 for group in groups(service).values())
    assert any("group-1 died" in line for line in service.errors)


def test_the_only_router_is_killed_and_streams_wait_for_it(
    service: Served, traffic: Traffic
) -> None:
    """Every client is in a stream or about to ask, and there is nobody else to go to."""
    [doomed] = ask_status(service.address).routers
    os.kill(doomed.pid, signal.SIGKILL)

    def is_back() -> bool:
        try:
            [now] = ask_status(service.address).routers
        except ExpertMeshError:
            return False
        return now.state == "READY" and now.pid != doomed.pid

    eventually(is_back, CHANGE_S, 0.2)
    goes_on(traffic)
    assert any("router-0 died" in line for line in service.errors)


def test_routers_come_and_go(service: Served, traffic: Traffic) -> None:
    scale(service, "--routers", "2")

    def ready() -> list[str]:
        routers = ask_status(service.address).routers
        return [router.grpc_address for router in routers if router.state == "READY"]

    _, second = eventually(lambda: found if len(found := ready()) == 2 else None, 30)
    with Traffic([second, service.address]) as both:
        goes_on(both)
        scale(service, "--routers", "1")
        goes_on(both)
    assert both.failures == []
    assert both.is_whole()
    with pytest.raises(ExpertMeshError):
        ask_status(second)
    assert [r.router_id for r in ask_status(service.address).routers] == ["router-0"]
    goes_on(traffic)


def test_a_group_is_drained_by_name_and_stays_away(service: Served, traffic: Traffic) -> None:
    scale(service, "--expert-groups", "2")
    answer = run_cli(
        *("drain", "group-0", "--url", service.address, "--timeout", str(CHANGE_S)),
        timeout_s=CHANGE_S + 30,
    )
    assert answer.returncode == 0, answer.stderr
    assert "group-0 was drained" in answer.stdout
    assert sorted(groups(service)) == ["group-1"]
    goes_on(traffic)
    refused = run_cli("drain", "group-1", "--url", service.address)
    assert refused.returncode == 2, refused.stderr
    assert "must not be the only expert group" in refused.stderr


def test_numbers_that_cannot_be_are_refused(service: Served) -> None:
    refused = run_cli("scale", "--expert-groups", "9", "--url", service.address)
    assert "expert_groups must be 1 to 8, the experts of a layer, got 9" in refused.stderr
    assert refused.returncode == 2
