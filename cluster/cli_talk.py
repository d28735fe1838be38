"""`expertmesh chat` and `complete`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cluster.cli_options import DEFAULT_URL, ApiKey, AsJson, TlsCa, TlsCert, TlsKey, Url, access_of
from cluster.console import errors_exit

Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy; unset: the checkpoint's default.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Tokens to generate at most.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def chat(
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = 512,
    seed: Seed = None,
) -> None:
    """Talk to the model. /clear forgets the conversation, /exit leaves."""
    from cluster.talk import Sampling, run_chat

    with errors_exit():
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        run_chat(url, access, system, Sampling(temperature, max_tokens, seed))


def complete(
    prompt: Annotated[str | None, typer.Argument(help="Text; - or nothing reads stdin.")] = None,
    url: Url = DEFAULT_URL,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    api_key: ApiKey = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = 128,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text; streams to stdout."""
    from cluster.talk import Sampling, run_complete

    with errors_exit():
        access = access_of(tls_ca, tls_cert, tls_key, api_key)
        text = sys.stdin.read() if prompt in (None, "-") else str(prompt)
        run_complete(url, access, text, Sampling(temperature, max_tokens, seed), as_json=as_json)
