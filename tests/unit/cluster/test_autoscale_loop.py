"""The loop that observes and decides, the log of decisions, and the policy from the settings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.autoscale import Decision, Policy
from cluster.autoscale_batches import BatchWork
from cluster.autoscale_log import NUM_KEPT, DecisionLog, decision_message
from cluster.autoscale_loop import AutoscaleLoop, Membership, policy_of
from cluster.autoscaler import Autoscaler, check_bounds, policy_at_start
from cluster.config import AutoscaleSection, Config
from protos.errors import ConfigurationError, UnreachableError
from protos.v1 import cluster_pb2
from tests.eventually import eventually

SECTION = AutoscaleSection(mode="advise", max_groups=4, interval_s=2.0, upscale_delay_s=2.0)
ADDRESSES = {"router-0": "dead:1", "router-1": "alive:2"}


class Service:
    """Two routers, of which one is dead, and a group that is always busy."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.num_groups = 1
        self.asked: list[str] = []

    def clock(self) -> float:
        return self.now_s

    def ask(self, address: str) -> cluster_pb2.ClusterStatus:
        self.asked.append(address)
        if address.startswith("dead"):
            raise UnreachableError(address)
        return cluster_pb2.ClusterStatus(
            routers=[cluster_pb2.RouterStatus(router_id=r, state="READY") for r in ADDRESSES],
            groups=[
                cluster_pb2.GroupStatus(
                    group_id="group-0", state="READY", busy_s=self.now_s, capacity_bytes=10
                )
            ],
        )

    def loop(self, section: AutoscaleSection = SECTION) -> AutoscaleLoop:
        return AutoscaleLoop(section, policy(section), self.membership, self.ask, clock=self.clock)

    def membership(self) -> Membership:
        return Membership(groups=self.num_groups, num_routers=2, routers=ADDRESSES)


def policy(section: AutoscaleSection = SECTION) -> Policy:
    return policy_of(section, routers=2, groups=1, max_num_seqs=64)


def decisions(number: int) -> list[Decision]:
    service = Service()
    loop = service.loop()
    found = []
    for _ in range(number):
        found.append(loop.decide_once())
        service.now_s += 2.0
    return found


def test_the_next_router_is_asked_when_one_does_not_answer() -> None:
    service = Service()
    loop = service.loop()
    loop.decide_once()
    assert service.asked == ["dead:1", "alive:2"]
    service.now_s = 2.0
    assert loop.decide_once().groups.ready == 1


def test_a_busy_group_gets_company_from_what_was_observed() -> None:
    wanted = [decision.groups.wanted for decision in decisions(3)]
    # no rate yet; wished; wished for the delay of 2 s: 1 * 1.0 / 0.7 = 1.4
    assert wanted == [1, 1, 2]


def test_what_is_left_of_batches_counts_as_load_once_its_pace_is_known() -> None:
    service = Service()
    loop = service.loop()
    found = []
    for done in (0, 100, 100, 1300):
        work = BatchWork(tokens_left=4e5, tokens_done=done)
        waiting = Membership(groups=1, num_routers=2, routers=ADDRESSES, batches=work)
        loop._membership = lambda waiting=waiting: waiting  # type: ignore[misc]
        load = loop.decide_once().load
        found.append((load.batch_tokens, load.batch_tokens_per_s))
        service.now_s += 20.0
    # from the first commit at 20 s to the second at 60 s: 1,200 tokens in 40 s
    assert found == [(4e5, None), (4e5, None), (4e5, None), (4e5, 30.0)]


def test_questions_end_with_the_interval() -> None:
    service = Service()

    def slow(address: str) -> cluster_pb2.ClusterStatus:
        service.now_s += 2.0
        return Service.ask(service, "dead")

    loop = service.loop()
    loop._ask = slow
    decision = loop.decide_once()
    assert service.asked == ["dead"], "no time is left for the second router"
    assert decision.is_hold
    assert decision.routers.reason == "nothing is measured"
    loop._ask = service.ask
    loop.decide_once()
    assert service.asked == ["dead", "alive:2"], "who was silent is asked last"


def test_the_thread_decides_and_ends() -> None:
    service = Service()
    loop = service.loop(replace(SECTION, interval_s=0.1))
    loop.start()
    assert eventually(loop.take)
    loop.close()
    assert not loop._thread.is_alive()


