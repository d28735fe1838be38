"""Clients that ask a service for the same generations all the time, and compare."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from protos.client import Client, ClientConfig
from protos.errors import ExpertMeshError
from protos.events import Completion, Delta

PROMPTS = ([5, 6, 7], [50, 60, 70, 80], [9] * 40)
NUM_TOKENS = 120
CONFIG = ClientConfig(timeout_s=180.0, resume_timeout_s=150.0, max_attempts=1000)
"""Waits for a router that starts again on a busy machine."""


def generate(client: Client, prompt: list[int], pauses: list[float] | None = None) -> list[int]:
    """Return the tokens of a greedy generation; note the longest wait for one."""
    completion, longest_s, before = Completion(), 0.0, time.monotonic()
    options = {"max_tokens": NUM_TOKENS, "temperature": 0.0, "ignore_eos": True}
    for event in client.generate(prompt, **options):  # type: ignore[arg-type]
        completion.add(event)
        if isinstance(event, Delta):
            now = time.monotonic()
            longest_s, before = max(longest_s, now - before), now
    if pauses is not None:
        pauses.append(longest_s)
    return completion.token_ids


@dataclass(slots=True)
class Traffic:
    """One client per prompt; use as a context. No request may fail, no token may differ."""

    addresses: list[str]
    expected: list[list[int]] = field(default_factory=list)
    """The answers; asked for at the start where they are not given."""
    period_s: float = 0.0
    """A client begins a generation every so many seconds at most."""
    num_done: int = 0
    unequal: int = 0
    failures: list[ExpertMeshError] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    """Longest wait for a token of each generation, seconds."""
    _ended: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        if not self.expected:
            with Client(self.addresses, CONFIG) as client:
                self.expected = [generate(client, prompt) for prompt in PROMPTS]
        assert all(len(tokens) == NUM_TOKENS for tokens in self.expected)
        for index in range(len(PROMPTS)):
            thread = threading.Thread(target=self._run, args=(index,))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *details: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(CONFIG.timeout_s)
            assert not thread.is_alive()

    def _run(self, index: int) -> None:
        # Each begins with another router, and learns of the others.
        shift = index % len(self.addresses)
        addresses = self.addresses[shift:] + self.addresses[:shift]
        with Client(addresses, CONFIG) as client:
            due = time.monotonic()
            while not self._ended.wait(max(0.0, due - time.monotonic())):
                due = time.monotonic() + self.period_s
                try:
                    tokens = generate(client, PROMPTS[index], self.pauses)
                except ExpertMeshError as error:
                    self.failures.append(error)
                    continue
                self.unequal += tokens != self.expected[index]
                self.num_done += 1

    def is_whole(self) -> bool:
        """Return whether nothing failed and nothing differed, and something was asked."""
        return not self.failures and not self.unequal and self.num_done > 0
