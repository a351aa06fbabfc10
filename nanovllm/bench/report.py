"""What a load test found: percentiles, rates, fairness; as text, JSON and a picture.

`clients` gathers the `ClientReport`s; here they become figures. All times are milliseconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from nanovllm.bench.client import ClientReport, gap_of_bucket
from nanovllm.bench.load import ClientsLoad

QUANTILES = (0.5, 0.9, 0.99, 1.0)
NAMES = ("p50", "p90", "p99", "max")
Spread = dict[str, float]  # quantile's name → milliseconds; empty if there was nothing


class CoreFigures(msgspec.Struct):
    """The core process over the test. None: its process could not be seen (another machine's)."""

    cpu_share: float | None = None  # of one CPU; all threads
    loop_share: float = 0.0  # its busy loop alone
    messaging_share: float = 0.0  # that part of the loop which receives, sorts, encodes and sends
    peak_memory_mib: float | None = None
    memory_growth_mib: float | None = None
    num_steps: int = 0
    num_preemptions: int = 0
    prefix_hit_share: float = 0.0


class Figures(msgspec.Struct):
    """One client's, or all clients' together."""

    num_requests: int
    num_errors: int
    num_output_tokens: int
    tokens_per_s: float
    ttft_ms: Spread
    inter_token_ms: Spread
    e2e_ms: Spread


class Report(msgspec.Struct):
    """fairness: Jain's index of the clients' tokens in time per token asked for, in (0, 1]."""

    load: ClientsLoad
    seconds: float
    overall: Figures
    clients: list[Figures]
    fairness: float
    client_cpu_s: float
    core: CoreFigures
    errors: list[str]


def summarize(
    load: ClientsLoad, reports: list[ClientReport], seconds: float, core: CoreFigures
) -> Report:
    """seconds: from the start to the last token."""
    asked = [sum(one.num_tokens for one in report.requests) for report in reports]
    served = [
        report.num_tokens_in_time / num_asked
        for report, num_asked in zip(reports, asked, strict=True)
        if num_asked
    ]
    errors = [f"{error}" for r in reports for one in r.requests if (error := one.error)]
    return Report(
        load=load,
        seconds=seconds,
        overall=figures(reports, seconds),
        clients=[figures([report], seconds) for report in reports],
        fairness=jain(served),
        client_cpu_s=sum(report.cpu_s for report in reports),
        core=core,
        errors=sorted(set(errors)),
    )


def figures(reports: list[ClientReport], seconds: float) -> Figures:
    requests = [request for report in reports for request in report.requests]
    num_tokens = sum(request.num_tokens for request in requests)
    return Figures(
        num_requests=len(requests),
        num_errors=sum(request.error is not None for request in requests),
        num_output_tokens=num_tokens,
        tokens_per_s=num_tokens / seconds,
        ttft_ms=spread([one.ttft_s for one in requests if one.ttft_s is not None]),
        inter_token_ms=spread_of_counts(add_counts([report.gaps for report in reports])),
        e2e_ms=spread([one.e2e_s for one in requests if one.e2e_s is not None]),
    )


def spread(seconds: Sequence[float]) -> Spread:
    if not seconds:
        return {}
    found = np.quantile(np.array(seconds), QUANTILES, method="inverted_cdf") * 1e3
    return dict(zip(NAMES, found.tolist(), strict=True))


def add_counts(counts: list[list[int]]) -> list[int]:
    total = np.zeros(max(map(len, counts), default=0), np.int64)
    for one in counts:
        total[: len(one)] += np.array(one, np.int64)
    summed: list[int] = total.tolist()
    return summed


def spread_of_counts(counts: list[int]) -> Spread:
    """As `spread`, from a histogram: right to the width of its buckets."""
    if not counts:
        return {}
    cumulative = np.cumsum(counts)
    ranks = np.ceil(np.array(QUANTILES) * cumulative[-1])
    buckets = np.searchsorted(cumulative, ranks)
    return dict(zip(NAMES, [gap_of_bucket(int(b)) * 1e3 for b in buckets], strict=True))


def jain(shares: list[float]) -> float:
    """(Σx)² / (n Σx²): 1 if all are equal, 1/n if one has everything (Jain et al., 1984)."""
    total = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * total) if total else 1.0


# ---- for people


