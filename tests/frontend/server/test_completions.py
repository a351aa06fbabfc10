"""Plain completions against a scripted core: prompts, batches, echo, log-probabilities."""

import asyncio
import json
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from nanovllm.frontend.outputs import Logprob, RequestMetrics, RequestOutput
from nanovllm.frontend.server.logprobs import (
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    prompt_entries,
)
from nanovllm.frontend.tokenizer import Tokenizer
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    Finished,
    Outputs,
    PromptLogprobs,
    RequestFailed,
    ToCore,
)
from nanovllm.protocol.plan import PositionLogprobs, TokenLogprobs
from tests.frontend.attached import says
from tests.frontend.fake_core import begin, silent
from tests.frontend.server.served import error_of, events, listening, roomy, served
from tests.frontend.vocabulary import BOS, byte_tokenizer, sentencepiece_tokenizer
from tests.waiting import WAIT_S


def texts_of(response: Any, num_choices: int) -> list[str]:
    texts = [""] * num_choices
    for event in events(response):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


@pytest.mark.parametrize("stream", [False, True])
async def test_one_prompt(address: str, stream: bool) -> None:
    async with served(address, says("wor", "ld")) as server:
        response = await server.complete("hello", stream=stream)
        assert server.core.wait_for(AddRequest).params.max_tokens == 16
    if stream:
        assert texts_of(response, 1) == ["world"]
        assert events(response)[-1]["choices"][0]["finish_reason"] == "length"
    else:
        answer = response.json()
        assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
        assert answer["choices"][0]["text"] == "world"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        ([97, 98], ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ([[97, 98], [99]], ["ab", "c"]),
        ([[97], "xyz"], ["a", "xyz"]),
    ],
)
async def test_batches(address: str, stream: bool, prompt: Any, texts: list[str]) -> None:
    async with served(address) as server:  # it echoes
        response = await server.complete(prompt, n=2, stream=stream)
    expected = [text for text in texts for _ in range(2)]
    if stream:
        assert texts_of(response, len(expected)) == expected
    else:
        answer = response.json()
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert [choice["text"] for choice in answer["choices"]] == expected
        num_tokens = sum(map(len, texts))
        assert answer["usage"]["prompt_tokens"] == num_tokens
        assert answer["usage"]["completion_tokens"] == 2 * num_tokens


async def test_usage_of_a_streamed_batch(address: str) -> None:
    async with served(address) as server:
        options = {"include_usage": True}
        response = await server.complete(["abc", "d"], stream=True, stream_options=options)
    usage = events(response)[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 4)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4  # 2 of each, says `echo`


def scored(message: ToCore) -> Any:
    """Log-probabilities for prompt and output, if they were asked for."""
    if not isinstance(message, AddRequest):
        return silent(message)
    number, prompt = message.number, message.prompt_token_ids
    of_prompt = PositionLogprobs.of([TokenLogprobs(i, -1.0, 1, [i], [-1.0]) for i in prompt[1:]])
    asked = message.params.prompt_logprobs is not None
    return [
        Outputs(
            [number],
            [65],
            {0: TokenLogprobs(65, -0.5, 2, [66], [-0.25])},
            prompt_logprobs=[PromptLogprobs(number, of_prompt)] if asked else [],
            finished=[Finished(number, "length", None, 0)],
        )
    ]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hey", [104, 101, 121]])
async def test_echo_with_logprobs(address: str, stream: bool, prompt: Any) -> None:
    async with served(address, scored) as server:
        response = await server.complete(prompt, echo=True, logprobs=1, stream=stream)
    answer = events(response)[0] if stream else response.json()
    (choice,) = answer["choices"]
    assert choice["text"] == "heyA"
    assert choice["logprobs"] == {
        "text_offset": [0, 1, 2, 3],
        "token_logprobs": [None, -1.0, -1.0, -0.5],
        "tokens": ["h", "e", "y", "A"],
        "top_logprobs": [None, {"e": -1.0}, {"y": -1.0}, {"A": -0.5, "B": -0.25}],
    }


