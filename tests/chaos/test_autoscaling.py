"""The load decides how many routers there are, and without any the expert groups go.

One more router comes, and leaves, and nobody notices; then the service sleeps until a request,
which waits for the groups.

Real Ray, real processes: no request may fail, and every token is the one of an undisturbed run.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cluster.autoscale_explain import ask_decisions
from cluster.status import ask_status
from protos.client import Client, ClientConfig
from protos.errors import DeadlineExceededError
from protos.tls import Access
from tests.chaos.traffic import CONFIG, PROMPTS, Traffic, generate
from tests.eventually import eventually
from tests.integration.served import Served, run_cli
from tests.parity.checkpoints import make_checkpoint

pytestmark = pytest.mark.timeout(420)

CHANGE_S = 150.0
SETTINGS = {
    # Three clients are more than one router is to have, by far; none are none.
    "EXPERTMESH_AUTOSCALE__TARGET_ONGOING_REQUESTS": "1",
    "EXPERTMESH_AUTOSCALE__INTERVAL_S": "0.5",
    "EXPERTMESH_AUTOSCALE__LOOK_BACK_PERIOD_S": "3",
    "EXPERTMESH_AUTOSCALE__DOWNSCALE_TO_ZERO_DELAY_S": "6",
}


def test_a_router_comes_with_the_load_and_all_groups_go_without_any(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "tiny", tokenizer=True)
    flags = ("--autoscale", "apply", "--max-routers", "2", "--expert-groups", "1")
    delays = ("--upscale-delay", "1", "--downscale-delay", "3", "--shutdown-timeout", "3")
    asleep = ("--min-expert-groups", "0")
    with Served(checkpoint, *flags, *delays, *asleep, env=SETTINGS) as service:

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
        changes = [d.routers for d in decisions if d.routers.count != d.routers.wanted]
        # A decision may be repeated before the first one of its kind is carried out.
        steps = [step for step, _ in itertools.groupby((c.count, c.wanted) for c in changes)]
        assert steps == [(1, 2), (2, 1)]
        assert changes[0].reason.startswith("requests: ")

        eventually(lambda: ask_status(service.address).scaling.is_asleep, CHANGE_S, 0.2)
        assert not ask_status(service.address).groups
        shown = run_cli("status", "--url", service.address)
        assert "asleep: no expert groups until the first request" in shown.stdout
        with (
            Client(service.address, ClientConfig(timeout_s=0.5, max_attempts=1)) as impatient,
            pytest.raises(DeadlineExceededError),
        ):
            generate(impatient, PROMPTS[0])
        with Client(service.address, CONFIG) as client:
            assert generate(client, PROMPTS[2]) == traffic.expected[2], "it waited for the groups"
        assert ask_status(service.address).scaling.target_groups == 1
        assert any("a request waits: the expert groups come back" in e for e in service.errors)