def describe(report: Report) -> str:
    """What the command prints."""
    load, overall, core = report.load, report.overall, report.core
    if load.streams is not None:
        what = f"{load.streams} streams each for {load.duration:g} s"
    elif load.trace is not None:
        what = f"trace {load.trace}"
    else:
        what = f"{load.rate:g} requests/s for {load.duration:g} s"
    lines = [
        f"{load.clients} clients, {what}: {overall.num_requests} requests, "
        f"{overall.num_errors} errors, {report.seconds:.1f} s",
        f"{overall.tokens_per_s:,.0f} output tokens/s, "
        f"{overall.num_requests / report.seconds:.2f} requests/s, fairness {report.fairness:.4f}",
        "",
        f"{'ms':12}" + "".join(f"{name:>10}" for name in NAMES),
    ]
    for name, found in (
        ("first token", overall.ttft_ms),
        ("inter-token", overall.inter_token_ms),
        ("end to end", overall.e2e_ms),
    ):
        lines.append(f"{name:12}" + "".join(f"{found.get(q, np.nan):10.2f}" for q in NAMES))
    lines += ["", *_client_lines(report), "", _core_line(core, report.client_cpu_s)]
    lines += [f"error: {error}" for error in report.errors[:10]]
    return "\n".join(lines)


def _client_lines(report: Report) -> list[str]:
    columns = ["requests", "errors", "tokens/s"]
    columns += [f"{name} {q}" for name in ("ttft", "itl", "e2e") for q in ("p50", "p99")]
    lines = ["client" + "".join(f"{column:>10}" for column in columns)]
    for index, one in enumerate(report.clients):
        spreads = (one.ttft_ms, one.inter_token_ms, one.e2e_ms)
        times = [found.get(q, np.nan) for found in spreads for q in ("p50", "p99")]
        lines.append(
            f"{index:6d}{one.num_requests:10d}{one.num_errors:10d}{one.tokens_per_s:10,.0f}"
            + "".join(f"{ms:10.2f}" for ms in times)
        )
    return lines


def _core_line(core: CoreFigures, client_cpu_s: float) -> str:
    parts = [f"core: {core.num_steps} steps, {core.num_preemptions} preemptions"]
    parts.append(f"{core.prefix_hit_share:.0%} of prompt tokens cached")
    if core.cpu_share is not None and core.peak_memory_mib is not None:
        parts.append(f"{core.cpu_share:.0%} of a CPU, peak memory {core.peak_memory_mib:.0f} MiB")
        parts.append(f"(+{core.memory_growth_mib:.0f} during the test)")
    parts.append(f"its loop {core.loop_share:.0%} of a CPU, messaging {core.messaging_share:.0%}")
    return ", ".join(parts) + f"; clients: {client_cpu_s:.1f} s of CPU"


# ---- a picture


def need_matplotlib() -> Any:
    """The module, drawing without a screen. `ValueError` with the remedy if it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plot: needs matplotlib: pip install 'nanovllm[bench]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(report: Report, reports: list[ClientReport], path: str) -> None:
    """Four panels: the distributions of the three times, and each client's rate."""
    pyplot = need_matplotlib()
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    requests = [one for client in reports for one in client.requests]
    gaps = add_counts([client.gaps for client in reports])
    ttfts = np.sort([one.ttft_s * 1e3 for one in requests if one.ttft_s is not None])
    e2es = np.sort([one.e2e_s * 1e3 for one in requests if one.e2e_s is not None])
    gap_ms = [gap_of_bucket(bucket) * 1e3 for bucket in range(len(gaps))]
    for panel, title, xs, ys in (
        (panels[0, 0], "time to first token", ttfts, _ranks(len(ttfts))),
        (panels[0, 1], "between outputs", gap_ms, np.cumsum(gaps) / max(1, sum(gaps))),
        (panels[1, 0], "end to end", e2es, _ranks(len(e2es))),
    ):
        panel.plot(xs, ys, drawstyle="steps-post")
        panel.set(title=title, xlabel="ms", ylabel="share of all", ylim=(0, 1))
        panel.set_xscale("log")
        panel.grid(alpha=0.3)
    bars = panels[1, 1]
    bars.bar(range(len(report.clients)), [one.tokens_per_s for one in report.clients])
    bars.set(title=f"fairness {report.fairness:.4f}", xlabel="client", ylabel="output tokens/s")
    figure.suptitle(describe(report).partition("\n")[0])
    figure.savefig(Path(path), dpi=120)
    pyplot.close(figure)


def _ranks(count: int) -> Any:
    return np.arange(1, count + 1) / max(1, count)