async def test_a_prompt_is_scored_and_nothing_generated(address: str) -> None:
    async with served(address, scored) as server:
        answer = (await server.complete("hey", echo=True, logprobs=0, max_tokens=0)).json()
        refusal = error_of(await server.complete("hey", max_tokens=0))
    assert answer["choices"][0]["text"] == "hey"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["h", "e", "y"]
    assert answer["usage"]["completion_tokens"] == 0
    assert refusal["param"] == "max_tokens"


async def test_prompt_logprobs_and_tokens_as_ids(address: str) -> None:
    async with served(address, scored) as server:
        answer = (
            await server.complete(
                "hey", prompt_logprobs=0, logprobs=0, return_tokens_as_token_ids=True
            )
        ).json()
        error = error_of(await server.complete("hey", prompt_logprobs=0, stream=True))
    choice = answer["choices"][0]
    expected = {"101": {"logprob": -1.0, "rank": 1, "decoded_token": "e"}}
    assert choice["prompt_logprobs"][:2] == [None, expected]
    assert choice["logprobs"]["tokens"] == ["token_id:65"]
    assert error["param"] == "prompt_logprobs"


async def test_truncated_prompts_keep_their_end(address: str) -> None:
    async with served(address) as server:
        answer = (await server.complete("abcdef", truncate_prompt_tokens=2, echo=True)).json()
    assert answer["choices"][0]["text"] == "efef"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "empty"),
        ([], "empty"),
        ([[]], "empty"),
        ([1, "a"], "mixes"),
        (["a"] * 3000, "at most"),
        ([10**6], "vocabulary"),
        ([-1], "vocabulary"),
        ("x" * 100, "max_model_len"),
        ([1.5], "Expected"),
        (None, "Expected"),
    ],
)
async def test_prompts_that_cannot_be(address: str, prompt: Any, words: str) -> None:
    async with served(address) as server:
        response = await server.complete(prompt)
        assert response.status_code == 400
        assert words in error_of(response)["message"]
        assert not server.core.all_of(AddRequest)


async def test_one_failure_ends_the_batch(address: str) -> None:
    def fails_second(message: ToCore) -> Any:
        if isinstance(message, AddRequest) and message.prompt_token_ids == [98]:
            return [RequestFailed(message.number, "no luck")]
        return silent(message)  # the first prompt is never answered

    async with served(address, fails_second) as server:
        for stream in (False, True):
            response = await server.complete(["a", "b"], stream=stream)
            assert response.status_code == 500
            assert "no luck" in error_of(response)["message"]
        assert server.serving.num_requests == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_one_bad_prompt_does_not_fail_the_others(address: str, stream: bool) -> None:
    prompts = ["ab", "x" * 100, "", "cd"]
    async with served(address) as server:
        response = await server.complete(prompts, n=2, stream=stream)
        alone = await server.complete(prompts[1], stream=stream)
        all_bad = await server.complete(["", "x" * 100], stream=stream)
    choices = response.json()["choices"] if not stream else [
        choice for chunk in events(response) for choice in chunk["choices"]
    ]  # fmt: skip
    texts: dict[int, str] = {}
    reasons: dict[int, list[Any]] = {}
    for choice in choices:
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        reasons.setdefault(choice["index"], []).append(choice["finish_reason"])
    assert texts == {0: "ab", 1: "ab", 2: "", 3: "", 4: "", 5: "", 6: "cd", 7: "cd"}
    assert {i: [r for r in all_ if r] for i, all_ in reasons.items()} == {
        i: ["error" if i in (2, 3, 4, 5) else "length"] for i in range(8)
    }
    if not stream:
        assert [choice["index"] for choice in choices] == list(range(8))
    errors = {choice["index"]: choice["error"] for choice in choices if "error" in choice}
    assert errors.keys() == {2, 3, 4, 5}
    assert errors[2]["code"] == "context_length_exceeded" and errors[4]["param"] == "prompt"
    assert alone.status_code == 400 and error_of(alone)["code"] == "context_length_exceeded"
    assert all_bad.status_code == 400 and "empty" in error_of(all_bad)["message"]


