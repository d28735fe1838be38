"""What a client gets from a real service: Ray, gRPC, several processes."""

from __future__ import annotations

import json
import threading

import pytest

from cluster.status import ask_status
from protos.client import Client
from protos.errors import InvalidFieldError
from protos.events import FinishReason
from protos.v1 import cluster_pb2, cluster_pb2_grpc
from tests.integration.served import Served, run_cli

pytestmark = pytest.mark.timeout(400)

PROMPT = [17, 101, 222, 333, 404, 55, 66, 77, 88, 99]


def greedy_tokens(address: str, num_tokens: int = 48) -> list[int]:
    with Client(address) as client:
        completion = client.complete(
            PROMPT, max_tokens=num_tokens, temperature=0.0, ignore_eos=True
        )
    assert completion.choices[0].finish_reason is FinishReason.LENGTH
    return completion.token_ids


def test_the_ready_line_says_what_runs(served: Served) -> None:
    assert served.fields["model"] == "tiny"
    assert served.fields["groups"] == "2"
    assert served.fields["routers"] == "2"


def test_every_router_gives_the_same_tokens(served: Served) -> None:
    routers = ask_status(served.address).routers
    answers = [greedy_tokens(router.grpc_address) for router in routers]
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_concurrent_streams_equal_single_ones(served: Served) -> None:
    prompts = [[20 + i, 30 + 2 * i, 40 + 3 * i] for i in range(6)]
    with Client(served.address) as client:
        options = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
        alone = [client.complete(prompt, **options).token_ids for prompt in prompts]
        together: dict[int, list[int]] = {}

        def run(index: int) -> None:
            together[index] = client.complete(prompts[index], **options).token_ids

        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [together[i] for i in range(len(prompts))] == alone


def test_status_lists_every_member(served: Served) -> None:
    greedy_tokens(served.address)
    answer = run_cli("status", "--url", served.address, "--json")
    assert answer.returncode == 0, answer.stderr
    status = json.loads(answer.stdout)
    assert [router["router_id"] for router in status["routers"]] == ["router-0", "router-1"]
    assert {router["state"] for router in status["routers"]} == {"READY"}
    assert status["routers"][0]["generation_tokens"] > 0
    assert status["routers"][0]["dispatch_s"] > 0
    # The warm-up of a router is no step of it: one that served nothing has waited for nothing.
    assert all(router["dispatch_s"] <= router["step_s"] for router in status["routers"])
    by_group = {group["group_id"]: group for group in status["groups"]}
    # 4 layers of 8 experts, 3:1
    assert (by_group["big"]["num_experts"], by_group["small"]["num_experts"]) == (24, 8)
    assert all(group["state"] == "READY" and group["num_pairs"] > 0 for group in by_group.values())
    assert len({member["pid"] for member in status["routers"] + status["groups"]}) == 4


def test_status_without_json_is_plain_text(served: Served) -> None:
    answer = run_cli("status", "--url", served.address)
    assert answer.returncode == 0
    assert "router-1" in answer.stdout
    assert "small" in answer.stdout
    assert "\x1b" not in answer.stdout


def test_watch_plan_and_refusals(served: Served) -> None:
    import grpc

    from protos.errors import from_rpc_error

    with grpc.insecure_channel(served.address) as channel:
        stub = cluster_pb2_grpc.ClusterServiceStub(channel)
        watch = stub.WatchStatus(cluster_pb2.WatchStatusRequest(interval_s=0.1), timeout=20)
        assert [next(watch).model for _ in range(3)] == ["tiny"] * 3
        watch.cancel()
        plan = stub.PlanPlacement(
            cluster_pb2.PlanPlacementRequest(
                groups=[
                    cluster_pb2.GroupCapacity(group_id=name, capacity=1.0) for name in ("x", "y")
                ]
            ),
            timeout=10,
        )
        assert [(group.group_id, group.num_experts) for group in plan.groups] == [
            ("x", 16),
            ("y", 16),
        ]
        assert sum(group.expected_load for group in plan.groups) == pytest.approx(1.0)
        assert plan.num_moves == 32
        with pytest.raises(grpc.RpcError) as caught:
            stub.Drain(cluster_pb2.DrainRequest(target="nobody"), timeout=10)
        error = from_rpc_error(caught.value)
        assert isinstance(error, InvalidFieldError)
        assert "router-0, router-1, big, small" in error.message


def test_complete_prints_text_and_json(served: Served) -> None:
    flags = ("--url", served.address, "--max-tokens", "8", "--temperature", "0")
    text = run_cli("complete", "def main():", *flags)
    assert text.returncode == 0, text.stderr
    answer = json.loads(run_cli("complete", "-", *flags, "--json", stdin="def main():").stdout)
    assert text.stdout.rstrip("\n") == answer["text"].rstrip("\n")
    assert answer["completion_tokens"] == len(answer["token_ids"]) <= 8
    assert answer["finish_reason"] in ("length", "stop")


def test_chat_answers_the_lines_of_a_pipe(served: Served) -> None:
    answer = run_cli(
        *("chat", "--url", served.address, "--max-tokens", "6", "--temperature", "0"),
        stdin="hello\n/clear\nhello\n/help\n/exit\nnever\n",
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stderr.count("tok/s") == 2
    assert "/clear forgets" in answer.stderr


def test_a_wrong_request_has_exit_code_2(served: Served) -> None:
    answer = run_cli("complete", "x", "--url", served.address, "--temperature", "-1")
    assert answer.returncode == 2
    assert "sampling.temperature" in answer.stderr
