"""What a batch is to do: its options, their rules, and how they are written down for a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.batch.rows import RowDefaults
from cluster.batch.source import Format
from cluster.batch.storage import absolute_uri
from cluster.ray_data import Pool
from protos.errors import ConfigurationError
from protos.tls import Access


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """What a batch is to do."""

    input_uri: str
    output_uri: str
    url: str
    """Of a router, or several with commas."""
    access: Access
    id_field: str = "custom_id"
    output_format: Format | None = None
    """None: the input's."""
    limit: int | None = None
    """Most rows."""
    part_rows: int = 256
    """Rows that are committed together, and repeated together after a crash."""
    concurrency: int = 32
    """Rows that one client asks at a time."""
    pool: Pool
    max_retries: int = 3
    max_failure_rate: float = 1.0
    """Of all rows, in [0, 1]; once more have failed the batch stops."""
    defaults: RowDefaults
    ray_address: str | None = None
    """None: a Ray of its own on this machine."""
    is_submitted: bool = False
    """Run by the service, in its own Ray, which is not there for a `batch resume`."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigurationError: One is out of range.
        """
        pool = self.pool
        rules = [
            ("part_rows", self.part_rows >= 1, "must be at least 1", self.part_rows),
            ("concurrency", self.concurrency >= 1, "must be at least 1", self.concurrency),
            ("limit", self.limit is None or self.limit >= 1, "must be at least 1", self.limit),
            ("max_retries", self.max_retries >= 0, "must be 0 or more", self.max_retries),
            (
                "max_failure_rate",
                0 <= self.max_failure_rate <= 1,
                "must be in [0, 1]",
                self.max_failure_rate,
            ),
            (
                "clients",
                1 <= pool.min_clients <= pool.max_clients,
                "must be MIN:MAX with 1 <= MIN <= MAX",
                f"{pool.min_clients}:{pool.max_clients}",
            ),
            (
                "parts_in_flight",
                pool.parts_in_flight >= 1,
                "must be at least 1",
                pool.parts_in_flight,
            ),
        ]
        for name, holds, rule, value in rules:
            if not holds:
                raise ConfigurationError(f"batch.{name}", rule, value)

    def located(self) -> BatchOptions:
        """Return the same with paths that mean the same wherever a client, or a resume, runs."""
        places = absolute_uri(self.input_uri), absolute_uri(self.output_uri)
        return replace(self, input_uri=places[0], output_uri=places[1])

    def document(self) -> dict[str, Any]:
        """Return the values as JSON, for `batch resume`; without what gives access."""
        own = {name: getattr(self, name) for name in _PLAIN}
        if self.is_submitted:
            own["ray_address"] = None
        return {**own, "pool": asdict(self.pool), "defaults": asdict(self.defaults)}

    @classmethod
    def of(
        cls,
        document: Mapping[str, Any],
        access: Access,
        url: str | None,
        output_uri: str | None = None,
    ) -> BatchOptions:
        """Return what `document` described.

        Args:
            document: Of `document`.
            access: How the service is reached.
            url: Of a router now; None: as it was.
            output_uri: Where the output is now; None: where it was.
        """
        values = dict(document)
        pool, defaults = Pool(**values.pop("pool")), RowDefaults(**values.pop("defaults"))
        values["url"] = url or values["url"]
        values["output_uri"] = output_uri or values["output_uri"]
        return cls(**values, pool=pool, defaults=defaults, access=access)


_PLAIN = (
    *("input_uri", "output_uri", "url", "id_field", "output_format", "limit", "part_rows"),
    *("concurrency", "max_retries", "max_failure_rate", "ray_address"),
)
