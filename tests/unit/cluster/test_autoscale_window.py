"""Statuses in, load and pools out; rates and percentiles between two statuses."""

from __future__ import annotations

import pytest

from cluster.autoscale_window import StatusWindow
from cluster.rates import first_token_percentile, group_rates, router_rates, token_percentile
from protos.v1 import cluster_pb2

BOUNDS = [0.1, 0.2, 0.4]


def router(name: str = "router-0", **fields: object) -> cluster_pb2.RouterStatus:
    values: dict[str, object] = {
        "state": "READY",
        "pid": 7,
        "kv_blocks_total": 100,
        "state_slots_total": 10,
        "prefill_tokens_per_s": 1000.0,
        **fields,
    }
    return cluster_pb2.RouterStatus(router_id=name, **values)  # type: ignore[arg-type]


def group(name: str = "group-0", **fields: object) -> cluster_pb2.GroupStatus:
    values = {"state": "READY", "pid": 8, **fields}
    return cluster_pb2.GroupStatus(group_id=name, **values)  # type: ignore[arg-type]


def status(
    *members: cluster_pb2.RouterStatus | cluster_pb2.GroupStatus,
) -> cluster_pb2.ClusterStatus:
    made = cluster_pb2.ClusterStatus()
    for member in members:
        if isinstance(member, cluster_pb2.RouterStatus):
            made.routers.append(member)
        else:
            made.groups.append(member)
    return made


def window() -> StatusWindow:
    return StatusWindow(look_back_s=10.0, stale_s=6.0)


def test_rates_are_differences_of_one_process() -> None:
    before = router(prompt_tokens=100, waiting_tokens=50, generation_tokens=10, step_s=1.0)
    after = router(
        prompt_tokens=300, waiting_tokens=150, generation_tokens=30, step_s=3.0, dispatch_s=0.5
    )
    rates = router_rates(before, after, 4.0)
    assert rates is not None
    assert (rates.prompt_tokens_per_s, rates.generation_tokens_per_s) == (50.0, 5.0)
    assert rates.arriving_tokens_per_s == 75.0  # (200 computed + 100 more that wait) / 4
    assert (rates.step_share, rates.dispatch_share) == (0.5, 0.25)
    after.pid = 9
    assert router_rates(before, after, 4.0) is None
    lost = group(state="LOST")
    assert group_rates(group(), lost, 4.0) is None


def test_a_groups_rates_are_by_layer() -> None:
    before = group(busy_s=1.0, num_pairs=10, layer_pairs=[4, 6])
    rates = group_rates(before, group(busy_s=3.0, num_pairs=50, layer_pairs=[24, 26]), 4.0)
    assert rates is not None
    assert (rates.busy, rates.pairs_per_s, rates.layer_pairs) == (0.5, 10.0, (20, 20))


def test_percentiles_lie_on_straight_lines_between_bounds() -> None:
    latency = cluster_pb2.LatencyStatus(
        bounds_s=BOUNDS, first_token=[0, 10, 0, 0], between_tokens=[4, 0, 0, 1]
    )
    after = router(latency=latency)
    # the 5th of 10 in (0.1, 0.2]
    assert first_token_percentile([(None, after)], 50) == pytest.approx(0.15)
    assert token_percentile([(None, after)], 95) == 0.4, "above the last bound: that bound"
    before = router(latency=cluster_pb2.LatencyStatus(bounds_s=BOUNDS, first_token=[0, 10, 0, 0]))
    assert first_token_percentile([(before, after)], 50) is None, "nothing came in between"
    restarted = router(pid=9, latency=latency)
    assert first_token_percentile([(before, restarted)], 50) == pytest.approx(0.15)


def test_the_load_sums_over_routers_and_averages_over_groups() -> None:
    seen = window()
    for at_s, tokens, busy_s in ((0.0, 0, 0.0), (10.0, 2000, 5.0)):
        latency = cluster_pb2.LatencyStatus(bounds_s=BOUNDS, first_token=[tokens, 0, 0, 0])
        one = router(
            prompt_tokens=tokens, waiting_tokens=30, requests_running=2, requests_waiting=1,
            kv_blocks_used=50, state_slots_used=2, latency=latency,
        )  # fmt: skip
        other = router("router-1", prompt_tokens=tokens, prefill_tokens_per_s=0.0)
        seen.add(
            at_s, status(one, other, group(busy_s=busy_s), group("group-1", busy_s=2 * busy_s))
        )
    load = seen.load(10.0)
    assert (load.prompt_tokens_per_s, load.waiting_tokens, load.num_requests) == (400.0, 30.0, 3.0)
    assert load.requests_per_s == 200.0, "2,000 first tokens of one router in 10 s"
    assert (load.kv_usage, load.state_slot_usage) == (0.25, 0.1)
    assert load.prefill_tokens_per_s == 1000.0, "0 is not measured"
    assert load.group_busy == 0.75
    assert load.ttft_s == pytest.approx(0.095)
    assert load.itl_s is None
    routers, groups = seen.pools(10.0, 2, 3)
    assert (routers.ready, routers.unknown) == (2, 0)
    assert (groups.count, groups.ready) == (3, 2), "one is still to start"


def test_a_silent_member_is_as_it_was_until_it_is_unknown() -> None:
    seen = window()
    seen.add(0.0, status(router(requests_running=4), router("router-1", requests_running=2)))
    lost = cluster_pb2.RouterStatus(router_id="router-1", state="LOST")
    for at_s in (2.0, 4.0, 6.0):
        seen.add(at_s, status(router(requests_running=4), lost))
    assert seen.load(6.0).num_requests == 6.0
    assert seen.pools(6.0, 2, 0)[0].unknown == 0
    seen.add(8.0, status(router(requests_running=4), lost))
    assert seen.pools(8.0, 2, 0)[0].unknown == 1
    assert seen.load(8.0).num_requests == 8.0, "taken to be as loaded as the one that is known"


def test_without_any_answer_nothing_is_known() -> None:
    seen = window()
    assert seen.load(0.0).num_requests is None
    assert seen.pools(0.0, 2, 1)[0].ready == 0
    seen.add(0.0, status(router(), group(busy_s=1.0)))
    assert seen.load(60.0).num_requests is None
    assert [pool.unknown for pool in seen.pools(60.0, 1, 1)] == [1, 1]


def test_a_restarted_member_has_no_rate_before_its_second_answer() -> None:
    seen = window()
    seen.add(0.0, status(router(prompt_tokens=5000)))
    seen.add(2.0, status(router(pid=9, prompt_tokens=10)))
    assert seen.load(2.0).prompt_tokens_per_s is None
    seen.add(4.0, status(router(pid=9, prompt_tokens=50)))
    assert seen.load(4.0).prompt_tokens_per_s == 20.0


def test_a_member_that_left_is_forgotten() -> None:
    seen = window()
    seen.add(0.0, status(group(), group("group-1")))
    seen.add(2.0, status(group()))
    assert seen.pools(60.0, 0, 1)[1].unknown == 1


def test_groups_must_hold_every_expert_whichever_leave() -> None:
    seen = window()
    assert seen.groups_to_hold(1) == 1
    seen.add(0.0, status(group(capacity_bytes=100), group("b", capacity_bytes=30)))
    assert [seen.groups_to_hold(need) for need in (30, 31, 130, 500)] == [1, 2, 2, 2]
    seen.add(2.0, status(group(capacity_bytes=100), group("b")))
    assert seen.groups_to_hold(1) == 1, "one that has not said what it can hold changes nothing"
    assert seen.groups_to_hold(101) == 2
