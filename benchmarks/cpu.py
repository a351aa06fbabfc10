"""Decode and prefill speed of a small model on this CPU, beside the peers that are installed.

Each engine runs in a process of its own and waits while another is measured. Rounds go through all
of them in turn, with a probe of the memory's bandwidth: a shared host's speed moves from minute to
minute. Printed are medians, and how many times a peer's speed nanovllm's is.

    python benchmarks/cpu.py --threads 2 --rounds 5 [--gguf FILE] [--peer llama.cpp=PYTHON] …

A peer is an interpreter that has it installed: `llama.cpp` (llama-cpp-python), `transformers` or
`vllm` (a CPU build). `llama.cpp@FILE=PYTHON` gives it another file of the same model: one that it
is faster with, or a directory of bf16 weights for those who cannot read GGUF files.

Decoding of 1, 8 and 32 sequences is without their prompts and first tokens; `mixed` is all of 32
requests of 64 to 512 tokens that get 16 to 256 new ones, a third of which begin with the same 256.

    python benchmarks/cpu.py --asks all [--rounds 5]

measures nanovllm alone: 8 and 32 sequences of which one or all ask for something of their sampling
(`workloads.ASKS`), beside as many that ask for nothing, which are measured right before and after.
Printed are medians of the ratios; `prompt_logprobs` is of prompts of 512 tokens.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPT, NEW, PREFILL = 128, 64, 512
CASES = ("1", "8", "32", "prefill", "mixed")
ASKED_IN, ASKED_OUT = 16, 64  # tokens of a request that may ask for something
ENGINES = ("nanovllm", "llama.cpp", "transformers", "vllm")
STATIC_BATCH = 8  # of transformers, with mixed requests

Run = Callable[[list[list[int]], list[int]], Any]
"""Prompts, and how many tokens each shall get."""


def prompts(count: int, length: int, *named: object) -> list[list[int]]:
    """Other ids for each name, so that nobody's prefix cache helps."""
    drawn = random.Random(repr(named))
    return [[drawn.randrange(1000, 40000) for _ in range(length)] for _ in range(count)]


def mixed(turn: int) -> tuple[list[list[int]], list[int]]:
    """32 prompts, every third of which begins with the same 256 ids, and how much each gets."""
    drawn = random.Random(turn)
    shared = [drawn.randrange(1000, 40000) for _ in range(256)]
    some, lengths = [], []
    for i in range(32):
        length = drawn.randint(64, 512)
        own = [drawn.randrange(1000, 40000) for _ in range(length)]
        some.append(shared + own[: max(1, length - 256)] if i % 3 == 0 else own)
        lengths.append(drawn.randint(16, 256))
    return some, lengths


