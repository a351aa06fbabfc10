"""Models, tokens, health and metrics."""

import asyncio
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm.frontend import core_life
from nanovllm.frontend.server import serving as serving_module
from nanovllm.protocol.messages import AddRequest, Hello, ToCore
from tests.frontend.attached import says
from tests.frontend.fake_core import INFO, STATUS, WELCOME
from tests.frontend.server.served import Served, error_of, listening, served
from tests.waiting import WAIT_S

BUSY = msgspec.structs.replace(
    STATUS,
    step=7,
    num_running=2,
    num_waiting=3,
    num_free_blocks=3,
    num_preemptions=4,
    num_prompt_tokens=50,
    num_generation_tokens=60,
    prefix_cache_queries=70,
    prefix_cache_hits=35,
)


async def metrics_of(server: Served) -> dict[str, float]:
    """Name → value of all samples with one set of labels."""
    text = (await server.client.get("/metrics")).text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


NAMED = msgspec.structs.replace(WELCOME, other_served_names=["alias"])


def named(message: ToCore) -> Any:
    return [NAMED] if isinstance(message, Hello) else says("x")(message)


async def test_every_served_name_is_listed_and_answers_give_the_first(address: str) -> None:
    async with served(address, named) as server:
        listed = (await server.client.get("/v1/models")).json()["data"]
        assert [one["id"] for one in listed] == ["fake", "alias"]
        assert listed[1] == {**listed[0], "id": "alias"}
        for name in ("fake", "alias"):
            assert (await server.client.get(f"/v1/models/{name}")).json()["id"] == name
            for answer in (await server.chat(model=name), await server.complete(model=name)):
                assert answer.json()["model"] == "fake"
            tokens = await server.post("/tokenize", model=name, prompt="a")
            assert tokens.status_code == 200
        error = error_of(await server.chat(model="other"))
        assert error["code"] == "model_not_found" and "'fake' and 'alias'" in error["message"]


DEFAULTS: dict[str, int | float] = {"temperature": 0.6, "top_k": 20, "max_tokens": 7}
WISHFUL = msgspec.structs.replace(
    WELCOME, worker=msgspec.structs.replace(INFO, sampling_defaults=DEFAULTS)
)


def wishful(message: ToCore) -> Any:
    return [WISHFUL] if isinstance(message, Hello) else says("x")(message)


async def test_the_model_s_own_defaults_hold_where_a_request_says_nothing(address: str) -> None:
    async with served(address, wishful) as server:
        (card,) = (await server.client.get("/v1/models")).json()["data"]
        assert card["default_sampling_params"] == DEFAULTS
        for index, answer in enumerate((server.chat, server.complete)):
            await answer()
            plain = server.core.wait_for(AddRequest, 2 * index + 1).params
            assert (plain.temperature, plain.top_k, plain.max_tokens) == (0.6, 20, 7)
            await answer(temperature=0.0, top_k=0, max_tokens=3)
            own = server.core.wait_for(AddRequest, 2 * index + 2).params
            assert (own.temperature, own.top_k, own.max_tokens) == (0.0, 0, 3)
        defaults = server.serving.llm.get_default_sampling_params()
        assert (defaults.temperature, defaults.top_k, defaults.max_tokens) == (0.6, 20, 7)


async def test_the_model_is_listed(address: str) -> None:
    async with served(address) as server:
        (card,) = (await server.client.get("/v1/models")).json()["data"]
        assert (card["id"], card["max_model_len"], card["object"]) == ("fake", 64, "model")
        assert (await server.client.get("/v1/models/fake")).json() == card
        assert (await server.client.get("/v1/models/no-such-model")).json() == card  # its root


async def test_tokenize_and_back(address: str) -> None:
    async with served(address) as server:
        body = {"prompt": "h<eos>", "return_token_strs": True}
        answer = (await server.post("/tokenize", **body)).json()
        assert answer == {
            "count": 2,
            "max_model_len": 64,
            "tokens": [104, 256],
            "token_strs": ["h", "<eos>"],
        }
        back = await server.post("/detokenize", tokens=answer["tokens"])
        assert back.json() == {"prompt": "h<eos>"}
        messages = [{"role": "user", "content": "x"}]
        answer = (await server.post("/tokenize", messages=messages)).json()
        assert bytes(answer["tokens"]) == b"user:x|"
        long = (await server.post("/tokenize", prompt="x" * 20_000)).json()
        assert long["count"] == 20_000


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [10**30]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
async def test_what_cannot_be_tokenized(
    address: str, path: str, body: dict[str, Any], param: str
) -> None:
    async with served(address) as server:
        response = await server.post(path, **body)
    assert response.status_code == 400 and error_of(response)["param"] == param


