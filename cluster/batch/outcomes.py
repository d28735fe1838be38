"""What became of a row: one line of the output, an answer or an error.

The line follows OpenAI's batch output, `{"id", "custom_id", "response", "error"}`, with the row's
number beside it; exactly one of `response` and `error` is set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.batch.rows import Row
from protos.errors import ExpertMeshError
from protos.events import Choice, Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One row of the output."""

    number: int
    custom_id: str | None
    """None: the row has no id."""
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def document(self) -> dict[str, Any]:
        """Return the line's content."""
        named = f"{self.number}:{self.custom_id}".encode()
        return {
            "id": f"batch_req_{hashlib.sha256(named).hexdigest()[:24]}",
            "custom_id": self.custom_id,
            "row": self.number,
            "response": self.response,
            "error": self.error,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Sums over rows."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Counts:
        """Count these."""
        return cls(
            rows=len(outcomes),
            failed=sum(outcome.error is not None for outcome in outcomes),
            prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
            completion_tokens=sum(outcome.completion_tokens for outcome in outcomes),
        )

    def __add__(self, other: Counts) -> Counts:
        ours, theirs = asdict(self), asdict(other)
        return Counts(**{name: ours[name] + theirs[name] for name in ours})


def answered(row: Row, completion: Completion, model: str) -> Outcome:
    """Return the outcome of a row that was answered."""
    usages = [choice.finished.usage for choice in completion.choices if choice.finished]
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    kind = "chat.completion" if row.is_chat else "text_completion"
    body = {
        "object": kind,
        "model": model,
        "choices": [_choice(choice, is_chat=row.is_chat) for choice in completion.choices],
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": completion.prompt_tokens + completion_tokens,
        },
    }
    return Outcome(
        number=row.number,
        custom_id=row.custom_id,
        response={"status_code": 200, "request_id": completion.request_id, "body": body},
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=completion_tokens,
    )


def refused(number: int, custom_id: str | None, error: ExpertMeshError) -> Outcome:
    """Return the outcome of a row that failed."""
    described = {"code": error.code.name, "reason": error.reason, "message": error.message}
    return Outcome(number=number, custom_id=custom_id, error=described)


def _choice(choice: Choice, *, is_chat: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"text": choice.text}
    if is_chat:
        content = {"message": {"role": "assistant", "content": choice.text}}
    reason = choice.finish_reason.value
    return {
        "index": choice.index,
        **content,
        "token_ids": choice.token_ids,
        "finish_reason": reason,
    }


def to_jsonl(outcomes: Sequence[Outcome]) -> bytes:
    """Return the lines of a part."""
    lines = (json.dumps(outcome.document(), ensure_ascii=False) for outcome in outcomes)
    return "".join(f"{line}\n" for line in lines).encode()


def to_columns(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """Return the columns of a part for a table: what most readers want, and the whole line."""
    columns: dict[str, list[Any]] = {}
    for outcome in outcomes:
        body = (outcome.response or {}).get("body", {})
        first = body.get("choices", [{}])[0]
        error = outcome.error or {}
        values = {
            "custom_id": outcome.custom_id,
            "row": outcome.number,
            "text": first.get("text", first.get("message", {}).get("content")),
            "finish_reason": first.get("finish_reason"),
            "prompt_tokens": outcome.prompt_tokens,
            "completion_tokens": outcome.completion_tokens,
            "error_code": error.get("code"),
            "error_reason": error.get("reason"),
            "error_message": error.get("message"),
            "response": json.dumps(outcome.response) if outcome.response else None,
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return columns
