from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from router.state.bulk import EXISTS_BATCH, Bulk
from router.state.bulk_connection import BulkCancelledError, BulkError, BulkLateError
from router.state.endpoint import Endpoint
from tests.certificates import Authority
from tests.ports import free_port
from tests.unit.state.blob_servers import KINDS, BlobServer, Proxy, blob_server

BIG = bytes(range(256)) * (5 << 12)  # 5 MiB


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlobServer]:
    with blob_server(request.param, tmp_path) as server:
        yield server


@pytest.fixture
def bulk(server: BlobServer) -> Iterator[Bulk]:
    with contextlib.closing(Bulk(server.endpoint)) as bulk:
        bulk.bound(time.monotonic() + 60)
        yield bulk


def buffer(size: int) -> memoryview:
    return memoryview(bytearray(size))


def get(bulk: Bulk, key: bytes, *into: memoryview) -> int | None:
    bulk.send_get(key, 100)
    return bulk.receive(into)


def test_what_is_set_in_pieces_arrives_in_pieces(bulk: Bulk) -> None:
    assert bulk.set(b"k", [b"head", BIG, b"", memoryview(b"tail")], 100) == "OK"
    first, second = buffer(100), buffer(len(BIG) + 8 - 100)
    assert get(bulk, b"k", first, second) == len(BIG) + 8
    assert bytes(first) + bytes(second) == b"head" + BIG + b"tail"


def test_a_key_that_is_not_there(bulk: Bulk) -> None:
    assert get(bulk, b"none", buffer(10)) is None
    assert bulk.exists([b"none"]) == [False]


@pytest.mark.parametrize("room", [0, 9, 11, 1 << 20])
def test_a_value_of_another_length_leaves_the_stream_in_step(bulk: Bulk, room: int) -> None:
    bulk.set(b"short", [b"0123456789"], 100)
    bulk.set(b"next", [b"next"], 100)
    into = buffer(4)
    bulk.send_get(b"short", 100)
    bulk.send_get(b"next", 100)
    assert bulk.receive([buffer(room)]) == 10
    assert bulk.receive([into]) == 4
    assert bytes(into) == b"next"


def test_a_long_value_is_read_off_the_connection(bulk: Bulk) -> None:
    bulk.set(b"big", [BIG], 100)
    assert get(bulk, b"big", buffer(10)) == len(BIG)
    assert bulk.exists([b"big"]) == [True]


def test_many_keys_are_probed_in_batches(bulk: Bulk) -> None:
    keys = [b"key:%d" % i for i in range(2 * EXISTS_BATCH + 100)]
    for i in range(0, len(keys), 1000):
        bulk.set(keys[i], [b"x"], 100)
    assert bulk.exists(keys) == [i % 1000 == 0 for i in range(len(keys))]


def test_values_live_as_long_as_the_longest_wish(server: BlobServer, bulk: Bulk) -> None:
    bulk.set(b"k", [b"v"], 1000)
    assert bulk.touch([b"k", b"none"], [5000, 5000], [0, 0]) == [True, False]
    assert server.command(b"TTL", b"k") in (b":5000", b":4999")
    assert bulk.touch([b"k"], [10], [0]) == [True]
    assert server.command(b"TTL", b"k") in (b":5000", b":4999")
    bulk.send_get(b"k", 9000)
    assert bulk.receive([buffer(1)]) == 1
    assert server.command(b"TTL", b"k") in (b":9000", b":8999")


def test_a_full_server_answers_with_data(tmp_path: Path, server: BlobServer, bulk: Bulk) -> None:
    server.command(b"CONFIG", b"SET", b"maxmemory", b"1mb")
    assert bulk.set(b"k", [BIG], 100).startswith("OOM")
    assert bulk.exists([b"k"]) == [False]


def test_an_error_reply_ends_the_connection_and_the_next_call_has_another(
    server: BlobServer, bulk: Bulk
) -> None:
    bulk.set(b"k", [b"v"], 100)
    server.command(b"ACL", b"SETUSER", b"default", b"-get")
    with pytest.raises(BulkError, match="NOPERM"):
        get(bulk, b"k", buffer(1))
    assert not bulk.is_open
    assert bulk.exists([b"k"]) == [True]


def test_a_key_that_holds_no_string_is_empty(server: BlobServer, bulk: Bulk) -> None:
    server.command(b"RPUSH", b"list", b"x")
    bulk.set(b"next", [b"next"], 100)
    bulk.send_get(b"list", 100)
    bulk.send_get(b"next", 100)
    assert bulk.receive([buffer(4)]) == 0
    assert bulk.receive([buffer(4)]) == 4


def test_info(bulk: Bulk) -> None:
    info = bulk.info("memory", "stats", "clients")
    assert int(info["used_memory"]) > 0
    assert int(info["evicted_keys"]) == 0
    assert int(info["connected_clients"]) >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_user_password_and_database(kind: str, tmp_path: Path) -> None:
    users = ["--user", "default", "off", "--user", "blob", "on", ">secret", "~qs1:*", "+@all"]
    with blob_server(kind, tmp_path, *users, tcp=True) as server:
        allowed = replace(server.endpoint, username="blob", password="secret", db=3)
        with contextlib.closing(Bulk(allowed)) as bulk:
            assert bulk.set(b"qs1:k", [b"v"], 100) == "OK"
            assert bulk.exists([b"qs1:k"]) == [True]
            assert bulk.set(b"other", [b"v"], 100).startswith("NOPERM")
        with contextlib.closing(Bulk(replace(allowed, db=0))) as bulk:
            assert bulk.exists([b"qs1:k"]) == [False]
        with (
            contextlib.closing(Bulk(replace(allowed, password="wrong"))) as bulk,
            pytest.raises(BulkError, match="refused the login") as caught,
        ):
            bulk.exists([b"qs1:k"])
        assert "wrong" not in str(caught.value)


