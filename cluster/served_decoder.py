"""The decoder as a router's engine sees it."""

from __future__ import annotations

from torch import Tensor

from router.engine.batch import Batch
from router.gating.dispatch import ExpertDispatcher
from router.model.cache_io import DecoderCacheIo
from router.model.decoder import Caches, Decoder


class ServedDecoder:
    """The decoder as the engine sees it, with the time that it waited for experts."""

    def __init__(self, decoder: Decoder, dispatcher: ExpertDispatcher | None) -> None:
        self._decoder = decoder
        self._dispatcher = dispatcher
        self._unserved_s = 0.0

    def begin(self) -> None:
        """Count from here: what came before was no request's."""
        self._unserved_s = self._waited_s

    @property
    def dispatch_s(self) -> float:
        """Seconds spent waiting for expert groups since `begin`."""
        return self._waited_s - self._unserved_s

    @property
    def _waited_s(self) -> float:
        return self._dispatcher.dispatch_s if self._dispatcher is not None else 0.0

    def allocate_caches(self, num_blocks: int, block_size: int, num_state_slots: int) -> Caches:
        """See `Decoder.allocate_caches`."""
        return self._decoder.allocate_caches(num_blocks, block_size, num_state_slots)

    def cache_io(self, caches: Caches) -> DecoderCacheIo:
        """See `Decoder.cache_io`."""
        return self._decoder.cache_io(caches)

    def forward(self, batch: Batch, caches: Caches) -> Tensor:
        """See `Decoder.forward`."""
        return self._decoder.forward(batch, caches)
