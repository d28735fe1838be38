"""`expertmesh complete` and `chat`: a person or a pipe talks to the model, text as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import cast

from cluster.console import EXIT_OK, err_console, print_json
from protos.client import Client, ClientConfig, GenerateOptions, Prompt
from protos.errors import ConfigurationError
from protos.events import Completion, Delta
from protos.tls import Access

PATIENCE = ClientConfig(max_attempts=3)
"""A person waits a second for a service that is starting, not ten."""
HELP = "/clear forgets the conversation, /exit leaves, Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True)
class Sampling:
    """What the command line says about sampling; None: the service's default."""

    temperature: float | None
    max_tokens: int | None
    seed: int | None

    def options(self) -> GenerateOptions:
        """Return the fields that are set."""
        fields = {
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        return cast(GenerateOptions, {k: v for k, v in fields.items() if v is not None})


@dataclass(slots=True)
class Answer:
    """A streamed answer and its pace."""

    completion: Completion
    first_token_s: float = 0.0
    total_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens after the first per second."""
        decode_s = self.total_s - self.first_token_s
        return (len(self.completion.token_ids) - 1) / decode_s if decode_s > 0 else 0.0

    def pace(self) -> str:
        """Return the line under an answer."""
        return (
            f"{len(self.completion.token_ids)} tokens, first after"
            f" {self.first_token_s * 1e3:.0f} ms, then {self.tokens_per_s:.1f} tok/s"
        )


def stream_answer(
    client: Client, prompt: Prompt, options: GenerateOptions, answer: Answer
) -> Generator[str, None, None]:
    """Yield an answer's text as it comes, and keep tokens and times in `answer`.

    Raises:
        ExpertMeshError: What the service answered.
    """
    begin = time.perf_counter()
    for event in client.generate(prompt, **options):
        answer.completion.add(event)
        if isinstance(event, Delta):
            answer.first_token_s = answer.first_token_s or time.perf_counter() - begin
            if event.text:
                yield event.text
    answer.total_s = time.perf_counter() - begin


def run_complete(
    url: str, access: Access, prompt: str, sampling: Sampling, *, as_json: bool
) -> None:
    """Print the continuation of a text.

    Raises:
        ConfigurationError: An empty prompt.
        ExpertMeshError: What the service answered.
    """
    if not prompt:
        raise ConfigurationError("prompt", "must not be empty", prompt)
    with Client(url, PATIENCE, tls=access.tls, api_key=access.api_key) as client:
        answer = Answer(Completion())
        for text in stream_answer(client, prompt, sampling.options(), answer):
            if not as_json:
                print(text, end="", flush=True)
        if as_json:
            print_json(_document(answer))
        else:
            print()


def run_chat(url: str, access: Access, system: str | None, sampling: Sampling) -> None:
    """Hold a conversation on the terminal, or answer the lines of a pipe one by one.

    Raises:
        ExpertMeshError: What the service answered.
    """
    console = err_console()
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    with Client(url, PATIENCE, tls=access.tls, api_key=access.api_key) as client:
        model = client.list_models()[0].name
        if sys.stdin.isatty():
            console.print(f"{model}: {HELP}", style="dim", markup=False)
        while (line := _read_line()) is not None:
            if line == "/exit":
                return
            if line == "/clear":
                messages = list(opening)
                continue
            if line.startswith("/"):
                console.print(HELP, style="dim", markup=False)
                continue
            if not line:
                continue
            messages.append({"role": "user", "content": line})
            answer = _answer_turn(client, messages, sampling)
            messages.append({"role": "assistant", "content": answer.completion.text})
            console.print(answer.pace(), style="dim", markup=False)


def _answer_turn(client: Client, messages: list[dict[str, str]], sampling: Sampling) -> Answer:
    answer = Answer(Completion())
    stream = stream_answer(client, messages, sampling.options(), answer)
    try:
        for text in stream:
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()  # cancels the request
    print()
    return answer


def _read_line() -> str | None:
    """Return the next line, or None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        print()
        sys.exit(EXIT_OK)


def _document(answer: Answer) -> dict[str, object]:
    completion = answer.completion
    finished = completion.choices[0].finished if completion.choices else None
    return {
        "request_id": completion.request_id,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": str(finished.reason) if finished else None,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "seed": completion.seed,
        "time_to_first_token_s": round(answer.first_token_s, 6),
        "total_s": round(answer.total_s, 6),
        "tokens_per_s": round(answer.tokens_per_s, 3),
    }
