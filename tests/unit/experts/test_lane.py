"""The lane: greets, answers, survives bad calls, closes on bad frames, leaves nothing behind."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import stat
import tempfile
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experts import lane as lane_module
from experts.lane import HELLO_TIMEOUT_S, TOKEN_LIFE_S, LaneServer
from experts.runtime import ExpertRuntime
from protos.codec import FrameHeader, FrameKind, hello_header, pack_header
from protos.errors import (
    InternalError,
    InvalidFieldError,
    MessageTooLargeError,
    StalePlacementError,
    UnsupportedFeatureError,
    WireFormatError,
)
from tests.eventually import eventually
from tests.unit.experts.builders import HIDDEN, forward_call, loaded_runtime, tensors, write
from tests.unit.experts.lane_client import ask, connect, exactly, greet, open_lane, receive

HERE = "this-host"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> ExpertRuntime:
    path = write(tmp_path_factory.mktemp("checkpoint"), tensors())
    return loaded_runtime(path, share=0.6)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lanes(runtime: ExpertRuntime, clock: Clock) -> Iterator[LaneServer]:
    server = LaneServer(
        runtime, host="127.0.0.1", host_id=HERE, max_frame_bytes=1 << 20, clock=clock
    )
    yield server
    server.stop()


def lane_threads() -> int:
    return sum(thread.name == "lane" for thread in threading.enumerate())


@pytest.mark.parametrize("host_id", [HERE, "elsewhere", ""])
def test_a_lane_answers_what_the_runtime_answers(
    lanes: LaneServer, runtime: ExpertRuntime, host_id: str
) -> None:
    offer = lanes.offer(version=1, host_id=host_id)
    assert (offer.unix_path is None) == (host_id != HERE)
    assert (offer.tcp_address is None) == (host_id == HERE)
    with open_lane(offer) as sock:
        for num_rows in (1, 400, 3):  # the receive buffer grows, and is reused
            header, payload = forward_call(num_rows, (0, 2), call_id=num_rows)
            answer, result = ask(sock, header, payload)
            assert (answer.kind, answer.call_id) == (FrameKind.RESULT, num_rows)
            assert result == runtime.forward(header, payload)[1].tobytes()
        assert lanes.num_open == 1
    eventually(lambda: lanes.num_open == 0 and lane_threads() == 0)


def test_a_frame_larger_than_the_kept_buffer_is_answered(
    lanes: LaneServer, runtime: ExpertRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "KEPT_BUFFER_BYTES", 1000)
    with open_lane(lanes.offer(version=1, host_id=HERE)) as sock:
        for num_rows in (1, 1000, 1):
            header, payload = forward_call(num_rows)
            assert ask(sock, header, payload)[1] == runtime.forward(header, payload)[1].tobytes()


def test_ordinary_calls_of_a_native_group_take_the_express_and_are_counted(
    lanes: LaneServer, runtime: ExpertRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, load = runtime.status(), runtime.load_counts().sum()
    expected = runtime.forward(*forward_call(5))[1].tobytes()
    monkeypatch.setattr(runtime, "forward", None)
    with open_lane(lanes.offer(version=1, host_id=HERE)) as sock:
        for _ in range(3):
            assert ask(sock, *forward_call(5))[1] == expected
    after = runtime.status()
    assert after.num_calls - before.num_calls == 4
    assert after.num_rows - before.num_rows == 20
    assert after.num_pairs - before.num_pairs == runtime.load_counts().sum() - load


def test_a_call_that_fails_does_not_end_the_lane(
    lanes: LaneServer, runtime: ExpertRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_lane(lanes.offer(version=1, host_id=HERE)) as sock:
        with pytest.raises(StalePlacementError, match="layer 0 expert 4") as raised:
            ask(sock, *forward_call(2, (4,), call_id=41))
        assert raised.value.__notes__ == ["call_id 41"]
        with pytest.raises(WireFormatError, match="layer_id 7"):
            ask(sock, *forward_call(layer_id=7))
        assert ask(sock, *forward_call())[0].kind is FrameKind.RESULT


def test_a_fault_of_ours_is_an_internal_error_without_its_text(
    lanes: LaneServer, runtime: ExpertRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(*call: object) -> None:
        raise KeyError("secret")

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "forward", faulty)
        sock = open_lane(lanes.offer(version=1, host_id=HERE))
        with pytest.raises(InternalError, match="KeyError") as raised:
            ask(sock, *forward_call(2, (4,)))  # not ordinary: past the express
        assert "secret" not in str(raised.value)
    sock.close()


BAD_HEADERS = {
    "magic": b"XXXX" + pack_header(forward_call()[0])[4:],
    "version": pack_header(forward_call(version=2)[0]),
    "kind": pack_header(FrameHeader(kind=FrameKind.RESULT)),
    "size": pack_header(forward_call(payload_bytes=5)[0]),
    "dtype": pack_header(forward_call(dtype=4)[0]),
    "hello again": pack_header(hello_header(FrameKind.HELLO)),
}


@pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
def test_a_malformed_frame_is_answered_and_the_lane_closed(
    lanes: LaneServer, header: bytes
) -> None:
    with open_lane(lanes.offer(version=1, host_id=HERE)) as sock:
        sock.sendall(header)
        with pytest.raises(WireFormatError):
            receive(sock)
        with pytest.raises(EOFError):
            exactly(sock, 1)
    eventually(lambda: lane_threads() == 0)


def test_a_frame_that_is_too_large_is_refused_before_memory_is_taken(lanes: LaneServer) -> None:
    num_rows = 2**24  # 1 GiB of rows against a limit of 1 MiB
    header, _ = forward_call(0)
    header = header._replace(num_rows=num_rows, payload_bytes=num_rows * HIDDEN * 4)
    with open_lane(lanes.offer(version=1, host_id=HERE)) as sock:
        sock.sendall(pack_header(header))
        with pytest.raises(MessageTooLargeError, match=f"{2**30} bytes exceeds"):
            receive(sock)
        with pytest.raises(EOFError):
            exactly(sock, 1)


@pytest.mark.parametrize("sent_bytes", [1, 63, 64, 200])
def test_a_client_that_dies_inside_a_frame_leaves_nothing(
    lanes: LaneServer, sent_bytes: int
) -> None:
    header, payload = forward_call()
    sock = open_lane(lanes.offer(version=1, host_id=HERE))
    sock.sendall((pack_header(header) + payload)[:sent_bytes])
    sock.close()
    eventually(lambda: lane_threads() == 0 and lanes.num_open == 0)


def test_a_client_that_does_not_take_its_answer_leaves_nothing(
    runtime: ExpertRuntime,
) -> None:
    lanes = LaneServer(runtime, host="127.0.0.1", host_id=HERE)
    header, payload = forward_call(200_000, (0,))  # 12.8 MB back: more than socket buffers hold
    sock = open_lane(lanes.offer(version=1, host_id="elsewhere"))
    sock.sendall(pack_header(header) + payload)
    exactly(sock, 64)
    sock.close()
    eventually(lambda: lane_threads() == 0)
    lanes.stop()


def test_a_token_opens_one_lane(lanes: LaneServer) -> None:
    offer = lanes.offer(version=1, host_id=HERE)
    with open_lane(offer), connect(offer) as second:
        with pytest.raises(WireFormatError, match="unknown, used or expired"):
            greet(second, offer.token)
        with pytest.raises(EOFError):
            exactly(second, 1)


def test_a_token_expires(lanes: LaneServer, clock: Clock) -> None:
    early, late = (lanes.offer(version=1, host_id=HERE) for _ in range(2))
    clock.now_s += TOKEN_LIFE_S - 0.1
    open_lane(early).close()
    clock.now_s += 0.2
    with connect(late) as sock, pytest.raises(WireFormatError, match="expired"):
        greet(sock, late.token)


@pytest.mark.parametrize("token", [b"", b"x" * 32])
def test_a_guess_is_no_token(lanes: LaneServer, token: bytes) -> None:
    offer = lanes.offer(version=1, host_id=HERE)
    with connect(offer) as sock, pytest.raises(WireFormatError, match="unknown, used or expired"):
        greet(sock, token)


def test_a_forward_before_the_greeting_is_refused(lanes: LaneServer) -> None:
    with connect(lanes.offer(version=1, host_id=HERE)) as sock:
        sock.sendall(pack_header(forward_call(0)[0]))
        with pytest.raises(WireFormatError, match="starts with a hello"):
            receive(sock)


def test_another_version_gets_no_lane(lanes: LaneServer) -> None:
    with pytest.raises(InvalidFieldError, match="version must be 1, got 2"):
        lanes.offer(version=2, host_id=HERE)


def test_the_socket_is_private_and_removed(runtime: ExpertRuntime) -> None:
    lanes = LaneServer(runtime, host="127.0.0.1", host_id=HERE)
    directory = Path(lanes.unix_path).parent
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(lanes.unix_path).st_mode) == 0o600
    assert len(lanes.unix_path) <= 100
    lanes.stop()
    assert not directory.exists()
    lanes.stop()


def test_a_long_temporary_directory_does_not_make_a_long_socket_path(
    runtime: ExpertRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    lanes = LaneServer(runtime, host="127.0.0.1", host_id=HERE)
    assert len(lanes.unix_path) <= 100
    lanes.stop()


def test_without_tcp_there_are_lanes_on_this_host_only(runtime: ExpertRuntime) -> None:
    lanes = LaneServer(runtime, host="127.0.0.1", host_id=HERE, with_tcp=False)
    assert lanes.tcp_address is None
    open_lane(lanes.offer(version=1, host_id=HERE)).close()
    for host_id in ("elsewhere", ""):
        with pytest.raises(UnsupportedFeatureError, match="between hosts: this group demands TLS"):
            lanes.offer(version=1, host_id=host_id)
    lanes.stop()


def test_the_oldest_silent_connection_makes_room(
    lanes: LaneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MAX_UNGREETED", 3)
    offers = [lanes.offer(version=1, host_id="elsewhere") for _ in range(6)]
    talking = open_lane(offers[0])
    silent = [connect(offer) for offer in offers[1:]]  # two more than there are places
    for sock in silent[:2]:
        with pytest.raises((EOFError, ConnectionError)):
            exactly(sock, 1)
    eventually(lambda: lane_threads() == 4)
    greet(silent[-1], offers[-1].token)
    assert ask(talking, *forward_call())[0].kind is FrameKind.RESULT
    for sock in (talking, *silent):
        sock.close()
    eventually(lambda: lane_threads() == 0)


def test_a_greeting_byte_by_byte_has_one_bound(lanes: LaneServer, clock: Clock) -> None:
    offer = lanes.offer(version=1, host_id=HERE)
    frame = pack_header(hello_header(FrameKind.HELLO, len(offer.token))) + offer.token
    with connect(offer) as sock:
        sock.sendall(frame[:1])
        eventually(lambda: unread_bytes(sock) == 0)
        clock.now_s += HELLO_TIMEOUT_S + 1
        with pytest.raises((EOFError, ConnectionError)):
            send_and_read(sock, frame[1:2], frame[2:])
    eventually(lambda: lane_threads() == 0)


def send_and_read(sock: socket.socket, *parts: bytes) -> None:
    """Send the parts, each when the last has arrived, and read an answer."""
    for part in parts:
        sock.sendall(part)
        eventually(lambda: unread_bytes(sock) == 0)
    exactly(sock, 1)


def unread_bytes(sock: socket.socket) -> int:
    """What the peer of a Unix socket has not received yet."""
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, count)
    return count[0]


def test_tokens_that_nobody_uses_are_bounded(
    lanes: LaneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_module, "MAX_TOKENS", 2)
    first, second, third = (lanes.offer(version=1, host_id=HERE) for _ in range(3))
    with connect(first) as sock, pytest.raises(WireFormatError, match="unknown"):
        greet(sock, first.token)
    for offer in (second, third):
        open_lane(offer).close()


def test_stop_ends_open_lanes(runtime: ExpertRuntime) -> None:
    lanes = LaneServer(runtime, host="127.0.0.1", host_id=HERE)
    socks = [open_lane(lanes.offer(version=1, host_id=h)) for h in (HERE, "elsewhere")]
    waiting = connect(lanes.offer(version=1, host_id=HERE))  # has not said hello
    lanes.stop()
    assert lane_threads() == 0
    for sock in (*socks, waiting):
        with pytest.raises((EOFError, ConnectionError)):
            exactly(sock, 1)
        sock.close()


def test_lanes_are_served_at_the_same_time(lanes: LaneServer, runtime: ExpertRuntime) -> None:
    calls = [forward_call(rows=torch.full((2, HIDDEN), float(i))) for i in range(4)]
    want = [runtime.forward(*call)[1].tobytes() for call in calls]
    got: list[set[bytes]] = [set() for _ in calls]

    def client(index: int) -> None:
        with open_lane(lanes.offer(version=1, host_id=HERE)) as sock:
            for _ in range(50):
                got[index].add(ask(sock, *calls[index])[1])

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [{answer} for answer in want]


def test_a_port_that_cannot_be_bound_leaves_no_directory(runtime: ExpertRuntime) -> None:
    before = set(Path(tempfile.gettempdir()).glob("expertmesh-*"))
    with pytest.raises((OSError, socket.gaierror)):
        LaneServer(runtime, host="203.0.113.7", host_id=HERE)
    assert set(Path(tempfile.gettempdir()).glob("expertmesh-*")) <= before
