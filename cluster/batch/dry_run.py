"""What a batch would take: tokens by the router's own tokeniser, time by a measured rate.

Rows spread evenly over the input are tokenised, `SAMPLED_ROWS` at most; a few of them are answered,
at the concurrency of a client, with `MEASURED_TOKENS` tokens at most each. The prompt's tokens are
exact where every row is sampled, the output's are an upper bound (`max_tokens` of each row).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.batch.asker import Asker, AskerSettings
from cluster.batch.drive import PATIENCE, Prepared, prepare
from cluster.batch.options import BatchOptions
from cluster.batch.outcomes import Counts
from cluster.batch.parts import Plan
from cluster.batch.rows import Row, parse_line, row_of
from cluster.batch.source import PartReader
from cluster.batch.storage import Place
from protos.async_client import AsyncClient
from protos.client import Client
from protos.errors import InvalidFieldError
from protos.v1 import generation_pb2

SAMPLED_ROWS = 1000
MEASURED_ROWS = 32
MEASURED_TOKENS = 16
AT_A_TIME = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of the whole input."""

    rows: int
    sampled_rows: int
    bad_rows: int
    """Of the sampled ones: they would fail without being asked."""
    prompt_tokens: int
    max_completion_tokens: int
    tokens_per_s: float
    """Prompt and output, of one client at its concurrency."""

    def document(self, price_per_million: float | None) -> dict[str, Any]:
        """Return the numbers, with time and price."""
        total = self.prompt_tokens + self.max_completion_tokens
        price = None if price_per_million is None else total * price_per_million / 1e6
        return {
            "rows": self.rows,
            "sampled_rows": self.sampled_rows,
            "bad_rows_in_sample": self.bad_rows,
            "prompt_tokens": self.prompt_tokens,
            "max_completion_tokens": self.max_completion_tokens,
            "measured_tokens_per_s": round(self.tokens_per_s, 1),
            "max_time_s": round(total / self.tokens_per_s) if self.tokens_per_s else None,
            "max_price": None if price is None else round(price, 4),
        }


def estimate(options: BatchOptions) -> Estimate:
    """Return what a batch would take; writes nothing.

    Raises:
        ExpertMeshError: The service does not answer, or the input cannot be read.
    """
    access = options.access
    with Client(options.url, PATIENCE, tls=access.tls, api_key=access.api_key) as client:
        prepared = prepare(options, client)
    rows, num_sampled = _sample(options, prepared)
    return asyncio.run(_estimate(options, prepared, rows, num_sampled))


def _sample(options: BatchOptions, prepared: Prepared) -> tuple[list[Row], int]:
    """Return rows that are spread evenly over the input, and how many were looked at."""
    plan = prepared.plan
    reader = PartReader(Place.of(options.input_uri, "input"), prepared.kind)
    rows = []
    numbers = _even(plan)
    for part in plan.parts:
        wanted = [n for n in numbers if part.first_row <= n < part.first_row + part.num_rows]
        content: Sequence[Any] = reader.read(part) if wanted else []
        for number in wanted:
            found = content[number - part.first_row]
            try:
                document = parse_line(found) if isinstance(found, bytes) else found
                row = row_of(number, document, id_field=options.id_field, defaults=options.defaults)
            except InvalidFieldError:
                continue
            if number not in part.duplicates:
                rows.append(row)
    return rows, len(numbers)


def _even(plan: Plan) -> list[int]:
    count = min(plan.num_rows, SAMPLED_ROWS)
    return [position * plan.num_rows // count for position in range(count)]


async def _estimate(
    options: BatchOptions, prepared: Prepared, rows: list[Row], num_sampled: int
) -> Estimate:
    access = options.access
    longest = prepared.model.max_model_len
    async with AsyncClient(
        list(prepared.addresses), PATIENCE, tls=access.tls, api_key=access.api_key
    ) as client:
        seats = asyncio.Semaphore(AT_A_TIME)

        async def count(row: Row) -> int:
            async with seats:
                return await _prompt_tokens(client, row)

        prompts = await asyncio.gather(*map(count, rows))
    outputs = [
        row.request.stopping.max_tokens or max(0, longest - prompt)
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    scale = prepared.plan.num_rows / num_sampled
    return Estimate(
        rows=prepared.plan.num_rows,
        sampled_rows=num_sampled,
        bad_rows=num_sampled - len(rows),
        prompt_tokens=round(scale * sum(prompts)),
        max_completion_tokens=round(scale * sum(outputs)),
        tokens_per_s=await _rate(options, prepared, rows),
    )


async def _prompt_tokens(client: AsyncClient, row: Row) -> int:
    request = row.request
    if request.WhichOneof("input") == "tokens":
        return len(request.tokens.ids)
    asked = generation_pb2.TokenizeRequest()
    if request.WhichOneof("input") == "chat":
        asked.chat.CopyFrom(request.chat)
    else:
        asked.text = request.text
    return len((await client.tokenize_message(asked)).token_ids)


async def _rate(options: BatchOptions, prepared: Prepared, rows: list[Row]) -> float:
    """Return the tokens a second of a few rows, cut short."""
    asker = Asker(
        AskerSettings(
            addresses=prepared.addresses,
            access=options.access,
            model=prepared.model.name,
            concurrency=options.concurrency,
        )
    )
    measured = rows[:: max(1, len(rows) // MEASURED_ROWS)][:MEASURED_ROWS]
    for row in measured:
        most = row.request.stopping.max_tokens or MEASURED_TOKENS
        row.request.stopping.max_tokens = min(most, MEASURED_TOKENS)
        row.request.stopping.ClearField("min_tokens")
    begin = time.monotonic()
    try:
        counts = Counts.of(await asyncio.gather(*map(asker.ask, measured)))
    finally:
        await asker.close()
    tokens = counts.prompt_tokens + counts.completion_tokens
    return tokens / (time.monotonic() - begin)
