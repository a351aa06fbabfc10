"""Long prompts: encoded as short ones, ended with their request, or not begun at all."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from nanovllm.frontend.encoding_process import LongTexts
from nanovllm.frontend.server import prompts
from nanovllm.protocol.messages import AddRequest
from tests.frontend.attached import says
from tests.frontend.server.served import TIMEOUT_S, error_of, listening, roomy, served
from tests.frontend.vocabulary import byte_tokenizer, sentencepiece_tokenizer


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of more than 100 characters are long."""
    monkeypatch.setattr(prompts, "LONG_TEXT", 10)
    monkeypatch.setattr(prompts, "MAX_AT_ONCE", 100)


def children(wanted: bytes) -> list[Path]:
    """Processes of this one, by a word of their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, status = (path / "cmdline").read_bytes(), (path / "status").read_text()
        except OSError:  # it has just ended
            continue
        if wanted in command and f"PPid:\t{os.getpid()}\n" in status:
            found.append(path)
    return found


@pytest.mark.parametrize("make", [byte_tokenizer, sentencepiece_tokenizer])
async def test_a_process_encodes_as_the_tokenizer_does(make: Any) -> None:
    tokenizer = make()
    before = children(b"encoding_process")  # of other tests' tokenizers, which end with these
    for text in ("", "he", " hello world" * 50, "é😀\ud800"[:2] * 99, "<s>hello<eos>x"):
        for add in (False, True):
            found = await tokenizer.long_texts.encode(text, add_special_tokens=add)
            assert found == tokenizer.encode(text, add_special_tokens=add)
    (own,) = set(children(b"encoding_process")).difference(before)
    tokenizer.long_texts.close()
    assert own not in children(b"encoding_process")


@pytest.mark.usefixtures("small")
async def test_long_prompts_are_encoded_as_short_ones(address: str) -> None:
    texts = ["short", "long" * 30, "medium" * 5]
    async with served(address, roomy(says("x"))) as server:
        assert (await server.complete(texts)).status_code == 200
        sent = [server.core.wait_for(AddRequest, n + 1).prompt_token_ids for n in range(3)]
        tokenizer = byte_tokenizer()
        assert sent == [tokenizer.encode(text) for text in texts]
        assert (await server.chat("long" * 30)).status_code == 200
        assert bytes(server.core.wait_for(AddRequest, 4).prompt_token_ids) == (
            f"user:{'long' * 30}|".encode()
        )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_who_leaves_ends_the_encoding(
    address: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process, and what of a batch has not been begun; the next text finds a new one."""
    begun: list[int] = []
    encode = LongTexts.encode

    async def noted(self: LongTexts, text: str, *, add_special_tokens: bool) -> list[int]:
        begun.append(len(text))
        return await encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(LongTexts, "encode", noted)
    monkeypatch.setattr("nanovllm.frontend.encoding_process.PROGRAM", ("sleep", "61"))
    chat = '{"messages": [{"role": "user", "content": "' + "a" * 200 + '"}]}'
    batch = '{"prompt": ["' + "a" * 200 + '", "' + "b" * 200 + '"]}'
    body = (chat if "chat" in path else batch).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    async with listening(address, roomy(says("x"))) as (url, core, _serving):
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(head.encode() + body)
        await _until(lambda: len(begun) == 1)
        await _until(lambda: children(b"sleep\x0061"))
        writer.close()
        await _until(lambda: not children(b"sleep\x0061"))
        assert len(begun) == 1
        assert not core.all_of(AddRequest)


async def _until(holds: Any) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():
            await asyncio.sleep(0.01)


async def test_what_no_such_model_can_take_is_not_encoded(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of this tokenizer stands for 9 characters at most, the model takes 4096 tokens."""
    monkeypatch.setattr(LongTexts, "encode", None)
    text = "a" * (9 * 4096 + 100_000)
    async with served(address, roomy(says("x"))) as server:
        for response in (await server.complete(text), await server.chat(text)):
            assert response.status_code == 400
            assert error_of(response)["code"] == "context_length_exceeded"
        mixed = (await server.complete(["a", text])).json()["choices"]
        assert [choice["finish_reason"] for choice in mixed] == ["length", "error"]


def test_a_prompt_that_is_not_cut_keeps_its_text() -> None:
    prompt = prompts.Prompt("abc", [1, 2, 3])
    assert all(prompts.truncated(prompt, limit) == prompt for limit in (None, 3, 4))
    assert prompts.truncated(prompt, 2) == (None, [2, 3])
