"""`top` and `autoscale explain` of a real service."""

from __future__ import annotations

import json

import pytest

from cluster.autoscale_explain import ask_decisions
from cluster.status import ask_status
from protos.tls import Access
from protos.v1 import cluster_pb2
from tests.eventually import eventually
from tests.integration.served import Served, run_cli
from tests.integration.test_serving import greedy_tokens

pytestmark = pytest.mark.timeout(400)


def test_top_shows_what_routers_and_groups_do(served: Served) -> None:
    greedy_tokens(served.address)
    answer = run_cli("top", "--url", served.address, "--once", "--json", "--interval", "0.2")
    assert answer.returncode == 0, answer.stderr
    view = json.loads(answer.stdout)
    assert [router["state"] for router in view["routers"]] == ["READY", "READY"]
    assert all(router["generation_tokens_per_s"] is not None for router in view["routers"])
    big, small = view["groups"]
    # 4 layers; every pair was computed by one of the two
    assert len(big["layer_shares"]) == 4
    for shares in zip(big["layer_shares"], small["layer_shares"], strict=True):
        assert sum(shares) == pytest.approx(1.0)
    assert 0 < view["ttft_ms"]["p50"] < 60_000
    assert 0 < view["itl_ms"]["p50"] <= view["itl_ms"]["p99"]
    plain = run_cli("top", "--url", served.address, "--once", "--interval", "0.2")
    assert "router-1" in plain.stdout
    assert "\x1b[" not in plain.stdout


def test_every_router_explains_what_was_decided(served: Served) -> None:
    for router in ask_status(served.address).routers:

        def decided(address: str = router.grpc_address) -> cluster_pb2.AutoscaleDecision:
            answer = ask_decisions(address, Access(), 1)
            assert answer.mode == "advise"
            assert answer.decisions
            assert answer.decisions[-1].load.HasField("group_busy")
            return answer.decisions[-1]

        last = eventually(decided, timeout_s=60.0)
        assert (last.routers.count, last.routers.ready) == (2, 2)
        assert (last.groups.count, last.groups.ready) == (2, 2)
        assert {signal.name for signal in last.groups.signals} == {"busy"}
    shown = run_cli("autoscale", "explain", "--url", served.address)
    assert shown.stdout.startswith("autoscale advise")
    line = run_cli("autoscale", "explain", "--url", served.address, "--last", "1", "--json").stdout
    assert json.loads(line.splitlines()[-1])["groups"]["count"] == 2
