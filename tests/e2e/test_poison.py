"""Grammars that crash or stall their compiler, sent to a real core beside the streams of others."""

import asyncio
import time
from pathlib import Path

import pytest

from benchmarks.faults import Load, core_pid, owner, run, same_ids
from benchmarks.fuzz_grammars import POISONS
from nanovllm import AsyncLLM, RequestFailedError, SamplingParams, StructuredOutputsParams
from tests.core.fake_executor import VOCAB_SIZE
from tests.core.vocabulary import tokenizer_json
from tests.waiting import WAIT_S

LOAD = Load(num_clients=8, num_streams=64, num_tokens=500)
ANSWERED_S = 2 * WAIT_S


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    (tmp_path / "tokenizer.json").write_text(tokenizer_json())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return str(tmp_path)


async def refusal(llm: AsyncLLM, name: str) -> tuple[str, float]:
    """The cause that a sender of this grammar is told, and how soon."""
    started = time.monotonic()
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**POISONS[name]))
    with pytest.raises(RequestFailedError) as failure:
        async for _ in llm.generate([5, 6, 7], params):
            pass
    return str(failure.value), time.monotonic() - started


async def test_poison_costs_its_sender_alone(tokenizer: str) -> None:
    answers: dict[str, tuple[str, float]] = {}

    async def poison(llm: AsyncLLM, clients: object) -> None:
        found = await asyncio.gather(*(refusal(llm, name) for name in POISONS))
        answers.update(zip(POISONS, found, strict=True))

    settings = {"tokenizer": tokenizer, "vocab_size": VOCAB_SIZE}
    async with owner(LOAD, **settings) as llm:
        pid = core_pid(llm)
        undisturbed = await run(llm, LOAD)
        poisoned = await run(llm, LOAD, poison)
        assert core_pid(llm) == pid, "the core was not even restarted"
    assert same_ids(undisturbed, poisoned) == 64
    assert poisoned.num_free_blocks_missing == 0
    for name, (cause, seconds) in answers.items():
        assert "structured_outputs" in cause and seconds < ANSWERED_S, (name, cause, seconds)
