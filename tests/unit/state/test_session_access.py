"""Users, passwords and TLS: what a user may not do stays undone, and no secret shows."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from protos.errors import StateUnavailableError
from router.state.control import ControlClient
from router.state.embedded import EmbeddedServer
from router.state.endpoint import Endpoint
from router.state.session_records import Engine
from router.state.sessions import SessionStore
from tests.certificates import Authority
from tests.unit.state.conftest import StartServer
from tests.unit.state.test_session_faults import HOST, free_port
from tests.unit.state.turns import add_turn, commit, opening

SECRET = "s3cret/@:#"
RULES = "-@all +@read +@write +@scripting +@connection +@transaction -@dangerous"
"""All that sessions need, as README gives it; nothing that looks at or flushes the whole server."""


async def whole_life(endpoint: Endpoint) -> None:
    """Call everything once."""
    store = SessionStore.connect(endpoint, engine="r0")
    await store.ping()
    await store.create("t", "s", ttl_s=60, quota_tokens=100)
    lease = await add_turn(store, "t", "s", [1], [2], release=False)
    await store.open_turn(lease, opening("q2", [3]))
    await store.checkpoint(lease, [4])
    await store.attach_snapshot("t", "s", 2, b"h" * 32)
    await store.abandon_turn(lease)
    await store.open_turn(lease, opening("q3", [3]))
    await commit(store, lease, [5])
    await store.renew(lease)
    await store.report_dead("r9", "b")
    await store.heartbeat(
        Engine(engine="r0", boot="b", address="h:1", namespace="ab", load=0.0, warm=b"")
    )
    assert len(await store.engines()) == 1
    assert (await store.tokens(lease)).tolist() == [1, 2, 3, 5]
    await store.release(lease)
    assert (await store.fork("t", "s", "f", 3)).num_tokens == 3
    assert len((await store.list("t"))[0]) == 2
    assert await store.delete("t", "s")
    await store.close()


@pytest.fixture
def guarded(start_server: StartServer) -> EmbeddedServer:
    """A server where only the user `router` may do anything, and only with our keys."""
    return start_server(extra=f"user default off\nuser router on >{SECRET} ~qs1:* {RULES}")


def as_user(server: EmbeddedServer, password: str) -> Endpoint:
    return Endpoint(path=server.endpoint.path, port=0, username="router", password=password)


async def test_a_user_of_our_keys_can_do_everything_we_do(guarded: EmbeddedServer) -> None:
    await whole_life(as_user(guarded, SECRET))
    await whole_life(Endpoint.parse(as_user(guarded, SECRET).url()))


@pytest.mark.parametrize(
    "words",
    [("GET", "foreign"), ("FLUSHALL",), ("KEYS", "*"), ("EVAL", "return redis.call('GET','x')", 0)],
)
async def test_a_user_of_our_keys_can_do_nothing_else(
    words: tuple[str | int, ...], guarded: EmbeddedServer
) -> None:
    client = ControlClient(as_user(guarded, SECRET))
    with pytest.raises(StateUnavailableError, match=r"NoPermissionError|ACL|permission"):
        await client.command(*words)
    await client.close()


async def test_a_wrong_password_is_not_tried_again_and_not_shown(
    guarded: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = ControlClient(as_user(guarded, "wr0ng"))
    with pytest.raises(StateUnavailableError, match="refuses our user or password") as caught:
        await client.command("PING")
    assert client.num_attempts == 1
    await client.close()
    assert "wr0ng" not in f"{caught.value}{caught.value.fields}{caplog.text}"


async def test_a_server_that_wants_a_password_refuses_without(start_server: StartServer) -> None:
    server = start_server(tcp=True)
    await whole_life(server.endpoint)
    client = ControlClient(Endpoint(host=HOST, port=server.endpoint.port))
    with pytest.raises(StateUnavailableError, match="refuses our user or password"):
        await client.command("PING")
    await client.close()


class Secured:
    """A TLS port of a server, and certificates for it."""

    def __init__(
        self,
        start_server: StartServer,
        folder: Path,
        clients: str,
        names: tuple[str, ...] = (HOST,),
    ) -> None:
        self.folder = folder
        authority = Authority(folder)
        self.ca = authority.certfile
        server, self.client = authority.issue("server", names=names), authority.issue("client")
        self.port = free_port()
        start_server(
            extra=f"bind {HOST}\nport 0\ntls-port {self.port}\ntls-auth-clients {clients}\n"
            f"tls-cert-file {server.certfile}\ntls-key-file {server.keyfile}\n"
            f"tls-ca-cert-file {self.ca}\nrequirepass {SECRET_PLAIN}"
        )

    def url(self, scheme: str = "rediss", options: str = "") -> str:
        return f"{scheme}://:{SECRET_PLAIN}@{HOST}:{self.port}/0{options}"


SECRET_PLAIN = "pa55"


async def refused(url: str) -> str:
    """Return why a server cannot be used."""
    client = ControlClient(Endpoint.parse(url))
    with pytest.raises(StateUnavailableError) as caught:
        await client.command("PING")
    await client.close()
    assert SECRET_PLAIN not in str(caught.value)
    return str(caught.value)


async def test_tls_with_a_certificate_of_a_trusted_ca(
    start_server: StartServer, tmp_path: Path
) -> None:
    secured = Secured(start_server, tmp_path, "no")
    await whole_life(Endpoint.parse(secured.url(options=f"?ca={secured.ca}")))
    assert "CERTIFICATE_VERIFY_FAILED" in await refused(secured.url())
    foreign = Authority(tmp_path, "foreign")
    assert "CERTIFICATE_VERIFY_FAILED" in await refused(
        secured.url(options=f"?ca={foreign.certfile}")
    )
    await refused(secured.url("redis"))


async def test_tls_checks_the_servers_name(start_server: StartServer, tmp_path: Path) -> None:
    secured = Secured(start_server, tmp_path, "no", names=("elsewhere.test",))
    assert "IP address mismatch" in await refused(secured.url(options=f"?ca={secured.ca}"))


async def test_tls_with_certificates_on_both_sides(
    start_server: StartServer, tmp_path: Path
) -> None:
    secured = Secured(start_server, tmp_path, "yes")
    ours = f"&cert={secured.client.certfile}&key={secured.client.keyfile}"
    await whole_life(Endpoint.parse(secured.url(options=f"?ca={secured.ca}{ours}")))
    await refused(secured.url(options=f"?ca={secured.ca}"))
