"""What `expertmesh top` makes of two statuses, and whom it asks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.status import StatusAsker
from cluster.top import view_of
from cluster.top_screen import heat, screen
from protos.errors import UnreachableError
from protos.tls import Access
from protos.v1 import cluster_pb2


def service(step: int) -> cluster_pb2.ClusterStatus:
    """Two routers and two groups, `step` half seconds after their start."""
    latency = cluster_pb2.LatencyStatus(
        bounds_s=[0.1, 0.2], first_token=[4 * step, 0, 0], between_tokens=[0, 8 * step, 0]
    )
    return cluster_pb2.ClusterStatus(
        model="tiny",
        placement_epoch=3,
        routers=[
            cluster_pb2.RouterStatus(
                router_id="router-0", state="READY", grpc_address="h:1", pid=1, kv_blocks_used=3,
                kv_blocks_total=4, state_slots_total=2, generation_tokens=10 * step,
                step_s=0.4 * step, dispatch_s=0.1 * step, latency=latency, requests_waiting=5,
            ),
            cluster_pb2.RouterStatus(router_id="router-1", state="LOST", grpc_address="h:2"),
        ],
        groups=[
            cluster_pb2.GroupStatus(
                group_id=name, state="READY", pid=2, busy_s=0.2 * step,
                num_pairs=sum(pairs) * step, layer_pairs=[p * step for p in pairs],
            )
            for name, pairs in (("a", (30, 10)), ("b", (10, 10)))
        ],
    )  # fmt: skip


def test_a_view_says_what_happened_between_two_statuses() -> None:
    view = view_of(service(1), service(3), 1.0)
    router, lost = view.routers
    assert (router.generation_tokens_per_s, router.kv_usage) == (20.0, 0.75)
    assert (router.step_share, router.dispatch_share) == (pytest.approx(0.8), pytest.approx(0.25))
    assert (lost.state, lost.generation_tokens_per_s) == ("LOST", None)
    assert [group.busy for group in view.groups] == [pytest.approx(0.4)] * 2
    assert [group.layer_shares for group in view.groups] == [(0.75, 0.5), (0.25, 0.5)]
    assert view.balancedness == pytest.approx(0.5 / 0.75)
    assert view.ttft_ms["p50"] == pytest.approx(50.0)
    assert view.itl_ms["p50"] == pytest.approx(150.0)
    assert view.document()["groups"][0]["layer_shares"] == (0.75, 0.5)


def test_a_service_that_rests_shows_what_it_did_before() -> None:
    view = view_of(service(3), service(3), 1.0)
    assert view.groups[0].layer_shares == (0.75, 0.5)
    assert view.ttft_ms["p50"] == pytest.approx(50.0)
    assert view.routers[0].generation_tokens_per_s == 0.0


def test_a_service_without_load_has_no_shares_and_no_latencies() -> None:
    view = view_of(None, service(0), 0.0)
    assert view.groups[0].layer_shares == ()
    assert view.balancedness is None
    assert set(view.ttft_ms.values()) == {None}


def test_a_group_that_came_later_has_no_part_in_what_was_before() -> None:
    before, after = service(1), service(3)
    del before.groups[1]
    view = view_of(before, after, 1.0)
    assert [group.layer_shares for group in view.groups] == [(1.0, 1.0), (0.0, 0.0)]


def test_cells_get_darker_with_the_part_of_the_load() -> None:
    # of two groups, an even part is 0.5: in the middle of the shades
    assert heat((0.0, 0.01, 0.5, 1.0), 2).plain == " ░▒█"


def test_the_screen_shows_members_and_figures() -> None:
    out = io.StringIO()
    Console(file=out, width=240).print(screen(view_of(service(1), service(3), 1.0)))
    for text in ("tiny", "epoch 3", "tokens/s out 20.0", "TTFT 50 /", "router-1", "LOST", "75%"):
        assert text in out.getvalue(), text
    assert "▓▒" in out.getvalue(), "the first group: 1.5 and 1 of an even part"


class Routers:
    """Answers at the addresses that live."""

    def __init__(self) -> None:
        self.alive = {"grpc://h:1", "grpc://h:2"}
        self.asked: list[str] = []

    def ask(self, url: str, access: Access) -> cluster_pb2.ClusterStatus:
        self.asked.append(url)
        if url not in self.alive:
            raise UnreachableError(url)
        return service(1)


def test_when_a_router_dies_another_one_is_asked() -> None:
    routers = Routers()
    asker = StatusAsker("grpc://h:1", Access(), routers.ask)
    asker.status()
    routers.alive = {"grpc://h:2"}
    asker.status()
    asker.status()
    assert routers.asked == ["grpc://h:1", "grpc://h:1", "grpc://h:2", "grpc://h:2"]
    routers.alive = set()
    with pytest.raises(UnreachableError, match="h:2"):
        asker.status()
