"""`GenerationService` over real gRPC and a real engine, with a model that recites."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import events
from protos.client import AsyncClient, Client, build_request
from protos.errors import (
    CheckpointError,
    ConfigurationError,
    ContextLengthExceededError,
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestError,
    EngineStoppedError,
    ExpertMeshError,
    InvalidFieldError,
    QueueFullError,
    RequestCancelledError,
    SlowReaderError,
    UnknownModelError,
    UnsupportedFeatureError,
    from_rpc_error,
)
from protos.events import Accepted, Delta, Finished, FinishReason, Prefill
from protos.v1 import generation_pb2, generation_pb2_grpc
from router.engine.request import EngineRequest
from router.gateway.defaults import SamplingDefaults
from router.gateway.text import TextProcessor
from tests.eventually import eventually
from tests.unit.router.gateway_service import (
    EOS,
    MAX_MODEL_LEN,
    PROMPT,
    PROMPT_IDS,
    TEXT,
    GatewayService,
    ScriptModel,
    running,
)

STORY = "Upon a time, 😀 lived.\nUser: no"


@pytest.fixture(scope="module")
def service() -> Iterator[GatewayService]:
    with running(ScriptModel(STORY)) as running_service:
        yield running_service


@pytest.fixture
def client(service: GatewayService) -> Client:
    return service.client


def test_a_stream_tells_its_story_in_order(service: GatewayService) -> None:
    request, _ = build_request(PROMPT, {"max_tokens": 20, "request_id": "r-1", "seed": 7})
    messages = list(service.client.messages(request))
    assert [m.sequence for m in messages] == list(range(1, len(messages) + 1))
    accepted = messages[0].accepted
    assert (accepted.request_id, accepted.prompt_tokens, accepted.seed) == ("r-1", 4, 7)
    assert messages[1].prefill.tokens_done == messages[1].prefill.tokens_total == 4
    assert messages[1].token_ids
    ids = [token_id for m in messages for token_id in m.token_ids]
    assert len(ids) == 20
    assert "".join(m.text_delta for m in messages) == TEXT.decode(ids) == STORY[:17]
    last = messages[-1]
    assert last.finished.reason == generation_pb2.FINISH_REASON_LENGTH
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (4, 20)
    first_token_s = last.timing.time_to_first_token.ToNanoseconds() / 1e9
    assert 0 < first_token_s < 5
    eventually(service.is_idle)


def test_no_message_ends_inside_a_character(client: Client) -> None:
    deltas = [e.text for e in client.generate(PROMPT, max_tokens=17) if isinstance(e, Delta)]
    assert "".join(deltas) == STORY[:13] + "😀"
    assert not any("\ufffd" in delta for delta in deltas)
    # Cut inside the character: the end of the stream says so.
    assert client.complete(PROMPT, max_tokens=15).text == STORY[:13] + "\ufffd"


@pytest.mark.parametrize(
    ("include", "text"),
    [(False, "Upon a time, 😀 lived."), (True, "Upon a time, 😀 lived.\nUser:")],
)
def test_a_stop_string_ends_the_text(client: Client, include: bool, text: str) -> None:
    answer = client.complete(PROMPT, stop=["\nUser:", "zzz"], include_stop=include, max_tokens=99)
    assert answer.text == text
    finished = answer.choices[0].finished
    assert finished is not None
    assert (finished.reason, finished.stop_string) == (FinishReason.STOP, "\nUser:")
    assert finished.stop_token_id is None
    assert TEXT.decode(answer.token_ids) == "Upon a time, 😀 lived.\nUser:"
    assert finished.usage.completion_tokens == len(answer.token_ids)


def test_a_stop_token_ends_the_text_before_it(client: Client) -> None:
    comma = TEXT.encode(",")[0]
    answer = client.complete(PROMPT, stop_token_ids=[comma])
    assert (answer.text, answer.token_ids[-1]) == ("Upon a time", comma)
    assert answer.choices[0].finished is not None
    assert answer.choices[0].finished.stop_token_id == comma
    assert client.complete(PROMPT, stop_token_ids=[comma], include_stop=True).text == "Upon a time,"


def test_end_of_sequence_is_no_text() -> None:
    script = [*TEXT.encode("ok"), EOS]
    with running(ScriptModel(script)) as service:
        for skip in (True, False):
            answer = service.client.complete(PROMPT, skip_special_tokens=skip)
            assert (answer.text, answer.token_ids[-1]) == ("ok", EOS)
            assert answer.choices[0].finish_reason is FinishReason.STOP
        longer = service.client.complete(
            PROMPT, ignore_eos=True, max_tokens=5, skip_special_tokens=False
        )
        assert longer.text == "ok<|im_end|>ok"


def test_n_sequences_come_apart_by_index(client: Client) -> None:
    answer = client.complete(PROMPT, n=3, max_tokens=5)
    assert [choice.text for choice in answer.choices] == ["Upon "] * 3
    assert all(choice.finish_reason is FinishReason.LENGTH for choice in answer.choices)


def test_logprobs_of_tokens_and_prompt(client: Client) -> None:
    answer = client.complete(PROMPT, max_tokens=3, top_logprobs=2, prompt_logprobs=0)
    parts = answer.choices[0].logprobs
    assert [t for part in parts for t in part.token_ids] == answer.token_ids
    assert all(len(ids) == 2 for part in parts for ids, _ in part.top)
    assert all(-0.01 < value <= 0 for part in parts for value in part.logprobs)
    assert answer.prompt_logprobs is not None
    assert list(answer.prompt_logprobs.token_ids) == PROMPT_IDS[1:]


def test_without_token_ids_only_text_comes(client: Client) -> None:
    request, _ = build_request(PROMPT, {"max_tokens": 17, "return_token_ids": False})
    messages = list(client.messages(request))
    assert not any(m.token_ids for m in messages)
    assert "".join(m.text_delta for m in messages) == STORY[:13] + "😀"
    assert messages[-1].usage.completion_tokens == 17


def test_text_tokens_and_chat_are_one_prompt(client: Client) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rendered = TEXT.render_chat(chat)
    assert client.tokenize(PROMPT) == PROMPT_IDS
    assert client.tokenize(chat) == TEXT.encode(rendered)
    assert client.detokenize(client.tokenize(chat), skip_special_tokens=False) == rendered
    assert client.detokenize(client.tokenize(chat)) == "user\nhi\nassistant\n"
    counts = [
        client.complete(prompt, max_tokens=1).prompt_tokens
        for prompt in (chat, rendered, TEXT.encode(rendered))
    ]
    assert counts == [len(TEXT.encode(rendered))] * 3
    assert (
        client.chat(chat, max_tokens=1, template_kwargs={"think": False}).prompt_tokens > counts[0]
    )


def test_a_prompt_large_enough_for_a_thread(client: Client) -> None:
    ids = [PROMPT_IDS[0]] * 8000
    answer = client.complete(ids, max_tokens=2, request_id="x" * 128)
    assert answer.prompt_tokens == 8000
    text = "word " * 5000
    assert client.detokenize(client.tokenize(text)) == text


def test_the_served_model(client: Client) -> None:
    [model] = client.list_models()
    assert (model.name, model.vocab_size, model.max_model_len) == ("script", 260, MAX_MODEL_LEN)


def test_unset_fields_take_the_checkpoints_values(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": 1})
    )
    defaults = SamplingDefaults.from_checkpoint(tmp_path)
    with running(ScriptModel(STORY), defaults=defaults) as service:
        seen: list[EngineRequest] = []
        submit = service.engine.submit
        monkeypatch.setattr(
            service.engine,
            "submit",
            lambda request, sink: seen.append(request) or submit(request, sink),
        )
        service.client.complete(PROMPT, max_tokens=1)
        service.client.complete(PROMPT, max_tokens=1, temperature=0, top_k=0, top_p=0.5, seed=3)
    sampling = [request.sampling for request in seen]
    assert [(s.temperature, s.top_k, s.top_p) for s in sampling] == [(0.6, 20, 1.0), (0, 0, 0.5)]
    assert sampling[1].seed == 3
    assert 0 <= sampling[0].seed < 2**64


def test_seeds_are_drawn(client: Client) -> None:
    assert len({client.complete(PROMPT, max_tokens=1).seed for _ in range(3)}) == 3


def test_a_checkpoint_that_does_not_sample_is_greedy(tmp_path: Path) -> None:
    assert SamplingDefaults.from_checkpoint(tmp_path) == SamplingDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": false, "temperature": 0.6}')
    assert SamplingDefaults.from_checkpoint(tmp_path).temperature == 0.0


@pytest.mark.parametrize(
    ("content", "cls", "message"),
    [
        ("{", CheckpointError, "no JSON"),
        ("[]", CheckpointError, "must be a JSON object"),
        ('{"top_k": "many"}', CheckpointError, "top_k|int"),
        (
            '{"top_p": 1.5}',
            ConfigurationError,
            r"generation_config\.top_p must be in \(0, 1\], got 1\.5",
        ),
    ],
)
def test_a_bad_generation_config_is_named(
    tmp_path: Path, content: str, cls: type[ExpertMeshError], message: str
) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(cls, match=message):
        SamplingDefaults.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "options", "cls", "message"),
    [
        (
            PROMPT,
            {"max_tokens": MAX_MODEL_LEN},
            ContextLengthExceededError,
            "prompt of 4 tokens and max_tokens 8192 exceed the context window of 8192 tokens",
        ),
        (
            [1] * MAX_MODEL_LEN,
            {},
            ContextLengthExceededError,
            "prompt of 8192 tokens and max_tokens 1 exceed",
        ),
        (
            [1] * 5,
            {"model": "gpt"},
            UnknownModelError,
            "model 'gpt' is not served; served: 'script'",
        ),
        ([], {}, InvalidFieldError, r"tokens\.ids must not be empty, got 0"),
        ("", {}, InvalidFieldError, "text must not be empty"),
        ([1, 260], {}, InvalidFieldError, r"tokens\.ids\[1\] must be in \[0, 260\), got 260"),
        (
            PROMPT,
            {"temperature": -1.0, "n": 0},
            InvalidFieldError,
            r"sampling\.temperature must be 0 or more, got -1\.0; sampling\.n must be in",
        ),
        (PROMPT, {"top_p": float("nan")}, InvalidFieldError, r"sampling\.top_p .* got NaN"),
        (
            PROMPT,
            {"top_logprobs": 21},
            InvalidFieldError,
            r"output\.top_logprobs must be at most 20",
        ),
        (PROMPT, {"stop": ["x"] * 17}, InvalidFieldError, r"stopping\.stop must have at most 16"),
        (
            PROMPT,
            {"logit_bias": {260: 1.0}},
            InvalidFieldError,
            r"sampling\.logit_bias\[260\] must have token ids in \[0, 260\)",
        ),
        ([{"role": "x", "content": ""}], {}, InvalidFieldError, r"chat\.messages\[0\]\.role"),
        (
            [{"role": "user", "content": "a"}],
            {"template_kwargs": {"messages": 1}},
            InvalidFieldError,
            r"chat\.template_kwargs_json must not replace",
        ),
    ],
)
def test_a_bad_request_raises_its_class_at_the_client(
    client: Client,
    service: GatewayService,
    prompt: Any,
    options: Any,
    cls: type[ExpertMeshError],
    message: str,
) -> None:
    with pytest.raises(cls, match=message):
        client.complete(prompt, **options)
    assert service.is_idle()


def test_a_router_without_a_session_store_says_so(client: Client) -> None:
    request = generation_pb2.GenerateRequest(text=PROMPT, session_id="s")
    with pytest.raises(UnsupportedFeatureError, match="no session store"):
        list(client.messages(request))


def test_a_checkpoint_without_tokeniser_serves_ids() -> None:
    with running(ScriptModel(STORY), text=TextProcessor(None)) as service:
        answer = service.client.complete(PROMPT_IDS, max_tokens=3)
        assert (answer.token_ids, answer.text) == (TEXT.encode(STORY)[:3], "")
        for prompt, options in ((PROMPT, {}), (PROMPT_IDS, {"stop": ["x"]})):
            with pytest.raises(UnsupportedFeatureError, match=r"no tokenizer\.json"):
                service.client.complete(prompt, **options)  # type: ignore[arg-type]
        with pytest.raises(UnsupportedFeatureError, match="no chat template"):
            service.client.chat([{"role": "user", "content": "a"}])


def test_prefill_progress_of_a_long_prompt() -> None:
    with running(ScriptModel(STORY), max_num_seqs=8, max_prompt_tokens=100) as service:
        steps = [
            e for e in service.client.generate([1] * 250, max_tokens=1) if isinstance(e, Prefill)
        ]
    assert steps[-1].tokens_done == steps[-1].tokens_total == 250
    assert [s.tokens_done for s in steps] == sorted({s.tokens_done for s in steps})


@pytest.fixture
def held() -> Iterator[GatewayService]:
    """A service whose model waits after the first two steps of a request."""
    model = ScriptModel(STORY)
    steps = iter(range(10**9))

    def hold(batch: Any) -> None:
        if next(steps) == 2:
            model.runs.clear()

    model.before_forward = hold
    with running(model, max_num_seqs=2, max_queued=1) as service:
        yield service


def test_a_client_that_goes_away_frees_everything(held: GatewayService) -> None:
    stream = held.client.generate(PROMPT)
    assert isinstance(next(stream), Accepted)
    eventually(lambda: not held.model.runs.is_set())
    assert not held.is_idle()
    stream.close()  # type: ignore[attr-defined]
    held.model.runs.set()
    eventually(held.is_idle)


def test_a_deadline_frees_everything(held: GatewayService) -> None:
    with pytest.raises(DeadlineExceededError):
        held.client.complete(PROMPT, timeout_s=1.0)
    eventually(lambda: not held.model.runs.is_set())
    held.model.runs.set()
    eventually(held.is_idle)


def test_cancel_requests_ends_streams_with_a_reason(held: GatewayService) -> None:
    found: list[events.Completion] = []
    thread = threading.Thread(
        target=lambda: found.append(held.client.complete(PROMPT, request_id="long"))
    )
    thread.start()
    eventually(lambda: not held.model.runs.is_set())
    assert held.client.cancel("long", "unknown") == ["long"]
    held.model.runs.set()
    thread.join(10)
    assert found[0].choices[0].finish_reason is FinishReason.CANCELLED
    assert held.client.cancel("long") == []
    eventually(held.is_idle)


def test_a_live_id_is_taken_once(held: GatewayService) -> None:
    stream = held.client.generate(PROMPT, request_id="twice")
    next(stream)
    with pytest.raises(DuplicateRequestError, match="request 'twice' is already queued or running"):
        held.client.complete(PROMPT, request_id="twice")
    # The refused one must not have cancelled the one that runs.
    eventually(lambda: not held.model.runs.is_set())
    held.model.runs.set()
    assert isinstance(next(stream), Prefill)
    stream.close()  # type: ignore[attr-defined]
    eventually(held.is_idle)
    assert held.client.complete(PROMPT, request_id="twice", max_tokens=1).text == "U"


def test_a_full_queue_says_when_to_come_back(held: GatewayService) -> None:
    streams = [held.client.generate(PROMPT) for _ in range(3)]
    for stream in streams:
        next(stream)
    with pytest.raises(QueueFullError) as caught:
        held.client.complete(PROMPT)
    assert caught.value.fields["limit"] == 1
    assert (caught.value.retry_after_s or 0) > 0
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]


def test_an_engine_that_stops_ends_its_streams(held: GatewayService) -> None:
    stream = held.client.generate(PROMPT)
    next(stream)
    eventually(lambda: not held.model.runs.is_set())
    stopper = threading.Thread(target=held.engine.stop, kwargs={"drain": False})
    stopper.start()
    held.model.runs.set()
    with pytest.raises(EngineStoppedError):
        list(stream)
    stopper.join(10)


def test_a_draining_engine_takes_nothing_new_and_ends_what_runs(held: GatewayService) -> None:
    stream = held.client.generate(PROMPT, max_tokens=5)
    next(stream)
    eventually(lambda: not held.model.runs.is_set())
    held.engine.drain()
    with pytest.raises(DrainingError):
        held.client.complete(PROMPT)
    held.model.runs.set()
    assert "".join(e.text for e in stream if isinstance(e, Delta)) == STORY[:5]


def test_a_client_that_does_not_read_is_bounded() -> None:
    """The engine goes on while the client sleeps: far more tokens than the bound."""
    with running(ScriptModel(STORY), max_pending_tokens=64) as service:
        with grpc.insecure_channel(service.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request, _ = build_request(PROMPT, {"max_tokens": 8000, "top_logprobs": 20})
            call = stub.Generate(request, timeout=60)
            first = next(iter(call))
            assert first.HasField("accepted")
            eventually(service.is_idle, timeout_s=30)
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
        error = from_rpc_error(caught.value)
        assert isinstance(error, SlowReaderError)
        assert error.fields["limit"] == 64


async def test_256_streams_at_once(service: GatewayService) -> None:
    async with AsyncClient(service.address) as client:

        async def one(number: int) -> str:
            answer = await client.complete(PROMPT, max_tokens=10 + number % 7)
            return answer.text

        texts = await asyncio.gather(*(one(i) for i in range(256)))
    assert texts == [STORY[: 10 + i % 7] if 10 + i % 7 <= 13 else texts[i] for i in range(256)]
    assert {len(text) for text in texts} >= {10, 11, 12, 13}
    eventually(service.is_idle)


async def test_the_async_client_has_the_same_calls(service: GatewayService) -> None:
    chat = [{"role": "user", "content": "hi"}]
    async with AsyncClient(service.address) as client:
        assert await client.tokenize(PROMPT) == PROMPT_IDS
        assert await client.detokenize(PROMPT_IDS) == PROMPT
        assert [m.name for m in await client.list_models()] == ["script"]
        assert await client.cancel("nobody") == []
        assert (await client.chat(chat, max_tokens=1)).prompt_tokens > 4
        with pytest.raises(InvalidFieldError):
            await client.complete(PROMPT, n=0)
        with pytest.raises(UnsupportedFeatureError):
            await client.status()
        async with aclosing(client.generate(PROMPT, max_tokens=4000)) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    break
    eventually(service.is_idle)


async def test_an_async_task_that_is_cancelled_frees_everything(held: GatewayService) -> None:
    async with AsyncClient(held.address) as client:
        task = asyncio.ensure_future(client.complete(PROMPT))
        await asyncio.to_thread(eventually, lambda: not held.model.runs.is_set())
        task.cancel()
        with pytest.raises((asyncio.CancelledError, RequestCancelledError)):
            await task
        held.model.runs.set()
        await asyncio.to_thread(eventually, held.is_idle)


def test_events_of_a_stream(client: Client) -> None:
    kinds = [type(event) for event in client.generate(PROMPT, max_tokens=2)]
    assert kinds[:3] == [Accepted, Prefill, Delta]
    assert kinds[-1] is Finished


def test_an_option_that_is_none(client: Client) -> None:
    with pytest.raises(TypeError, match="generate\\(\\) has no option 'temprature'"):
        client.complete(PROMPT, temprature=0)  # type: ignore[call-arg]
