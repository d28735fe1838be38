"""The control path to one Redis server: small commands, each bounded in time, retried and counted.

Decides when a call is tried again, when the server counts as down, and which error of ours each of
its failures is. Every operation must be safe to send twice. Values of megabytes do not go this way
but through `router.state.bulk`; the defaults of redis-py are not used, because they wait up to a
minute for a frozen server.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from protos.errors import InternalError, StateUnavailableError
from router.state.breaker import CircuitBreaker
from router.state.endpoint import Endpoint
from router.state.scripts import Script

logger = logging.getLogger(__name__)
T = TypeVar("T")
Argument = bytes | str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    """Bounds of one call; all together it takes at most `tries` times connect and operation."""

    connect_s: float = 0.2
    """Seconds to connect."""
    operation_s: float = 0.5
    """Seconds from sending a command to its whole answer."""
    tries: int = 3
    """Attempts of one call, 1 or more."""
    backoff_s: float = 0.01
    """Bound of the random pause before the second attempt; doubles with each, up to 0.2."""
    max_connections: int = 32
    """Connections, and so calls at the same time; more wait for one."""
    wait_replicas: int = 0
    """Replicas that must have a write before it counts, where a call asks for durability."""
    wait_s: float = 0.1
    """Seconds that they get."""


class ControlClient:
    """Calls to one server from one event loop.

    Args:
        endpoint: The server.
        settings: Bounds of a call.
        breaker: Shared with whoever else uses the server; None makes one.
        generator: Draws the pauses.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        settings: ControlSettings | None = None,
        *,
        breaker: CircuitBreaker | None = None,
        generator: random.Random | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.breaker = breaker or CircuitBreaker(str(endpoint))
        self.num_attempts = 0
        self._settings = chosen = settings or ControlSettings()
        self._random = generator or random.Random()
        self._slots = asyncio.Semaphore(chosen.max_connections)
        self._redis = redis.asyncio.Redis(
            **endpoint.redis_arguments(),
            protocol=2,
            decode_responses=False,
            socket_connect_timeout=chosen.connect_s,
            socket_timeout=chosen.operation_s,
            retry=Retry(NoBackoff(), 0),
            max_connections=chosen.max_connections,
            driver_info=None,  # it would send CLIENT SETINFO, which an ACL may refuse
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def command(self, *words: Argument) -> Any:
        """Send one command and return its answer.

        Raises:
            StateUnavailableError: The server does not answer in time, or refuses.
        """
        return await self._call(lambda client: client.execute_command(*words))

    async def transaction(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Send commands as one MULTI and return their answers.

        Raises:
            StateUnavailableError: The server does not answer in time, or refuses.
        """

        async def send(client: redis.asyncio.Redis) -> list[Any]:
            async with client.pipeline(transaction=True) as pipeline:
                for words in commands:
                    pipeline.execute_command(*words)
                return list(await pipeline.execute())

        return await self._call(send)

    async def script(
        self,
        script: Script,
        keys: Sequence[bytes],
        arguments: Sequence[Argument] = (),
        *,
        durable: bool = False,
    ) -> list[Any]:
        """Run a script and return its answer, a list that begins with a word.

        Args:
            script: What to run; a server that does not know it gets its source.
            keys: Its KEYS.
            arguments: Its ARGV.
            durable: Wait until `wait_replicas` replicas have what it wrote.

        Raises:
            StateUnavailableError: The server does not answer in time, refuses, or too few replicas
                have the write, which then may be there or not.
        """
        words: list[Argument] = [len(keys), *keys, *arguments]
        replicas = self._settings.wait_replicas if durable else 0

        async def run(client: redis.asyncio.Redis) -> list[Any]:
            if not replicas:
                return await _evaluate(client, script, words)
            async with client.client() as one:  # WAIT is about the writes of its own connection
                reply = await _evaluate(one, script, words)
                timeout_ms = round(1000 * self._settings.wait_s)
                have = int(await one.execute_command("WAIT", replicas, timeout_ms))
                if have < replicas:
                    raise _UnsafeError(f"{have} of {replicas} replicas have the write")
                return reply

        return await self._call(run)

    async def _call(self, operation: Callable[[redis.asyncio.Redis], Awaitable[T]]) -> T:
        async with self._slots:
            last = ""
            for attempt in range(self._settings.tries):
                if attempt:
                    bound_s = min(0.2, self._settings.backoff_s * 2.0 ** (attempt - 1))
                    await asyncio.sleep(self._random.uniform(0, bound_s))
                if not self.breaker.allow():
                    raise self._unavailable(last or "its circuit breaker is open")
                started = time.monotonic()
                self.num_attempts += 1
                try:
                    bound_s = self._settings.connect_s + self._settings.operation_s
                    async with asyncio.timeout(bound_s):
                        result = await operation(self._redis)
                except (OSError, exceptions.RedisError) as error:  # TimeoutError is an OSError
                    last = self._judge(error, time.monotonic() - started)
                    continue
                self.breaker.succeeded(time.monotonic() - started)
                return result
            raise self._unavailable(last)

    def _judge(self, error: Exception, seconds: float) -> str:
        """Count a failed attempt and say what it was; raises where a second one has no point."""
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        refusal = exceptions.AuthenticationError | exceptions.AuthorizationError
        if isinstance(error, refusal) or isinstance(error.__cause__, refusal):
            self.breaker.failed()
            raise self._unavailable(f"it refuses our user or password ({text})") from error
        if isinstance(error, exceptions.ResponseError) and not isinstance(
            error, exceptions.ReadOnlyError
        ):
            self.breaker.succeeded(seconds)  # it answers, and reading may still work
            if text.startswith("ResponseError: ERR") or "WRONGTYPE" in text:
                raise InternalError(f"{self.endpoint}: {text}") from error
            raise self._unavailable(text) from error
        self.breaker.failed()
        logger.warning("state_call_failed server=%s error=%r", self.endpoint, text)
        return text

    def _unavailable(self, detail: str) -> StateUnavailableError:
        return StateUnavailableError(
            f"{self.endpoint}: {detail}", max(1.0, self.breaker.retry_after_s)
        )


async def _evaluate(
    client: redis.asyncio.Redis, script: Script, words: Sequence[Argument]
) -> list[Any]:
    """Run a script by its digest, or by its source where the server does not know it."""
    try:
        return list(await client.execute_command("EVALSHA", script.sha, *words))
    except exceptions.NoScriptError:
        return list(await client.execute_command("EVAL", script.source, *words))


class _UnsafeError(exceptions.ResponseError):
    """Too few replicas have a write."""
