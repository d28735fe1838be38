"""The gRPC service over a real channel: forwards, control, health, and errors with their class."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from experts import service as service_module
from experts.lane import LaneOffer
from experts.planner import plan_placement
from experts.runtime import ExpertRuntime
from experts.service import ExpertServer, start_expert_server
from protos.codec import FrameHeader, FrameKind, pack_header, split_frame
from protos.errors import (
    DrainingError,
    ExpertMeshError,
    InternalError,
    InvalidFieldError,
    MessageTooLargeError,
    NotReadyError,
    ResourceError,
    StalePlacementError,
    WireFormatError,
    from_rpc_error,
    from_status,
)
from protos.ids import host_id
from protos.v1 import experts_pb2, experts_pb2_grpc
from tests.eventually import eventually
from tests.silent_socket import connect_silently, is_closed_by_peer
from tests.unit.experts.builders import (
    EXPERTS,
    LAYERS,
    forward_call,
    loaded_runtime,
    tensors,
    write,
)
from tests.unit.experts.lane_client import ask, open_lane

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("checkpoint"), tensors())


class Group:
    """A served runtime and a stub for it."""

    def __init__(self, runtime: ExpertRuntime) -> None:
        self.runtime = runtime
        self.server: ExpertServer = start_expert_server(runtime, "127.0.0.1")
        self.channel = grpc.insecure_channel(self.server.address)
        self.stub = experts_pb2_grpc.ExpertServiceStub(self.channel)

    def health(self, service: str = "") -> int:
        request = health_pb2.HealthCheckRequest(service=service)
        return health_pb2_grpc.HealthStub(self.channel).Check(request, timeout=10).status

    def close(self) -> None:
        self.channel.close()
        self.server.stop()


@pytest.fixture
def group(path: Path) -> Iterator[Group]:
    made = Group(loaded_runtime(path, share=0.6))
    yield made
    made.close()


class Stream:
    """The client's end of `Forward`."""

    def __init__(self, stub: experts_pb2_grpc.ExpertServiceStub) -> None:
        self._requests: queue.SimpleQueue[experts_pb2.ForwardRequest | None] = queue.SimpleQueue()
        self._answers = stub.Forward(iter(self._requests.get, None), timeout=30)

    def send(self, frame: bytes) -> None:
        self._requests.put(experts_pb2.ForwardRequest(frame=frame))

    def ask(self, frame: bytes) -> tuple[FrameHeader, bytes]:
        self.send(frame)
        header, payload = split_frame(next(self._answers).frame)
        if header.kind is FrameKind.ERROR:
            error = from_status(status_pb2.Status.FromString(bytes(payload)))
            error.add_note(f"call_id {header.call_id}")
            raise error
        return header, bytes(payload)

    def send_end(self) -> None:
        self._requests.put(None)

    def close(self) -> None:
        self.send_end()
        assert list(self._answers) == []


def caught(error: grpc.RpcError) -> ExpertMeshError:
    return from_rpc_error(error)


def test_a_stream_answers_what_the_runtime_answers(group: Group) -> None:
    stream = Stream(group.stub)
    for num_rows in (1, 100, 10_000, 10_001):  # the third outgrows the stream's first buffers
        header, payload = forward_call(num_rows, (0, 1), call_id=num_rows)
        answer, result = stream.ask(pack_header(header) + payload)
        assert (answer.kind, answer.call_id) == (FrameKind.RESULT, num_rows)
        assert result == group.runtime.forward(header, payload)[1].tobytes()
    assert group.stub.GetState(experts_pb2.GetStateRequest()).open_streams == 1
    stream.close()


