"""`ray up` of the on-prem file, the service that it brings, one host more, and `ray down`.

Hosts are network namespaces with an sshd each (`hosts.py`); sockets, ssh, Ray, its autoscaler, the
store and the service are real. The tests follow the life of one cluster, in the order of this file.
"""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest
import torch

from cluster.remote import checking_ssh
from protos.client import Client
from protos.v1 import cluster_pb2
from tests.cluster.launched import Launched
from tests.eventually import eventually
from tests.parity.oracle import Oracle

pytestmark = pytest.mark.timeout(900)
"""A minute on a quiet machine; a busy one takes several."""

PROMPTS = ([5, 6, 7], [300, 11, 42, 9, 8, 77], [17])
NEW_TOKENS = 12


def greedy(checkpoint: Path, prompt: list[int], count: int) -> list[int]:
    """What transformers says."""
    oracle = Oracle(checkpoint)
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(int(torch.argmax(oracle.logits(token_ids)[-1])))
    return token_ids[len(prompt) :]


def ask(address: str, prompt: list[int], session: str | None = None) -> list[int]:
    with Client(address) as client:
        answer = client.complete(
            prompt, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, session=session
        )
    return list(answer.token_ids)


def hosts_of(members: list[str]) -> list[str]:
    return [address.rpartition(":")[0] for address in members]


@pytest.fixture(scope="module")
def status(launched: Launched) -> cluster_pb2.ClusterStatus:
    """What the service says when it is ready."""
    return launched.wait_ready()


@pytest.fixture(scope="module")
def routers(status: cluster_pb2.ClusterStatus) -> list[str]:
    """Their addresses."""
    return [router.grpc_address for router in status.routers]


@pytest.fixture(scope="module")
def expected(launched: Launched) -> list[list[int]]:
    """transformers' answers to `PROMPTS`."""
    return [greedy(launched.checkpoint, prompt, NEW_TOKENS) for prompt in PROMPTS]


def test_the_service_tells_of_its_start_before_it_is_ready(launched: Launched) -> None:
    """Nobody opens a router's port before the machines joined, which takes seconds."""
    first = eventually(launched.status, 240, 0.1)
    assert first.model == "tiny"
    assert first.state == "STARTING", "ready before anybody could look: ask earlier"
    assert not first.routers


def test_groups_and_routers_are_on_hosts_of_their_own(
    launched: Launched, status: cluster_pb2.ClusterStatus, routers: list[str]
) -> None:
    machines = [host.address for host in launched.machines]
    groups = hosts_of([group.grpc_address for group in status.groups])
    assert sorted(groups) == machines[1:], "one on each worker, none on the head"
    assert len(set(hosts_of(routers))) == 2
    assert set(hosts_of(routers)) <= set(machines)
    ways = {group.transport for group in status.groups}
    assert ways == {"lane-tcp"}, status
    for router in status.routers:
        assert {(store.role, store.breaker) for store in router.stores} == {
            ("meta", "CLOSED"),
            ("blob", "CLOSED"),
        }
        assert "10.99." in router.stores[0].address


def test_every_router_gives_the_tokens_of_transformers(
    routers: list[str], expected: list[list[int]]
) -> None:
    for address in routers:
        assert [ask(address, prompt) for prompt in PROMPTS] == expected, address


def test_a_session_goes_on_at_a_router_on_another_host(
    launched: Launched, routers: list[str]
) -> None:
    with Client(routers[0]) as client:
        session = client.create_session(ttl_s=600).session_id
    first = ask(routers[0], PROMPTS[0], session)
    second = ask(routers[1], PROMPTS[1], session)
    history = [*PROMPTS[0], *first, *PROMPTS[1]]
    assert second == greedy(launched.checkpoint, history, NEW_TOKENS)


def test_a_machine_that_shows_another_host_key_is_refused(launched: Launched) -> None:
    known_hosts = launched.folder / "known_hosts"
    first = launched.expertmesh("up", "--check")
    assert first.returncode == 0, first.stderr
    met = known_hosts.read_text()
    assert met.count(" ssh-ed25519 ") == len(launched.machines), "by name or hashed, as ssh is set"
    own = launched.hosts.key.with_suffix(".pub").read_text()
    known_hosts.write_text(f"{launched.head.address} {own}")
    try:
        refused = launched.expertmesh("up", "--check")
        assert refused.returncode == 4, refused.stderr
        assert f"another host key than {known_hosts}" in " ".join(refused.stderr.split())
        with checking_ssh(known_hosts) as folder:
            as_ray = subprocess.run(
                [
                    *(folder / "ssh", "-i", launched.hosts.key, "-o", "StrictHostKeyChecking=no"),
                    *("-o", "UserKnownHostsFile=/dev/null", f"root@{launched.head.address}"),
                    "true",
                ],
                capture_output=True,
                text=True,
                timeout=60,
            )
        assert as_ray.returncode == 255
        assert "Host key verification failed" in as_ray.stderr
    finally:
        known_hosts.write_text(met)


def test_one_more_host_joins_while_requests_are_answered(
    launched: Launched, routers: list[str], expected: list[list[int]]
) -> None:
    joined = threading.Event()
    wrong: list[object] = []

    def client() -> None:
        while not joined.is_set():
            for address in routers:
                try:
                    answer: object = ask(address, PROMPTS[1])
                except Exception as error:
                    answer = error
                if answer != expected[1]:
                    wrong.append(answer)
                    return
            joined.wait(0.2)

    asking = threading.Thread(target=client)
    asking.start()
    try:
        launched.machines.append(launched.spares.pop())
        answer = launched.expertmesh("up")
        assert answer.returncode == 0, answer.stderr
        assert "the service runs and goes on" in answer.stderr
        eventually(lambda: launched.num_groups_possible() == 3, 240, 1.0)
    finally:
        joined.set()
        asking.join()
    assert not wrong
    assert [ask(address, PROMPTS[0]) for address in routers] == [expected[0]] * 2


def test_ray_down_leaves_nothing(launched: Launched) -> None:
    assert any(launched.left().values()), "what is counted must be there before"
    answer = launched.expertmesh("down")
    assert answer.returncode == 0, answer.stderr
    assert "nothing runs on 4 machines any more" in answer.stderr

    def none_left() -> bool:
        left = launched.left()
        assert not any(left.values()), left
        return True

    eventually(none_left, 240, 1.0)