def test_bounds_that_are_not_set_are_the_numbers_at_the_start() -> None:
    assert (policy().routers.least, policy().routers.most) == (2, 2)
    assert (policy().groups.least, policy().groups.most) == (1, 4)
    assert policy().targets.ongoing_requests == 52, "80 % of 64"
    dense = policy_of(SECTION, routers=1, groups=0, max_num_seqs=64)
    assert dense.groups.most == 0


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            replace(SECTION, min_groups=5),
            r"autoscale.min_groups to autoscale.max_groups \(5 to 4\) must contain .*, got 1",
        ),
        (
            replace(SECTION, max_routers=1),
            r"autoscale.min_routers to autoscale.max_routers \(1 to 1\) must contain .*, got 2",
        ),
    ],
)
def test_bounds_must_hold_the_start(section: AutoscaleSection, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        policy(section)


def test_there_are_no_more_groups_than_experts() -> None:
    facts: Any = SimpleNamespace(num_experts=3)
    membership = Membership(groups=1, num_routers=2, routers=ADDRESSES)
    with pytest.raises(ConfigurationError, match=r"max_groups must be 1 to 3, the experts.*got 4"):
        policy_at_start(Config(autoscale=SECTION), membership, facts)
    with pytest.raises(ConfigurationError, match=r"max_groups must be 1 to 3, the experts.*got 4"):
        check_bounds(Config(autoscale=SECTION), facts)
    check_bounds(Config(), facts)
    facts.num_experts = 4
    assert policy_at_start(Config(autoscale=SECTION), membership, facts).groups.most == 4


def test_the_log_keeps_changes_longer_than_holds() -> None:
    log = DecisionLog()
    _, hold, change = decisions(3)
    log.add("advise", [decision_message(change, 1.0)])
    log.add("advise", [decision_message(hold, 2.0 + n) for n in range(2 * NUM_KEPT)])
    log.add("advise", [decision_message(hold, 3.0)])  # known already
    answer = log.explain(2)
    assert answer.mode == "advise"
    assert [d.unix_s for d in answer.decisions] == [1.0, 2.0 * NUM_KEPT, 2.0 * NUM_KEPT + 1]
    assert len(log.explain(0).decisions) == NUM_KEPT + 1


def test_a_message_says_what_is_known_and_no_more() -> None:
    message = decision_message(decisions(3)[-1], 5.0)
    assert message.load.HasField("group_busy")
    assert not message.load.HasField("ttft_s")
    assert (message.groups.count, message.groups.wanted) == (1, 2)
    assert message.groups.signals[0].name == "busy"
    assert message.groups.reason == "busy: busy 100% of the time, target 70%; for 2 s"


class Router:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.log = DecisionLog()

    def call(self, method: str, mode: str, decisions: list[bytes]) -> None:
        assert method == "note_decisions"
        self.log.add(mode, [cluster_pb2.AutoscaleDecision.FromString(d) for d in decisions])


def test_routers_learn_decisions_and_a_new_one_all_of_them() -> None:
    service, said = Service(), list[str]()
    autoscaler = Autoscaler(
        mode="advise",
        loop=service.loop(),
        membership=service.membership,
        progress=said.append,
    )
    old, new = Router(), Router()
    for number in range(6):
        service.now_s = 2.0 * number
        autoscaler.loop._decisions.put(autoscaler.loop.decide_once())
        autoscaler.tick([old])
    assert len(old.log.explain(0).decisions) == 6
    autoscaler.welcome(new)
    assert new.log.explain(0) == old.log.explain(0)
    assert said == [
        "autoscale advises 2 expert groups instead of 1: busy: busy 100% of the time,"
        " target 70%; for 2 s"
    ], "once, although nobody followed"


def test_what_is_wanted_is_made_so_where_somebody_can() -> None:
    service, said, scaled = Service(), list[str](), list[tuple[int | None, int | None]]()
    autoscaler = Autoscaler(
        mode="apply",
        loop=service.loop(),
        membership=service.membership,
        progress=said.append,
        scale=lambda groups, routers: scaled.append((groups, routers)),
    )
    for number in range(3):
        service.now_s = 2.0 * number
        decision = autoscaler.loop.decide_once()
        autoscaler.loop._decisions.put(decision)
        autoscaler.tick([])
    service.num_groups = 3  # somebody has changed it meanwhile: the decision is out of date
    autoscaler.loop._decisions.put(decision)
    autoscaler.tick([])
    assert scaled == [(2, None)], "the routers stay as many as they are"
    assert said[0].startswith("autoscale wants 2 expert groups instead of 1: busy")
