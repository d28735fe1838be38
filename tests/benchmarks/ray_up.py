"""`ray up` of the on-prem file on three hosts: seconds to the first token, parity, leftovers.

Regime: hosts are network namespaces of this machine (`tests/cluster/hosts.py`), so all of them
    share its cores, and the package is installed already; Ray, ssh, the autoscaler and the service
    are real. A tiny float32 checkpoint on disk, two expert groups on two hosts, a router on the
    third and one more beside a group, sessions in a Valkey on a fourth host.

Meaning: from the command `ray up` to the first token that a client outside got. Parity: greedy
    tokens of every router against transformers. Leftovers: processes, shared memory and temporary
    files on the hosts after `ray down`, then namespaces and links after the hosts.

Ceiling: four times the start of a Ray node on shared cores, about 6 s each, one after the other for
    the head; then torch in four processes, 3 s of CPU each.

    python -m tests.benchmarks.ray_up [--prompts 8] [--new 32]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from protos.client import Client
from tests.benchmarks.harness import OtherCores, prompts, report
from tests.cluster.hosts import obstacle, running_hosts
from tests.cluster.launched import Launched, start_valkey
from tests.eventually import eventually
from tests.parity.checkpoints import make_checkpoint
from tests.parity.oracle import Oracle

BAR_S = 90.0


def greedy(oracle: Oracle, prompt: list[int], count: int) -> list[int]:
    """What transformers says."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(int(torch.argmax(oracle.logits(token_ids)[-1])))
    return token_ids[len(prompt) :]


def main() -> None:
    """Bring a cluster up, ask it, and take it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new", type=int, default=32)
    arguments = parser.parse_args()
    reason = obstacle()
    if reason is not None:
        sys.exit(f"no cluster of hosts here: {reason}")
    with tempfile.TemporaryDirectory(prefix="b", dir="/tmp") as name:
        folder = Path(name)
        checkpoint = make_checkpoint(folder / "tiny", tokenizer=True)
        with running_hosts(4, seen=[folder]) as hosts:
            *machines, store = hosts.hosts.values()
            cluster = Launched(
                folder=folder,
                hosts=hosts,
                machines=machines,
                checkpoint=checkpoint,
                flags=f"--redis-url {start_valkey(store)}",
            )
            others = OtherCores([os.getpid()])
            started = time.perf_counter()
            cluster.up()
            up_s = time.perf_counter() - started
            status = cluster.wait_ready(600)
            addresses = [router.grpc_address for router in status.routers]
            with Client(addresses[0]) as client:
                client.complete([5, 6, 7], max_tokens=1, temperature=0, ignore_eos=True)
            first_token_s = time.perf_counter() - started
            cores = others.cores()
            print(f"ray up returned after {up_s:.1f} s, first token after {first_token_s:.1f} s")
            oracle = Oracle(checkpoint)
            asked = prompts(arguments.prompts, 16, 512)
            expected = [greedy(oracle, prompt, arguments.new) for prompt in asked]
            unequal = 0
            for address in addresses:
                with Client(address) as client:
                    for prompt, tokens in zip(asked, expected, strict=True):
                        answer = client.complete(
                            prompt, max_tokens=arguments.new, temperature=0, ignore_eos=True
                        )
                        unequal += list(answer.token_ids) != tokens
            print(f"{unequal} of {len(asked) * len(addresses)} answers unequal")
            group_hosts = {g.grpc_address.rpartition(":")[0] for g in status.groups}
            router_hosts = {address.rpartition(":")[0] for address in addresses}
            started = time.perf_counter()
            cluster.down()
            try:
                eventually(lambda: not any(cluster.left().values()), 120, 1.0)
            except AssertionError:
                print(cluster.left())
            gone_s = time.perf_counter() - started
            left = sum(map(len, cluster.left().values()))
        left += len(hosts.leftovers())
        print(f"ray down: {left} things left after {gone_s:.1f} s")
    report(
        "ray_up",
        {"hosts": len(machines), "prompts": arguments.prompts, "new": arguments.new},
        {
            "ray_up_s": round(up_s, 1),
            "first_token_s": round(first_token_s, 1),
            "others": round(cores, 2),
            "bar_s": BAR_S,
            "group_hosts": len(group_hosts),
            "routers_without_experts_beside": len(router_hosts - group_hosts),
            "answers": len(asked) * len(addresses),
            "unequal": unequal,
            "down_s": round(gone_s, 1),
            "left": left,
            "is_met": first_token_s <= BAR_S and unequal == 0 and left == 0,
        },
    )


if __name__ == "__main__":
    main()
