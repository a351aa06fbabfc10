"""Plain completions against a scripted core: prompts, batches, echo, log-probabilities."""

from typing import Any

import pytest

from nanovllm.protocol.messages import (
    AddRequest,
    Finished,
    Outputs,
    PromptLogprobs,
    RequestFailed,
    ToCore,
)
from nanovllm.protocol.plan import TokenLogprobs
from tests.frontend.attached import says
from tests.frontend.fake_core import silent
from tests.frontend.server.served import error_of, events, served


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
    of_prompt = [TokenLogprobs(i, -1.0, 1, [i], [-1.0]) for i in prompt[1:]]
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
