"""Decode and prefill speed of a small model on this CPU, beside the peers that are installed.

Each engine runs in a process of its own and waits while another is measured. Rounds go through all
of them in turn, with a probe of the memory's bandwidth: a shared host's speed moves from minute to
minute. Printed are medians, and how many times a peer's speed nanovllm's is.

    python benchmarks/cpu.py --threads 2 --rounds 5 [--gguf FILE] [--peer llama.cpp=PYTHON] …

A peer is an interpreter that has it installed: `llama.cpp` (llama-cpp-python), `transformers` or
`vllm` (a CPU build).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

PROMPT, NEW, PREFILL = 128, 32, 512
CASES = ("1", "8", "32", "prefill")
ENGINES = ("nanovllm", "llama.cpp", "transformers", "vllm")


def prompts(count: int, length: int) -> list[list[int]]:
    """Different ids in each, so that nobody's prefix cache helps."""
    return [[1000 + (7 * i + 131 * j) % 40000 for j in range(length)] for i in range(count)]


class Measured:
    """Tokens per second of `case`: of new tokens but the first, or of a prompt."""

    def __init__(self, run: Callable[[list[list[int]], int], Any]) -> None:
        """run: prompts and how many tokens each shall get."""
        self._run = run

    def __call__(self, case: str, turn: int) -> float:
        if case == "prefill":
            return PREFILL / self._seconds(prompts(1 + turn, PREFILL)[-1:], 1)
        some = prompts(int(case) * (1 + turn), PROMPT)[-int(case) :]
        first = self._seconds(some, 1)
        some = prompts(int(case) * (2 + turn), PROMPT + 1)[-int(case) :]
        return int(case) * NEW / max(self._seconds(some, 1 + NEW) - first, 1e-9)

    def _seconds(self, some: list[list[int]], num_new: int) -> float:
        started = time.perf_counter()
        self._run(some, num_new)
        return time.perf_counter() - started


def nanovllm(model: str, threads: int) -> Callable[[list[list[int]], int], Any]:
    from nanovllm import LLM, SamplingParams

    llm = LLM(model, device="cpu", threads=threads, enable_prefix_caching=False, max_model_len=2048)

    def run(some: list[list[int]], num_new: int) -> None:
        llm.generate(some, SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True))

    return run


def llama_cpp(model: str, threads: int) -> Callable[[list[list[int]], int], Any]:
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

    def run(some: list[list[int]], num_new: int) -> None:
        lib.llama_memory_clear(memory, True)
        ids = []
        for sequence, prompt in enumerate(some):
            ends = len(prompt) - 1
            ids += step([(token, i, sequence, i == ends) for i, token in enumerate(prompt)])
        for position in range(len(some[0]), len(some[0]) + num_new - 1):
            ids = step([(token, position, i, True) for i, token in enumerate(ids)])

    return run


def transformers(model: str, threads: int) -> Callable[[list[list[int]], int], Any]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    folder, file = os.path.split(model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)

    def run(some: list[list[int]], num_new: int) -> None:
        ids = torch.tensor(some)
        loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=num_new,
            max_new_tokens=num_new,
            do_sample=False,
            pad_token_id=0,
        )

    return run


def vllm(model: str, threads: int) -> Callable[[list[list[int]], int], Any]:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="bfloat16", enable_prefix_caching=False, max_model_len=2048)

    def run(some: list[list[int]], num_new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        llm.generate([{"prompt_token_ids": ids} for ids in some], params, use_tqdm=False)

    return run


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
    parser.add_argument("--peer", action="append", default=[], metavar="ENGINE=PYTHON")
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.gguf, args.threads)
        return
    if args.gguf is None:
        from nanovllm.checkpoint.locate import locate

        args.gguf = str(locate("smollm2").path)
    rest = ["--gguf", args.gguf, "--threads", str(args.threads)]
    peers = {"nanovllm": Peer("nanovllm", sys.executable, rest)}
    for named in args.peer:
        engine, _, python = named.partition("=")
        peers[engine] = Peer(engine, python, rest)
    found: dict[tuple[str, str], list[float]] = {}
    speeds = []
    for turn in range(args.rounds):
        for case in CASES:
            speeds.append(bandwidth())
            for engine, peer in peers.items():
                found.setdefault((engine, case), []).append(peer.measure(case, turn))
    print(f"{os.path.basename(args.gguf)}, {args.threads} threads, medians of {args.rounds} rounds")
    print(f"one thread reads {min(speeds):.0f} to {max(speeds):.0f} GB/s")
    own = {case: statistics.median(found["nanovllm", case]) for case in CASES}
    print(f"{'':14}" + "".join(f"{case:>18}" for case in CASES))
    for engine, peer in peers.items():
        medians = {case: statistics.median(found[engine, case]) for case in CASES}
        cells = (f"{medians[case]:10.0f} ({own[case] / medians[case]:4.2f})" for case in CASES)
        print(f"{engine:14}" + "".join(f"{cell:>18}" for cell in cells))
        peer.end()


if __name__ == "__main__":
    main()
