"""What other threads hand to the engine thread, and which requests are live.

The only state that the engine shares with its callers; all of it is behind one condition variable,
on which an idle engine sleeps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from protos.errors import DrainingError, DuplicateRequestError, EngineStoppedError
from router.engine.request import EngineRequest
from router.engine.sequence import Sequence


class Inbox:
    """Submitted and cancelled sequences, and calls that were posted. Any thread may use it."""

    def __init__(self) -> None:
        self._wake = threading.Condition()
        self._live: dict[str, list[Sequence]] = {}
        self._submitted: list[Sequence] = []
        self._cancelled: list[Sequence] = []
        self._posted: list[Callable[[], None]] = []
        self._num_submitted = 0
        self._is_draining = self._is_stopped = False
        self._on_request: Callable[[], None] | None = None
        """Set while the engine sleeps."""

    @property
    def is_asleep(self) -> bool:
        """Whether nothing is to run, whatever is submitted; read without the lock, by the engine
        thread: none was live when it became true."""
        return self._on_request is not None

    @property
    def has_calls(self) -> bool:
        """Whether there is anything to take; read without the lock, so perhaps a moment old."""
        return bool(self._submitted or self._cancelled or self._posted)

    @property
    def is_stopped(self) -> bool:
        """Whether the engine is to end now."""
        return self._is_stopped

    @property
    def num_submitted(self) -> int:
        """Sequences that the engine has not taken yet."""
        return len(self._submitted)

    @property
    def num_live(self) -> int:
        """Requests that have not ended."""
        with self._wake:
            return len(self._live)

    def submit(self, sequences: list[Sequence], count_ahead: Callable[[int], int]) -> int:
        """Take the sequences of one request.

        Args:
            sequences: They get their arrival numbers.
            count_ahead: Called under the lock with the number of sequences that were not taken yet;
                returns how many wait in all, or raises.

        Raises:
            EngineStoppedError: The engine has stopped.
            DrainingError: It takes no more requests.
            DuplicateRequestError: A request of this id is live.
        """
        request_id = sequences[0].request_id
        with self._wake:
            if self._is_stopped:
                raise EngineStoppedError()
            if self._is_draining:
                raise DrainingError()
            if request_id in self._live:
                raise DuplicateRequestError(request_id)
            ahead = count_ahead(len(self._submitted))
            for sequence in sequences:
                sequence.arrival = self._num_submitted
                self._num_submitted += 1
            self._live[request_id] = sequences.copy()
            self._submitted += sequences
            on_request = self._on_request
            self._wake.notify()
        if on_request is not None:
            on_request()
        return ahead

    def cancel(self, request_id: str, request: EngineRequest | None) -> bool:
        """Cancel the sequences of a request; return whether it was live.

        Args:
            request_id: Its id.
            request: What was submitted: then no other request of the same id is hit.
        """
        with self._wake:
            sequences = self._live.get(request_id)
            if not sequences:
                return False
            if request is not None and sequences[0].request is not request:
                return False
            # The sequences, not the id: it may be free and taken again before the next step.
            self._cancelled += sequences
            self._wake.notify()
        return True

    def post(self, call: Callable[[], None]) -> None:
        """Let the engine thread call something before its next step."""
        with self._wake:
            self._posted.append(call)
            self._wake.notify()

    def sleep(self, on_request: Callable[[], None]) -> bool:
        """Let nothing run until `wake`, unless a request is live; return whether it is so.

        Args:
            on_request: Called for each request that is submitted meanwhile, by whoever submits it.
        """
        with self._wake:
            if self._on_request is None and not self._live:
                self._on_request = on_request
            return self._on_request is not None

    def wake(self) -> None:
        """Let run what was submitted meanwhile."""
        with self._wake:
            self._on_request = None
            self._posted.append(lambda: None)  # so that the engine looks
            self._wake.notify()

    def drain(self) -> None:
        """Take no more requests."""
        with self._wake:
            self._is_draining = True
            self._wake.notify()

    def stop(self) -> None:
        """Let the engine end at once."""
        with self._wake:
            self._is_stopped = True
            self._wake.notify()

    # The engine thread.

    def take(self, queue: Callable[[Sequence], None]) -> tuple[list[Sequence], list[Sequence]]:
        """Return what was submitted and cancelled since the last time.

        Args:
            queue: Called under the lock for each submitted sequence, so that it always counts as
                waiting, here or there.
        """
        with self._wake:
            submitted, self._submitted = self._submitted, []
            cancelled, self._cancelled = self._cancelled, []
            for sequence in submitted:
                queue(sequence)
        return submitted, cancelled

    def take_posted(self) -> list[Callable[[], None]]:
        """Return what was posted since the last time."""
        with self._wake:
            posted, self._posted = self._posted, []
        return posted

    def wait(self, left_s: Callable[[], float]) -> bool:
        """Sleep until something comes or no time is left; return False when the engine is to end:
        stopped, or draining and without live requests."""
        with self._wake:
            while not self._is_stopped:
                if self.has_calls:
                    return True
                if self._is_draining and not self._live:
                    return False
                seconds = left_s()
                if seconds <= 0:
                    return True
                self._wake.wait(min(seconds, threading.TIMEOUT_MAX))
        return False

    def live_sequences(self) -> list[Sequence]:
        """Return all sequences that have not ended."""
        with self._wake:
            return [sequence for live in self._live.values() for sequence in live]

    def remove(self, sequence: Sequence) -> None:
        """Note that a sequence has ended."""
        with self._wake:
            live = self._live[sequence.request_id]
            live.remove(sequence)
            if not live:
                del self._live[sequence.request_id]