class Measured:
    """Tokens per second of `case`: of new tokens but the first, of a prompt, or of new tokens."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __call__(self, case: str, turn: int) -> float:
        if case == "prefill":
            return PREFILL / self._seconds(prompts(1, PREFILL, case, turn), [1])
        if case == "mixed":
            some, lengths = mixed(turn)
            return sum(lengths) / self._seconds(some, lengths)
        count = int(case)
        first = self._seconds(prompts(count, PROMPT, case, turn, "first"), [1] * count)
        some = prompts(count, PROMPT, case, turn)
        return count * NEW / max(self._seconds(some, [1 + NEW] * count) - first, 1e-9)

    def _seconds(self, some: list[list[int]], lengths: list[int]) -> float:
        started = time.perf_counter()
        self._run(some, lengths)
        return time.perf_counter() - started


def nanovllm(model: str, threads: int) -> Run:
    from nanovllm import LLM, SamplingParams

    llm = LLM(model, device="cpu", threads=threads, max_model_len=2048)

    def run(some: list[list[int]], lengths: list[int]) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        llm.generate(some, params)

    return run


def llama_cpp(model: str, threads: int) -> Run:
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    # Each sequence gets its share of the context, which must hold the prompt of prefill.
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 32 * 768, 2048, 512, 32
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(loaded, params)
    memory = lib.llama_get_memory(context)
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))

    def step(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """entries: token, position, sequence, whether its next token is wanted."""
        batch = lib.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        assert lib.llama_decode(context, batch) == 0
        found = []
        for i, (*_, wanted) in enumerate(entries):
            if wanted:
                logits = lib.llama_get_logits_ith(context, i)
                found.append(int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax()))
        lib.llama_batch_free(batch)
        return found

    def run(some: list[list[int]], lengths: list[int]) -> None:
        lib.llama_memory_clear(memory, True)
        ids: dict[int, int] = {}
        for sequence, prompt in enumerate(some):
            ends = len(prompt) - 1
            told = step([(token, i, sequence, i == ends) for i, token in enumerate(prompt)])
            ids[sequence] = told[0]
        made = 1
        while ids := {i: token for i, token in ids.items() if made < lengths[i]}:
            at = [(token, len(some[i]) + made - 1, i, True) for i, token in ids.items()]
            ids = dict(zip(ids, step(at), strict=True))
            made += 1

    return run


def transformers(model: str, threads: int) -> Run:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    folder, file = os.path.split(model)
    if os.path.isdir(model):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)

    def run(some: list[list[int]], lengths: list[int]) -> None:
        """Batches that wait for their longest, of prompts that are padded on the left."""
        size = len(some) if len(set(lengths)) == 1 else STATIC_BATCH
        for start in range(0, len(some), size):
            batch, most = some[start : start + size], max(lengths[start : start + size])
            width = max(map(len, batch))
            pads = [width - len(ids) for ids in batch]
            loaded.generate(
                torch.tensor([[0] * pad + ids for pad, ids in zip(pads, batch, strict=True)]),
                attention_mask=torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
                min_new_tokens=most,
                max_new_tokens=most,
                do_sample=False,
                pad_token_id=0,
            )

    return run


def vllm(model: str, threads: int) -> Run:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB: room for all cases, beside the other engines
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", max_model_len=2048, gpu_memory_utilization=0.3)

    def run(some: list[list[int]], lengths: list[int]) -> None:
        params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
        llm.generate([{"prompt_token_ids": ids} for ids in some], params, use_tqdm=False)

    return run


class Asked:
    """How fast sequences are of which some ask for something."""

    def __init__(self, model: str, threads: int) -> None:
        from nanovllm import LLM

        self._llm = LLM(model, device="cpu", threads=threads, max_model_len=2048)

    def share(self, name: str, num_asking: int, count: int, turn: int) -> tuple[float, float]:
        """Of a case its speed, and how many times as fast it is as `count` plain sequences."""
        self._speed(name, num_asking, count, (turn, "first"), num_out=2)  # compiles a grammar
        before = self._speed(name, 0, count, (turn, "before"))
        speed = self._speed(name, num_asking, count, (turn, "asking"))
        after = self._speed(name, 0, count, (turn, "after"))
        return speed, 2 * speed / (before + after)

    def _speed(
        self, name: str, num_asking: int, count: int, seed: object, *, num_out: int = ASKED_OUT
    ) -> float:
        """Of new tokens; of prompts' where it is these that are asked about."""
        from workloads import ASKS, GRAMMARS

        from nanovllm import SamplingParams, StructuredOutputsParams

        is_of_prompts = "prompt_logprobs" in ASKS[name]
        num_in = PREFILL if is_of_prompts else ASKED_IN
        num_out = 1 if is_of_prompts else num_out
        plain: dict[str, Any] = {"temperature": 0.8, "max_tokens": num_out, "ignore_eos": True}
        fields = ASKS[name]
        if not GRAMMARS.isdisjoint(fields):
            fields = {"structured_outputs": StructuredOutputsParams(**fields)}
        asking = plain | fields
        if "min_tokens" in asking:
            asking["min_tokens"] = num_out
        params = [SamplingParams(**asking)] * num_asking
        params += [SamplingParams(**plain)] * (count - num_asking)
        some = prompts(count, num_in, name, num_asking, seed)
        started = time.perf_counter()
        outputs = self._llm.generate(some, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        if is_of_prompts:
            return count * num_in / seconds
        return sum(len(one.token_ids) for output in outputs for one in output.outputs) / seconds


def print_asked(model: str, threads: int, names: list[str], num_rounds: int) -> None:
    """Each figure as it is measured, then a table of medians."""
    measured, found = Asked(model, threads), {}
    cases = [(1, 8), (8, 8), (1, 32), (32, 32)]
    for turn in range(num_rounds):
        for name in names:
            for case in cases:
                speed, share = measured.share(name, *case, turn)
                found.setdefault((name, *case), []).append((speed, share))
                print(f"  {name}, {case[0]} of {case[1]}: {speed:.0f}, {share:.2f} x", flush=True)
    print(f"{os.path.basename(model)}, {threads} threads, medians of {num_rounds} rounds")
    print(f"{'':18}" + "".join(f"{f'{few} of {all}':>14}" for few, all in cases))
    for name in names:
        medians = (
            [statistics.median(one) for one in zip(*found[name, *case], strict=True)]
            for case in cases
        )
        print(f"{name:18}" + "".join(f"{speed:7.0f} ({x:4.2f})" for speed, x in medians))


def bandwidth() -> float:
    """GB/s that one thread reads."""
    import numpy as np

    values = np.ones(2**25, np.float32)
    started = time.perf_counter()
    values.sum()
    return values.nbytes / (time.perf_counter() - started) / 1e9


def serve(engine: str, model: str, threads: int) -> None:
    """One engine: a case and a turn in on each line, a number out."""
    makers = {
        "nanovllm": nanovllm,
        "llama.cpp": llama_cpp,
        "transformers": transformers,
        "vllm": vllm,
    }
    measured = Measured(makers[engine](model, threads))
    print("ready", flush=True)
    for line in sys.stdin:
        case, turn = line.split()
        print(json.dumps(measured(case, int(turn))), flush=True)


class Peer:
    """A process that serves one engine."""

    def __init__(self, engine: str, python: str, rest: list[str]) -> None:
        command = [python, __file__, "--serve", engine, *rest]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer("ready")

    def measure(self, case: str, turn: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case} {turn}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self, wanted: str = "") -> str:
        """The next line that is `wanted`, or a number: engines print things of their own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.strip()
            if text == wanted or (not wanted and text.replace(".", "", 1).isdigit()):
                return text
        raise SystemExit("an engine died: run it with --serve to see why")

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", help="default: the file of smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", action="append", default=[], metavar="ENGINE[@MODEL]=PYTHON")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--asks", nargs="+", metavar="NAME", help="of workloads.ASKS, or `all`")
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.gguf, args.threads)
        return
    if args.gguf is None:
        from nanovllm.checkpoint.locate import locate

        args.gguf = str(locate("smollm2").path)
    if args.asks:
        from workloads import ASKS

        names = list(ASKS) if args.asks == ["all"] else args.asks
        print_asked(args.gguf, args.threads, names, args.rounds)
        return
    threads = ["--threads", str(args.threads)]
    peers = {"nanovllm": Peer("nanovllm", sys.executable, ["--gguf", args.gguf, *threads])}
    for asked in args.peer:
        named, _, python = asked.partition("=")
        engine, _, model = named.partition("@")
        label = f"{engine} {os.path.basename(model)}".strip()
        peers[label] = Peer(engine, python, ["--gguf", model or args.gguf, *threads])
    found: dict[tuple[str, str], list[float]] = {}
    speeds = []
    for turn in range(args.rounds):
        for case in args.cases:
            speeds.append(bandwidth())
            for engine, peer in peers.items():
                found.setdefault((engine, case), []).append(peer.measure(case, turn))
                print(f"  {case}: {engine} {found[engine, case][-1]:.0f}", flush=True)
    print(f"{os.path.basename(args.gguf)}, {args.threads} threads, medians of {args.rounds} rounds")
    print(f"one thread reads {min(speeds):.0f} to {max(speeds):.0f} GB/s")
    own = {case: statistics.median(found["nanovllm", case]) for case in args.cases}
    print(f"{'':34}" + "".join(f"{case:>18}" for case in args.cases))
    for engine, peer in peers.items():
        medians = {case: statistics.median(found[engine, case]) for case in args.cases}
        cells = (f"{medians[case]:10.0f} ({own[case] / medians[case]:4.2f})" for case in args.cases)
        print(f"{engine:34}" + "".join(f"{cell:>18}" for cell in cells))
        peer.end()


if __name__ == "__main__":
    main()
