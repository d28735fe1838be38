"""A client of the batch: takes a part, asks its rows, commits them. Knows no Ray."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

from cluster.batch.asker import Asker, AskerSettings
from cluster.batch.ledger import DonePart, Ledger
from cluster.batch.outcomes import Outcome, refused
from cluster.batch.parts import Part
from cluster.batch.rows import RowDefaults, id_of, parse_line, row_of
from cluster.batch.source import Format, PartReader
from cluster.batch.storage import Place
from protos.errors import InvalidFieldError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What a client must know of the batch."""

    input_uri: str
    input_format: Format
    output_uri: str
    output_format: Format
    id_field: str
    defaults: RowDefaults
    asker: AskerSettings


class PartWorker:
    """Works on parts; several threads may call, and share the rows that may be asked at a time.

    Args:
        settings: Of the batch.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._reader = PartReader(Place.of(settings.input_uri, "input"), settings.input_format)
        self._ledger = Ledger(Place.of(settings.output_uri, "output"), settings.output_format)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="asker", daemon=True)
        self._thread.start()
        self._asker: Asker = self._call(self._make_asker())

    def run(self, part: Part) -> DonePart:
        """Ask a part's rows and commit them; a part that is committed is left as it is.

        Raises:
            ExpertMeshError: The service is gone; see `Asker.ask`.
        """
        if (done := self._ledger.committed(part.number)) is not None:
            return done
        self._ledger.try_part(part.number)
        rows = self._reader.read(part)
        outcomes: list[Outcome] = self._call(self._ask_all(part, rows))
        return self._ledger.commit(part.number, outcomes)

    def close(self) -> None:
        """Close the connections and end the thread."""
        self._call(self._asker.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _make_asker(self) -> Asker:
        return Asker(self._settings.asker)

    async def _ask_all(self, part: Part, rows: list[Any]) -> list[Outcome]:
        duplicates = set(part.duplicates)
        try:
            async with asyncio.TaskGroup() as group:
                asked = [
                    group.create_task(self._ask(part.first_row + position, row, duplicates))
                    for position, row in enumerate(rows)
                ]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in asked]

    async def _ask(self, number: int, content: Any, duplicates: set[int]) -> Outcome:
        id_field, custom_id = self._settings.id_field, None
        try:
            document = parse_line(content) if isinstance(content, bytes) else content
            custom_id = id_of(document, id_field)
            if number in duplicates:
                raise InvalidFieldError(id_field, "must be unique in the input", custom_id)
            row = row_of(number, document, id_field=id_field, defaults=self._settings.defaults)
        except InvalidFieldError as error:
            return refused(number, custom_id, error)
        return await self._asker.ask(row)

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