def test_a_call_that_fails_does_not_end_the_stream(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(group.stub)
    header, payload = forward_call(2, (4,), call_id=8)
    with pytest.raises(StalePlacementError, match="layer 0 expert 4") as raised:
        stream.ask(pack_header(header) + payload)
    assert raised.value.__notes__ == ["call_id 8"]
    with pytest.raises(WireFormatError, match="header of 3 bytes"):
        stream.ask(b"abc")
    header, payload = forward_call()
    with pytest.raises(WireFormatError, match="the frame has"):
        stream.ask(pack_header(header) + payload[:-1])
    with monkeypatch.context() as patched:
        patched.setattr(service_module, "MAX_MESSAGE_BYTES", 100)
        with pytest.raises(MessageTooLargeError, match="limit of 100 bytes"):
            stream.ask(pack_header(header) + payload)
    with monkeypatch.context() as patched:
        patched.setattr(group.runtime, "forward", lambda *call: 1 / 0)
        patched.setattr(group.runtime, "_express", None)
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            stream.ask(pack_header(header) + payload)
    assert stream.ask(pack_header(header) + payload)[0].kind is FrameKind.RESULT
    stream.close()


def test_a_client_that_cancels_its_stream_leaves_nothing(group: Group) -> None:
    requests: queue.SimpleQueue[experts_pb2.ForwardRequest] = queue.SimpleQueue()
    call = group.stub.Forward(iter(requests.get, None))
    header, payload = forward_call()
    requests.put(experts_pb2.ForwardRequest(frame=pack_header(header) + payload))
    next(call)
    call.cancel()
    requests.put(None)  # type: ignore[arg-type]
    for _ in range(1000):
        if group.stub.GetState(experts_pb2.GetStateRequest()).open_streams == 0:
            return
    raise AssertionError("the stream is still counted as open")


def test_open_lane_hands_out_a_working_lane(group: Group) -> None:
    for host in (host_id(), "elsewhere"):
        request = experts_pb2.OpenLaneRequest(router_id="router-1", version=1, host_id=host)
        answer = group.stub.OpenLane(request)
        kind = answer.WhichOneof("address")
        assert kind == ("unix_path" if host == host_id() else "tcp_address")
        assert answer.max_frame_bytes == group.server.lanes.max_frame_bytes
        offer = LaneOffer(answer.token, answer.unix_path or None, answer.tcp_address or None)
        with open_lane(offer) as sock:
            header, payload = forward_call()
            want = group.runtime.forward(header, payload)[1].tobytes()
            assert ask(sock, header, payload)[1] == want
            assert group.stub.GetState(experts_pb2.GetStateRequest()).open_lanes >= 1


def test_open_lane_checks_its_request(group: Group) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        group.stub.OpenLane(experts_pb2.OpenLaneRequest(router_id="r", version=3))
    error = caught(raised.value)
    assert isinstance(error, InvalidFieldError)
    assert error.violations[0].field == "version"
    with pytest.raises(grpc.RpcError) as raised:
        group.stub.OpenLane(experts_pb2.OpenLaneRequest(router_id="a b", version=1))
    assert caught(raised.value).violations[0].field == "router_id"


def test_get_state_says_what_the_group_holds(group: Group) -> None:
    group.runtime.forward(*forward_call(2, (0, 1)))
    state = group.stub.GetState(experts_pb2.GetStateRequest())
    assert (state.group_id, state.state, state.placement_epoch) == ("a", "READY", 1)
    assert {layer.layer_id: list(layer.expert_ids) for layer in state.layers} == {
        layer_id: [0, 1, 2] for layer_id in range(LAYERS)
    }
    assert (state.num_calls, state.num_rows, state.num_pairs) == (1, 2, 4)
    assert state.resident_bytes <= state.capacity_bytes
    assert state.compute == group.runtime.status().compute
    assert (state.num_threads, state.dtype, state.host_id) == (1, "float32", host_id())


def test_experts_are_loaded_and_dropped(group: Group) -> None:
    key = experts_pb2.ExpertKey(layer_id=0, expert_id=4)
    request = experts_pb2.LoadExpertsRequest(experts=[key], placement_epoch=2, dry_run=True)
    dry = group.stub.LoadExperts(request)
    assert (dry.num_loaded, group.runtime.epoch) == (0, 1)
    request.dry_run = False
    loaded = group.stub.LoadExperts(request)
    assert (loaded.num_loaded, loaded.bytes_needed) == (1, dry.bytes_needed)
    assert loaded.bytes_free >= loaded.bytes_needed
    assert group.runtime.epoch == 2
    drop = experts_pb2.DropExpertsRequest(experts=[key], placement_epoch=3)
    assert group.stub.DropExperts(drop).num_dropped == 1
    with pytest.raises(grpc.RpcError) as raised:
        group.stub.DropExperts(drop)
    assert "must be resident" in str(caught(raised.value))


def test_watch_load_streams_the_counters(group: Group) -> None:
    group.runtime.forward(*forward_call(2, (0, 1)))
    watch = group.stub.WatchLoad(experts_pb2.WatchLoadRequest(interval_s=0.1), timeout=20)
    first = next(watch)
    counts = np.frombuffer(first.counts_u64le, "<u8").reshape(first.num_layers, first.num_experts)
    assert counts.tolist() == [[2, 2, 0, 0, 0], [0] * EXPERTS, [0] * EXPERTS]
    group.runtime.forward(*forward_call(1, (2,)))
    assert np.frombuffer(next(watch).counts_u64le, "<u8").sum() == 5
    watch.cancel()


@pytest.mark.parametrize("interval_s", [0.01, -1.0, float("nan")])
def test_watch_load_checks_its_interval(group: Group, interval_s: float) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        next(group.stub.WatchLoad(experts_pb2.WatchLoadRequest(interval_s=interval_s)))
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught(raised.value).violations[0].field == "interval_s"


def test_a_group_is_served_before_it_is_ready_and_drains(path: Path) -> None:
    group = Group(ExpertRuntime(group_id="a", checkpoint=path, dtype="float32"))
    try:
        lane_request = experts_pb2.OpenLaneRequest(router_id="r", version=1)
        assert group.health() == NOT_SERVING
        assert group.stub.GetState(experts_pb2.GetStateRequest()).state == "STARTING"
        assert next(group.stub.WatchLoad(experts_pb2.WatchLoadRequest())).num_layers == 0
        with pytest.raises(grpc.RpcError) as raised:
            group.stub.OpenLane(lane_request)
        assert isinstance(caught(raised.value), NotReadyError)
        group.runtime.load(plan_placement(LAYERS, EXPERTS, {"a": 1}))
        group.stub.OpenLane(lane_request)
        assert group.health() == group.health("expertmesh.v1.ExpertService") == SERVING
        group.runtime.drain()
        with pytest.raises(grpc.RpcError) as raised:
            group.stub.OpenLane(lane_request)
        assert isinstance(caught(raised.value), DrainingError)
        with pytest.raises(grpc.RpcError) as raised:
            next(group.stub.Forward(iter(())))
        assert isinstance(caught(raised.value), DrainingError)
        assert group.health() == NOT_SERVING
    finally:
        group.close()


def test_a_taken_port_is_a_resource_error(group: Group) -> None:
    port = int(group.server.address.rsplit(":", 1)[1])
    with pytest.raises(ResourceError, match="cannot bind"):
        start_expert_server(group.runtime, "127.0.0.1", port)


def test_an_address_of_another_host_is_a_resource_error(group: Group) -> None:
    with pytest.raises(ResourceError, match="cannot bind"):
        start_expert_server(group.runtime, "203.0.113.7")


def test_a_stream_without_a_frame_is_cancelled_and_one_with_a_frame_is_not(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "FIRST_FRAME_S", 0.3)
    talking = Stream(group.stub)
    header, payload = forward_call()
    talking.ask(pack_header(header) + payload)
    requests: queue.SimpleQueue[experts_pb2.ForwardRequest | None] = queue.SimpleQueue()
    silent = group.stub.Forward(iter(requests.get, None), timeout=20)
    with pytest.raises(grpc.RpcError) as raised:
        next(silent)
    assert raised.value.code() is grpc.StatusCode.CANCELLED
    requests.put(None)
    assert talking.ask(pack_header(header) + payload)[0].kind is FrameKind.RESULT
    talking.close()
    eventually(lambda: group.stub.GetState(experts_pb2.GetStateRequest()).open_streams == 0)


def test_silent_connections_are_bounded_in_number_and_time(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "HANDSHAKE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(service_module, "MAX_CONNECTIONS", 3)
    server = start_expert_server(group.runtime, "127.0.0.1")
    for sock in [connect_silently(server.address) for _ in range(6)]:
        assert is_closed_by_peer(sock)
    with grpc.insecure_channel(server.address) as channel:
        stub = experts_pb2_grpc.ExpertServiceStub(channel)
        assert stub.GetState(experts_pb2.GetStateRequest(), timeout=20, wait_for_ready=True).state
    server.stop()


def test_stop_comes_twice_and_frees_the_port(path: Path) -> None:
    runtime = loaded_runtime(path)
    server = start_expert_server(runtime, "127.0.0.1")
    server.stop()
    server.stop()
    port = int(server.address.rsplit(":", 1)[1])
    again = start_expert_server(runtime, "127.0.0.1", port)
    assert again.address == server.address
    again.stop()


@pytest.mark.parametrize("way", ["lane", "stream"])
def test_stop_does_not_wait_for_a_forward_that_never_ends(
    path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "STOP_TIMEOUT_S", 0.1)
    made = Group(loaded_runtime(path))
    entered, released, stopped = (threading.Event() for _ in range(3))

    def hang(*call: object) -> None:
        entered.set()
        released.wait()
        raise StalePlacementError(0, 0, 1, 9)

    def stop() -> None:
        made.server.stop(0)
        stopped.set()

    monkeypatch.setattr(made.runtime, "forward", hang)
    header, payload = forward_call(0)  # not ordinary: past the express
    frame = pack_header(header) + payload
    lane = open_lane(made.server.lanes.offer(version=1, host_id=host_id()))
    stream = Stream(made.stub)
    if way == "lane":
        lane.sendall(frame)
    else:
        stream.send(frame)
    assert entered.wait(20)
    stopping = threading.Thread(target=stop)
    stopping.start()
    in_time = stopped.wait(20)
    released.set()
    stopping.join()
    stream.send_end()
    lane.close()
    made.channel.close()
    assert in_time
