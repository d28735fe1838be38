"""A client process that tests may kill: it streams, and says how far it is.

    python -m tests.chaos.streaming_client ADDRESS SESSION ...

One stream for each session (`-`: none). Prints a line when every stream has some tokens.
"""

from __future__ import annotations

import asyncio
import sys

from protos.client import AsyncClient
from protos.events import Delta

SOME_TOKENS = 5


async def stream_all(address: str, sessions: list[str]) -> None:
    """Stream until killed."""
    begun = asyncio.Semaphore(0)

    async def one(client: AsyncClient, session: str) -> None:
        options = {} if session == "-" else {"session": session}
        tokens = 0
        async for event in client.generate("Once", ignore_eos=True, **options):
            tokens += len(event.token_ids) if isinstance(event, Delta) else 0
            if tokens >= SOME_TOKENS:
                begun.release()
                tokens = -(10**9)

    async with AsyncClient(address) as client:
        tasks = [asyncio.create_task(one(client, session)) for session in sessions]
        for _ in tasks:
            await begun.acquire()
        print("streaming", flush=True)
        await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(stream_all(sys.argv[1], sys.argv[2:]))
