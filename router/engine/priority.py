"""What batch sequences get beside interactive ones.

Interactive sequences come first in the queue, in the tokens of a step, and when blocks run out; an
interactive sequence that finds no seat or no blocks takes those of the newest batch sequence, which
waits and comes back with all its tokens. Three things more keep the time to an interactive first
token near to what it is without a batch:

- a step that prefills an interactive prompt leaves all batch sequences out, decoding ones too;
- while interactive requests come, the prompts of batch sequences get a sixteenth of a step's
  tokens, so that no step in which an interactive request arrives is long;
- a step of batch work alone waits some milliseconds for the tier to say how much of a prompt that
  has just come can be restored (`EngineCore`), instead of keeping it waiting for a whole step.

The share that batch work keeps: every eighth step takes it along, whatever waits. It has no claim
to seats or blocks: as long as interactive requests fill them all, it waits.
"""

from __future__ import annotations

BATCH_EVERY = 8
"""Of consecutive steps that prefill interactive prompts, each one of so many has batch work."""
BATCH_PROMPT_PART = 16
"""Batch prompts get a step's tokens divided by this, beside interactive traffic."""
QUIET_S = 60.0
"""Without an interactive request for so long, batch prompts get whole steps."""


class BatchShare:
    """Decides it, step by step.

    Args:
        max_num_batched_tokens: Most tokens of a step.
    """

    def __init__(self, max_num_batched_tokens: int) -> None:
        self._whole = max_num_batched_tokens
        self._part = max(1, max_num_batched_tokens // BATCH_PROMPT_PART)
        self._quiet_from = float("-inf")
        self._num_left_out = 0

    def note_interactive(self, now: float) -> None:
        """An interactive sequence waits or runs."""
        self._quiet_from = now + QUIET_S

    def prompt_tokens(self, now: float) -> int:
        """Return the most tokens of batch prompts in the next step."""
        return self._whole if now >= self._quiet_from else self._part

    def leaves_out(self, has_interactive_prompt: bool) -> bool:
        """Return whether the next step is without batch work.

        Args:
            has_interactive_prompt: It prefills one.
        """
        if has_interactive_prompt and self._num_left_out < BATCH_EVERY - 1:
            self._num_left_out += 1
            return True
        self._num_left_out = 0
        return False