def test_tls(tmp_path: Path) -> None:
    """Of Redis: the packaged Valkey is built without."""
    authority = Authority(tmp_path)
    issued = authority.issue("server")
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", str(issued.certfile), "--tls-key-file", str(issued.keyfile)]
    options += ["--tls-ca-cert-file", str(authority.certfile)]
    with blob_server("redis", tmp_path, *options):
        endpoint = Endpoint(host="127.0.0.1", port=port, tls=True, ca=str(authority.certfile))
        with contextlib.closing(Bulk(endpoint)) as bulk:
            bulk.bound(time.monotonic() + 60)
            assert bulk.set(b"k", [b"head", BIG], 100) == "OK"
            into = buffer(len(BIG) + 4)
            assert get(bulk, b"k", into) == len(into)
            assert bytes(into) == b"head" + BIG
            bulk.bound(time.monotonic() - 1)
            bulk.send_get(b"k", 100)
            with pytest.raises(BulkLateError):
                bulk.receive([into])
        stranger = Authority(tmp_path, "stranger")
        with (
            contextlib.closing(Bulk(replace(endpoint, ca=str(stranger.certfile)))) as bulk,
            pytest.raises(BulkError, match="certificate verify failed"),
        ):
            bulk.exists([b"k"])


def test_a_refused_port_is_told_at_once() -> None:
    with pytest.raises(BulkError, match="refused"):
        Bulk(Endpoint(host="127.0.0.1", port=free_port())).exists([b"k"])


def test_a_server_that_does_not_accept_is_given_up(tmp_path: Path) -> None:
    """A full backlog: the connection neither stands nor is refused."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(tmp_path / "full.sock"))
        listener.listen(0)
        endpoint = Endpoint(path=str(tmp_path / "full.sock"), port=0)
        clients = [Bulk(endpoint, connect_s=0.05) for _ in range(8)]
        for client in clients:
            stack.enter_context(contextlib.closing(client))
        with pytest.raises(BulkError):
            [client.open() for client in clients]


def test_a_frozen_server_is_given_up_after_io_s(server: BlobServer) -> None:
    with contextlib.closing(Bulk(server.endpoint, io_s=0.2)) as bulk:
        bulk.set(b"k", [b"v"], 100)
        server.freeze()
        try:
            with pytest.raises(BulkError, match=r"no progress within 0\.2 s"):
                get(bulk, b"k", buffer(1))
            with pytest.raises(BulkError, match=r"no progress within 0\.2 s"):
                bulk.set(b"k", [BIG] * 20, 100)
        finally:
            server.thaw()
        assert get(bulk, b"k", buffer(1)) == 1


def test_the_deadline_ends_a_wait_and_tells_silence_from_slowness(
    server: BlobServer, bulk: Bulk
) -> None:
    bulk.set(b"k", [b"v"], 100)
    server.freeze()
    try:
        bulk.bound(time.monotonic() + 0.1)
        with pytest.raises(BulkLateError) as caught:
            get(bulk, b"k", buffer(1))
    finally:
        server.thaw()
    assert caught.value.is_stalled


def test_a_cancel_from_another_thread_ends_a_wait(server: BlobServer, bulk: Bulk) -> None:
    bulk.set(b"k", [b"v"], 100)
    cancelled = threading.Event()
    bulk.bound(time.monotonic() + 60, cancelled)
    server.freeze()
    timer = threading.Timer(0.05, cancelled.set)
    try:
        timer.start()
        with pytest.raises(BulkCancelledError):
            get(bulk, b"k", buffer(1))
    finally:
        server.thaw()
        timer.join()


def test_a_connection_cut_in_a_reply_is_rebuilt(server: BlobServer, bulk: Bulk) -> None:
    bulk.set(b"k", [BIG], 100)
    proxy = Proxy(server.endpoint)
    with contextlib.closing(proxy), contextlib.closing(Bulk(proxy.endpoint)) as through:
        into = buffer(len(BIG))
        for cut_after in (1, 20, 100_000, len(BIG) + 10):
            proxy.cut_after = cut_after
            with pytest.raises(BulkError):
                get(through, b"k", into)
        proxy.cut_after = None
        assert get(through, b"k", into) == len(BIG)
        assert bytes(into) == BIG
        assert proxy.num_connections == 5


def test_what_is_no_resp_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "odd.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(4)
        answers = [b"HTTP/1.1 400\r\n", b":x\r\n", b":1\r\n$3\r\nabcdef", b"x" * 9000]

        def serve() -> None:
            for answer in answers:
                client, _ = listener.accept()
                with client:
                    client.recv(100)
                    client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with contextlib.closing(Bulk(Endpoint(path=path, port=0))) as bulk:
            for _ in answers:
                with pytest.raises(BulkError):
                    get(bulk, b"k", buffer(3))
                assert not bulk.is_open
        thread.join()
