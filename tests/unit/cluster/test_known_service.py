"""What a router believes of the service when its news overtake each other."""

from __future__ import annotations

from cluster.known_service import KnownService
from cluster.members import ServiceView


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
    members = KnownService("router-0")
    for version, is_settled in ((1, False), (3, True), (2, False)):
        members.learn(view(version, is_settled=is_settled))
    assert members.routers == {"router-0": "10.0.0.1:3"}
    scaling = members.scaling()
    assert scaling is not None
    assert scaling.is_settled
