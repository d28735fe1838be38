"""The load decides how many routers there are: one more comes, and goes, and nobody notices.

Real Ray, real processes: no request may fail, and every token is the one of an undisturbed run.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cluster.autoscale_explain import ask_decisions
from cluster.autoscale_log import changes_something
from cluster.status import ask_status
from protos.tls import Access
from tests.chaos.traffic import Traffic
from tests.eventually import eventually
from tests.integration.served import Served
from tests.parity.checkpoints import make_checkpoint

pytestmark = pytest.mark.timeout(420)

CHANGE_S = 150.0
SETTINGS = {
    # Three clients are more than one router is to have, by far; none are none.
    "EXPERTMESH_AUTOSCALE__TARGET_ONGOING_REQUESTS": "1",
    "EXPERTMESH_AUTOSCALE__INTERVAL_S": "0.5",
}


def test_a_router_comes_with_the_load_and_goes_with_it(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", tokenizer=True)
    flags = ("--autoscale", "apply", "--max-routers", "2", "--expert-groups", "1")
    delays = ("--upscale-delay", "1", "--downscale-delay", "3", "--shutdown-timeout", "3")
    with Served(checkpoint, *flags, *delays, env=SETTINGS) as service:

        def ready() -> int:
            return sum(r.state == "READY" for r in ask_status(service.address).routers)

        with Traffic([service.address]) as traffic:
            eventually(lambda: ready() == 2, CHANGE_S, 0.2)
            before = traffic.num_done
            eventually(lambda: traffic.num_done >= before + 3 or traffic.failures, CHANGE_S)
        assert traffic.failures == []
        assert traffic.is_whole()
        eventually(lambda: len(ask_status(service.address).routers) == 1, CHANGE_S, 0.2)
        decisions = ask_decisions(service.address, Access(), 64).decisions
        changes = [d.routers for d in decisions if changes_something(d)]
        # A decision may be repeated before the first one of its kind is carried out.
        steps = [step for step, _ in itertools.groupby((c.count, c.wanted) for c in changes)]
        assert steps == [(1, 2), (2, 1)]
        assert changes[0].reason.startswith("requests: ")