@pytest.mark.parametrize("tokens", [[0, 10**6], [0, -7, 10**6], [1, 10**6]])
async def test_the_odd_one_of_some_tokens_is_named(address: str, tokens: list[int]) -> None:
    async with served(address) as server:
        response = await server.post("/detokenize", tokens=tokens)
    assert f"{-7 if -7 in tokens else 10**6} is not in [0, " in error_of(response)["message"]


@pytest.mark.parametrize(
    ("tokens", "text"), [([], ""), ([0], "\0"), ([0, 104, 256], "\0h<eos>"), ([299, 104], "h")]
)
async def test_every_token_of_the_vocabulary_has_a_text(
    address: str, tokens: list[int], text: str
) -> None:
    """The first and the last too; the model's is larger than the tokenizer's."""
    async with served(address) as server:
        found = await server.post("/detokenize", tokens=tokens)
        beyond = await server.post("/detokenize", tokens=[*tokens, 300])
    assert found.json() == {"prompt": text} and beyond.status_code == 400


async def test_core_metrics_are_the_cores(address: str) -> None:
    async with served(address) as server:
        server.core.push(BUSY)
        async with asyncio.timeout(WAIT_S):
            while (await metrics_of(server)).get("nanovllm:engine_steps_total") != 7:
                await asyncio.sleep(0.02)
        found = await metrics_of(server)
    expected = {
        "num_requests_running": 2,
        "num_requests_waiting": 3,
        "num_preemptions_total": 4,
        "prompt_tokens_total": 50,
        "generation_tokens_total": 60,
        "prefix_cache_queries_total": 70,
        "prefix_cache_hits_total": 35,
        "kv_cache_usage_perc": pytest.approx(6 / 9),
    }
    for name, value in expected.items():
        assert found[f"nanovllm:{name}"] == value, name


@pytest.mark.parametrize("stream", [False, True])
async def test_request_metrics(address: str, stream: bool) -> None:
    async with served(address, says("a", "b", "c")) as server:
        await server.complete("hello", n=1, max_tokens=9, stream=stream)
        found = await metrics_of(server)
        text = (await server.client.get("/metrics")).text
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_time_per_output_token_seconds",
        "request_params_n",
        "request_params_max_tokens",
    ):
        assert found[f"nanovllm:{name}_count"] == 1, name
    assert found["nanovllm:request_prompt_tokens_sum"] == 5
    assert found["nanovllm:request_generation_tokens_sum"] == 3
    labels = 'engine="0",finished_reason="length",model_name="fake"'
    assert f"nanovllm:request_success_total{{{labels}}} 1.0" in text
    assert 'method="POST",path="/v1/completions",status="200"} 1.0' in text


async def test_paths_nobody_serves_are_counted_as_one(address: str) -> None:
    async with served(address) as server:
        for number in range(3):
            await server.client.get(f"/random/{number}")
        text = (await server.client.get("/metrics")).text
    assert 'path="other",status="404"} 3.0' in text


async def test_health_wants_fresh_progress(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(address) as server:
        server.core.push(STATUS)
        assert (await server.client.get("/health")).status_code == 200
        assert (await server.client.get("/ready")).status_code == 200
        monkeypatch.setattr(serving_module, "STALLED_AFTER_S", 0.0)  # any silence is too long
        response = await server.client.get("/health")
        assert response.status_code == 200, "not while the core is within the time it has asked for"
        monkeypatch.setattr(core_life, "STALL_S", 0.0)
        async with asyncio.timeout(WAIT_S):
            while (response := await server.client.get("/health")).status_code == 200:
                await asyncio.sleep(0.02)
        assert response.status_code == 503 and response.json()["status"] == "stalled"
        assert (await server.client.get("/ready")).status_code == 503
        monkeypatch.setattr(serving_module, "STALLED_AFTER_S", 0.5)
        async with asyncio.timeout(WAIT_S):
            while (await server.client.get("/health")).status_code != 200:
                server.core.push(msgspec.structs.replace(STATUS))
                await asyncio.sleep(0.05)


async def test_probes_may_ask_for_the_headers_alone(address: str) -> None:
    paths = ("/health", "/ready", "/v1/models", "/v1/models/fake", "/version", "/metrics")
    async with listening(address) as (url, _, _s), httpx.AsyncClient(timeout=WAIT_S) as client:
        for path in paths:
            whole, head = await client.get(url + path), await client.head(url + path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-type"] == whole.headers["content-type"]
        assert (await client.head(f"{url}/v1/models/nope")).status_code == 404
        assert (await client.head(f"{url}/v1/chat/completions")).status_code == 405