SPLIT = "é😀中 x".encode()  # a token per byte
OFFSETS = [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 4]


def logged(message: ToCore) -> Any:
    """`SPLIT` with log-probabilities, two tokens at a time, also of the prompt."""
    if not isinstance(message, AddRequest):
        return silent(message)
    number, asked = message.number, message.params.prompt_logprobs
    prompt = message.prompt_token_ids
    entries = PositionLogprobs.of([TokenLogprobs(i, -1.0, 1, [], []) for i in prompt[1:]])
    found: list[Any] = [Outputs(prompt_logprobs=[PromptLogprobs(number, entries)])] * (asked == 0)
    for start in range(0, len(SPLIT), 2):
        ids = list(SPLIT[start : start + 2])
        lps = {i: TokenLogprobs(token_id, -1.0, 1, [], []) for i, token_id in enumerate(ids)}
        found.append(Outputs([number] * len(ids), ids, lps))
    return [*found, Outputs(finished=[Finished(number, "length", None, 0)])]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "text", "offsets"),
    [
        ({}, SPLIT.decode(), OFFSETS),
        ({"stop": ["中 xyz"]}, SPLIT.decode(), OFFSETS),
        ({"stop": ["中 "], "include_stop_str_in_output": True}, "é😀中 ", OFFSETS[:-1]),
        ({"stop": ["中 "]}, "é😀", [*OFFSETS[:6], 2, 2, 2, 2]),
        ({"echo": True}, "é!" + SPLIT.decode(), [0, 0, 1, *(2 + i for i in OFFSETS)]),
    ],
)
async def test_text_offsets_are_where_tokens_begin(
    address: str, stream: bool, body: dict[str, Any], text: str, offsets: list[int]
) -> None:
    async with served(address, logged) as server:
        response = await server.complete("é!", logprobs=0, stream=stream, **body)
    choices = [chunk["choices"][0] for chunk in events(response)] if stream else [
        response.json()["choices"][0]
    ]  # fmt: skip
    assert "".join(choice["text"] for choice in choices) == text
    found = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [offset for one in found for offset in one["text_offset"]] == offsets
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        assert sum(len(one[key]) for one in found) == len(offsets)
    end = 0
    for choice in choices:  # nor does an event speak of text that has not come
        end += len(choice["text"])
        assert all(offset <= end for offset in (choice["logprobs"] or {}).get("text_offset", []))


@pytest.mark.parametrize("stream", [False, True])
async def test_text_offsets_of_sentencepiece_begin_behind_the_prompt(
    address: str, stream: bool
) -> None:
    """Where a completion's first space counts, as it stands behind words."""
    tokenizer = sentencepiece_tokenizer()
    ids = [4, 5, 2, 3]  # ▁wor ld ▁he llo

    def answer(message: ToCore) -> Any:
        if not isinstance(message, AddRequest):
            return silent(message)
        lps = {i: TokenLogprobs(token_id, -1.0, 1, [], []) for i, token_id in enumerate(ids)}
        end = Finished(message.number, "length", None, 0)
        return [Outputs([message.number] * len(ids), ids, lps, finished=[end])]

    async with served(address, roomy(answer), tokenizer=tokenizer) as server:
        response = await server.complete([2, 3], logprobs=0, stream=stream)
    choices = [chunk["choices"][0] for chunk in events(response)] if stream else [
        response.json()["choices"][0]
    ]  # fmt: skip
    assert "".join(choice["text"] for choice in choices) == " world hello"
    found = [one for choice in choices for one in (choice["logprobs"] or {}).get("text_offset", [])]
    assert found == [0, 4, 6, 9]


async def test_negative_max_tokens_are_refused(address: str) -> None:
    async with served(address) as server:
        for body in ({}, {"echo": True}):
            error = error_of(await server.complete("Hi", max_tokens=-1, **body))
            assert error["param"] == "max_tokens"


async def test_more_tokens_than_fit_are_cut_to_what_fits(address: str) -> None:
    async with served(address) as server:
        for ask in (server.complete, server.chat):
            assert (await ask("Hi", max_tokens=10_000)).status_code == 200  # type: ignore[operator]


