"""What a router believes of the service when its news overtake each other."""

from __future__ import annotations

from cluster.config import load_config
from cluster.members import ServiceView
from cluster.router_process import RouterProcess


def view(version: int, *, is_settled: bool) -> ServiceView:
    return ServiceView(
        version=version,
        groups=(),
        routers={"router-0": f"10.0.0.1:{version}"},
        target_groups=1,
        target_routers=1,
        change="",
        trouble="",
        is_settled=is_settled,
    )


def test_older_news_that_come_later_are_left_out() -> None:
    router = RouterProcess("router-0", load_config({"model.checkpoint": "/c"}).config)
    for version, is_settled in ((1, False), (3, True), (2, False)):
        router.set_view(view(version, is_settled=is_settled))
    assert router.router_addresses() == {"router-0": "10.0.0.1:3"}
    assert router._service is not None
    assert router._service.is_settled
