"""Real servers of both makes, and stores on them; a test's tenant is its own."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from router.engine.chain import HashChain
from router.state.embedded import EmbeddedServer, Role, find_binary
from router.state.sessions import SessionStore
from router.state.tier import BlobTier
from tests.unit.state.blob_servers import KINDS, BlobServer, blob_server, chain_of, fill, tier_of
from tests.unit.state.tiers import PATIENT, POSITIONS

_tenants = itertools.count(1)


class StartServer(Protocol):
    """Starts a server that lives as long as the test."""

    def __call__(
        self,
        role: Role = Role.META,
        *,
        maxmemory_bytes: int = 0,
        tcp: bool = False,
        extra: str = "",
    ) -> EmbeddedServer: ...


@pytest.fixture(scope="session", params=["redis", "valkey"])
def server_program(request: pytest.FixtureRequest) -> Path:
    """The program of a server: Redis 7 of the system, Valkey 9 of the package."""
    if request.param == "valkey":
        return find_binary()
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("no redis-server on PATH: only Valkey is tested (.ci/run installs it)")
    return Path(found)


@pytest.fixture(scope="session")
def shared_server(server_program: Path) -> Iterator[EmbeddedServer]:
    """One meta server for all tests that leave it as it is."""
    with EmbeddedServer.start(Role.META, binary=server_program) as server:
        yield server


@pytest.fixture
def start_server(server_program: Path) -> Iterator[StartServer]:
    """Start servers of the make under test."""
    started: list[EmbeddedServer] = []

    def start(
        role: Role = Role.META,
        *,
        maxmemory_bytes: int = 0,
        tcp: bool = False,
        extra: str = "",
    ) -> EmbeddedServer:
        server = EmbeddedServer.start(
            role, binary=server_program, maxmemory_bytes=maxmemory_bytes, tcp=tcp, extra=extra
        )
        started.append(server)
        return server

    yield start
    for server in started:
        server.close()


@pytest.fixture
def tenant() -> str:
    """A tenant that no other test has."""
    return f"t{next(_tenants)}"


@pytest.fixture
async def store(shared_server: EmbeddedServer) -> AsyncIterator[SessionStore]:
    """A store of the router `r0`."""
    made = SessionStore.connect(shared_server.endpoint, engine="r0")
    yield made
    await made.close()


@pytest.fixture
async def other(shared_server: EmbeddedServer) -> AsyncIterator[SessionStore]:
    """A store of another router, `r1`, on the same server."""
    made = SessionStore.connect(shared_server.endpoint, engine="r1")
    yield made
    await made.close()


StoreMaker = Callable[..., SessionStore]


@pytest.fixture
async def make_store() -> AsyncIterator[StoreMaker]:
    """Make stores of any settings; closed after the test."""
    made: list[SessionStore] = []

    def make(server: EmbeddedServer, engine: str = "r0", **arguments: object) -> SessionStore:
        made.append(SessionStore.connect(server.endpoint, engine=engine, **arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        await one.close()


@pytest.fixture(params=KINDS)
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[BlobServer]]:
    """Two blob servers."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(blob_server(request.param, tmp_path, name=name))
            for name in ("one", "two")
        ]


@pytest.fixture
def chain() -> HashChain:
    """The hashes of some prompt."""
    return chain_of(2000)


@pytest.fixture
def tier(servers: list[BlobServer], chain: HashChain) -> Iterator[BlobTier]:
    """A tier whose servers hold snapshots at `POSITIONS` and all blocks before the last."""
    with contextlib.closing(tier_of(*servers, settings=PATIENT)) as tier:
        fill(tier, chain, *POSITIONS)
        yield tier
