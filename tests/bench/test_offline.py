"""`nanovllm bench`'s arithmetic, on an engine whose timings are known."""

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.bench import offline as bench
from nanovllm.frontend.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanovllm.sampling_params import SamplingParams

FIRST_S, PER_TOKEN_S = 0.2, 0.01


class TimedLLM:
    """Every first token takes 200 ms, every later one 10 ms; wall clock not included."""

    calls: list[tuple[list[list[int]], SamplingParams]]
    info = SimpleNamespace(worker=SimpleNamespace(vocab_size=10))

    def __init__(self, **settings: Any) -> None:
        type(self).calls = []
        assert settings == {"block_size": 16, "on_progress": show}

    def __enter__(self) -> "TimedLLM":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, *, use_tqdm: bool
    ) -> list[RequestOutput]:
        assert not use_tqdm
        self.calls.append((prompts, params))
        count = params.max_tokens or 0
        metrics = RequestMetrics(
            arrival_time=10.0,
            first_token_time=10.0 + FIRST_S,
            finished_time=10.0 + FIRST_S + PER_TOKEN_S * (count - 1),
            num_generation_tokens=count,
        )
        completion = CompletionOutput(0, "", [5] * count, finish_reason="length")
        return [
            RequestOutput(str(i), None, prompt, [completion], True, metrics)
            for i, prompt in enumerate(prompts)
        ]


shown: list[tuple[str, float]] = []


def show(phase: str, progress: float) -> None:
    shown.append((phase, progress))


def settings() -> dict[str, Any]:
    shown.clear()
    return {"block_size": 16, "on_progress": show}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(bench, "LLM", TimedLLM)
    return lambda: TimedLLM.calls


def arguments(**changes: int) -> argparse.Namespace:
    values = {"input_len": 6, "output_len": 5, "num_prompts": 4, "batch_size": 2, "num_iters": 3}
    return argparse.Namespace(**{**values, **changes})


def test_throughput_counts_all_requests_after_a_warm_up(calls: Any) -> None:
    report = bench.throughput(arguments(), settings())
    assert "4 requests of 6 tokens in, 5 out" in report
    assert "time to first token: mean 200.0 ms, p50 200.0 ms, p99 200.0 ms" in report
    assert "time per later token: mean 10.0 ms, p50 10.0 ms, p99 10.0 ms" in report
    (warm_up, _), (prompts, params) = calls()
    assert len(warm_up) == 1 and warm_up[0] not in prompts
    assert [len(prompt) for prompt in prompts] == [6] * 4
    assert all(bench.FIRST_ID <= token < 10 for prompt in prompts for token in prompt)
    assert params.ignore_eos and params.greedy and params.max_tokens == 5
    assert shown == [("measuring", 0.0)]


def test_latency_repeats_rounds_of_different_prompts(calls: Any) -> None:
    report = bench.latency(arguments(output_len=1), settings())
    assert "2 at once, 6 tokens in, 1 out, 3 rounds" in report
    assert "time to first token: mean 200.0 ms" in report
    assert "later token" not in report, "there is none"
    rounds = [prompts for prompts, _ in calls()]
    assert [len(prompts) for prompts in rounds] == [2] * 4
    assert [phase for phase, _ in shown] == ["measuring"] * 3 and shown[-1][1] == 2 / 3
    assert len({tuple(prompt) for prompts in rounds for prompt in prompts}) == 8


def test_percentiles() -> None:
    seconds = [i / 1000 for i in range(1, 101)]
    assert bench._spread(seconds) == "mean 50.5 ms, p50 51.0 ms, p99 100.0 ms"