@pytest.mark.parametrize("stream", [False, True])
async def test_when_one_of_a_batch_fails_the_core_ends_the_others(
    address: str, stream: bool
) -> None:
    def fail_the_second(message: ToCore) -> Any:
        if not isinstance(message, AddRequest):
            return silent(message)
        if message.prompt_token_ids == [98]:
            return [RequestFailed(message.number, "no luck")]
        return [Outputs([message.number], [65])]

    async with served(address, fail_the_second) as server:
        response = await server.complete(["a", "b", "c"], stream=stream)
        assert stream or response.status_code == 500
        begun = server.core.all_of(AddRequest)
        others = {one.number for one in begun if one.prompt_token_ids != [98]}
        async with asyncio.timeout(WAIT_S):
            while not others <= {n for one in server.core.all_of(Abort) for n in one.numbers}:
                await asyncio.sleep(0.01)


async def test_only_the_first_event_of_a_choice_holds_the_prompts_ids(address: str) -> None:
    body = {"prompt": "hi", "stream": True, "return_token_ids": True}
    async with (
        listening(address, begin) as (url, core, _),
        httpx.AsyncClient(timeout=WAIT_S) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        lines = (line async for line in response.aiter_lines() if line.startswith("data: {"))
        chunks = [json.loads((await anext(lines))[6:])]
        number = core.wait_for(AddRequest).number
        for _ in range(3):  # each when the one before has come, or they might come as one
            core.push(Outputs([number], [66]))
            chunks.append(json.loads((await anext(lines))[6:]))
        core.push(Outputs(finished=[Finished(number, "length", None, 0)]))
        chunks += [json.loads(line[6:]) async for line in lines]
    found = [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks]
    assert len(found) > 4 and found == [list(b"hi"), *[None] * (len(found) - 1)]


async def test_limits_are_the_last_that_is_allowed(address: str) -> None:
    """Of the model's 64 tokens one has to be left; 2,048 prompts are as many as there may be."""
    async with served(address, says("x")) as server:
        for length, status in ((63, 200), (64, 400), (65, 400)):
            assert (await server.complete([1] * length)).status_code == status
        before = len(server.core.all_of(AddRequest))
        response = await server.complete([[1]] * 2048)
        assert response.status_code == 200 and len(response.json()["choices"]) == 2048
        assert len(server.core.all_of(AddRequest)) == before + 2048


def test_bytes_of_a_token_are_its_own_or_those_of_its_text() -> None:
    """A vocabulary of pieces does not tell which bytes a token adds."""
    half = Logprob(-1.0, 1, "\ufffd")
    assert TokenNames(byte_tokenizer(), False).byte_values(0xC3, half) == [0xC3]
    for tokenizer in (Tokenizer(FastTokenizer(models.WordLevel({"é": 7}, "é"))), None):
        names = TokenNames(tokenizer, False)
        assert names.byte_values(7, Logprob(-1.0, 1, "é")) == [0xC3, 0xA9]
        assert names.byte_values(7, Logprob(-1.0, 1, None)) is None


def test_tokens_wait_for_the_text_that_they_begin_in() -> None:
    """A stop string may yet cut it off: at the last nothing lies beyond the text's end."""
    names = TokenNames(byte_tokenizer(), False)
    offsets = names.text_offsets(3, [], skip_special_tokens=True)
    new = offsets.entries(list(b"abcd"), [{}] * 4)
    assert [one.offset for one in new] == [3, 4, 5, 6]
    assert [one.offset for one in offsets.shown(new, 4, last=False)] == [3, 4]
    assert offsets.shown([], 4, last=False) == []
    (fifth,) = offsets.entries(list(b"e"), [{}])
    assert [one.offset for one in offsets.shown([fifth], 6, last=False)] == [5, 6]
    assert [one.offset for one in offsets.shown([], 5, last=True)] == [5]
    unknown = TokenNames(None, False).text_offsets(2, [], skip_special_tokens=True)
    assert [one.offset for one in unknown.entries([1, 2], [{}, {}])] == [2, 2]


@pytest.mark.parametrize(
    ("make", "text", "token_ids", "offsets"),
    [
        (byte_tokenizer, "abc", [97, 98, 99], [0, 1, 2]),
        (byte_tokenizer, "abc", [BOS, 97, 98, 99], [0, 0, 1, 2]),  # it is none of the text
        (byte_tokenizer, "<bos>a", [BOS, 97], [0, 5]),
        (byte_tokenizer, "x", [97, 98, 99], [0, 1, 1]),  # not what the ids were made of
        (lambda: None, "", [97, 98], [0, 0]),
    ],
)
def test_offsets_of_a_prompt_are_in_its_text_as_it_was_given(
    make: Any, text: str, token_ids: list[int], offsets: list[int]
) -> None:
    given = [None, *({i: Logprob(-1.0, 1, None)} for i in token_ids[1:])]
    output = RequestOutput(
        "r", None, token_ids, [], True, RequestMetrics(0.0), prompt_logprobs=given
    )
    tokenizer = make()
    entries = prompt_entries(output, text, tokenizer)
    assert [(one.token_id, one.offset) for one in entries] == list(
        zip(token_ids, offsets, strict=True)
    )
    found = completion_logprobs(entries, TokenNames(tokenizer, False))
    first = f"token_id:{token_ids[0]}" if tokenizer is None else tokenizer.token_text(token_ids[0])
    assert found.tokens == [first, *(f"token_id:{i}" for i in token_ids[1:])]
    assert found.text_offset == offsets
    assert found.token_logprobs == [None, *[-1.0] * (len(token_ids) - 1)]
    assert found.top_logprobs == [None, *({f"token_id:{i}": -1.0} for i in token_ids[1:])]


@pytest.mark.parametrize(("num_top", "ids"), [(-1, [2, 1, 3]), (0, []), (1, [2]), (2, [2, 1])])
def test_alternatives_are_the_likeliest(num_top: int, ids: list[int]) -> None:
    """The token itself is among them by its rank alone."""
    token = {1: Logprob(-1.0, 2, "b"), 2: Logprob(-0.5, 1, "a"), 3: Logprob(float("-inf"), 3, "c")}
    (entry,) = msgspec.json.decode(chat_logprobs([token], num_top, TokenNames(None, True)))
    assert (entry["token"], entry["logprob"]) == ("token_id:1", -1.0)
    assert [one["token"] for one in entry["top_logprobs"]] == [f"token_id:{i}" for i in ids]
    assert all(one["logprob"] >= -9999.0 for one in entry["top_logprobs"]), "JSON has no infinity"


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("num_top", [-1, 0, 2])
def test_log_probabilities_are_json_whatever_the_tokens(num_top: int, as_ids: bool) -> None:
    """A vocabulary of bytes has all that is odd: quotes, per cent signs, control characters, halves
    of characters."""
    tokenizer = byte_tokenizer()
    values = [-0.0, -1e-7, -0.1, -12.345678901234567, float("-inf")]
    names = TokenNames(tokenizer, as_ids)
    tokens = []
    for first in range(256):
        ids = [first, *((first + step) % 256 for step in (7, 31, 80))]
        ranks = [1, 2, 3, 4] if first % 2 else [9, 1, 2, 3]
        tokens.append(
            {
                token_id: Logprob(values[(first + rank) % 5], rank, tokenizer.token_text(token_id))
                for token_id, rank in zip(ids, ranks, strict=True)
            }
        )
    expected = []
    for alternatives in tokens:
        shown = {
            token_id: {
                "token": f"token_id:{token_id}" if as_ids else entry.decoded_token,
                "logprob": max(entry.logprob, -9999.0),
                "bytes": [token_id],
            }
            for token_id, entry in alternatives.items()
        }
        ranked = sorted(alternatives, key=lambda token_id: alternatives[token_id].rank)
        top = [shown[token_id] for token_id in ranked][: None if num_top < 0 else num_top]
        expected.append({**shown[next(iter(shown))], "top_logprobs": top})
    for _ in range(2):  # the second time it is remembered
        assert msgspec.json.decode(chat_logprobs(tokens, num_top, names)) == expected
