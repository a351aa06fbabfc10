"""How light the core is: CPU time per step, without a device.

    python benchmarks/core.py

A fake executor answers at once, so what is timed is schedule + submit + update + sorting outputs to
clients + encoding them: all the core does in a step. The best of several windows is printed, since
other programs on the machine only ever add time. Targets: 256 running ≤ 500 µs, 8 running ≤ 40 µs,
64 constrained ≤ 1 ms. What a request waits for its first output, `first_output.py` measures.
"""

import tempfile
import time
from itertools import islice, product
from string import ascii_lowercase

import msgspec
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from workloads import ASKS

from nanovllm.config import EngineConfig
from nanovllm.core.clients import Client
from nanovllm.core.engine_core import EngineCore
from nanovllm.core.grammar import GrammarCompiler
from nanovllm.core.server import CoreServer
from nanovllm.frontend.tokenizer import Tokenizer as Tokens
from nanovllm.protocol.messages import AddRequest
from nanovllm.protocol.plan import StepMasks, StepPlan, StepResult, WorkerInfo
from nanovllm.sampling_params import SamplingParams, StructuredOutputsParams

VOCAB_SIZE = 151_936
# Few tokens of this vocabulary fit: what masks of real grammars cost, `structured.py` measures.
NUMBERS = StructuredOutputsParams(regex="([0-9]{1,9} )+")
RECORDS = {"type": "array", "items": ASKS["schema"]["json"], "minItems": 10_000}  # never ends


class InstantExecutor:
    """Samples token 7 for everyone, at once; where there is a mask, the last id it allows."""

    def __init__(
        self, *, num_blocks: int = 100_000, max_model_len: int = 4096, vocab_size: int = 1000
    ) -> None:
        self._num_blocks = num_blocks
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def start(self) -> WorkerInfo:
        return WorkerInfo(
            device="none",
            dtype="none",
            attention_backend="none",
            architecture="none",
            num_blocks=self._num_blocks,
            max_model_len=self._max_model_len,
            vocab_size=self._vocab_size,
            eos_token_ids=[0],
        )

    def allocate(self, num_blocks: int) -> None:
        pass

    def warm_up(self) -> bool:
        return False

    def submit(self, plan: StepPlan) -> "InstantHandle":
        self._result = StepResult(plan.step, [7] * len(plan.sampling))
        return InstantHandle(self._result)

    def sample(self, step: int, masks: StepMasks | None) -> None:
        if masks is not None:
            words = np.frombuffer(masks.words, np.uint32).reshape(len(masks.indices), -1)
            places = words.shape[1] - 1 - (words[:, ::-1] != 0).argmax(1)
            bits = words[np.arange(len(words)), places].tolist()
            for index, place, word in zip(masks.indices, places.tolist(), bits, strict=True):
                self._result.token_ids[index] = 32 * place + word.bit_length() - 1

    def shutdown(self) -> None:
        pass


class PickingExecutor(InstantExecutor):
    """Where there is a mask, any of the ids it allows. spent_s, spent_cpu_s: on picking."""

    spent_s = spent_cpu_s = 0.0
    random = np.random.default_rng(0)

    def sample(self, step: int, masks: StepMasks | None) -> None:
        started, started_cpu = time.perf_counter(), time.thread_time()
        if masks is not None:
            words = np.frombuffer(masks.words, np.uint8).reshape(len(masks.indices), -1)
            bits = np.unpackbits(words, axis=1, bitorder="little")
            for line, index in enumerate(masks.indices):
                allowed = np.flatnonzero(bits[line])
                self._result.token_ids[index] = int(self.random.choice(allowed))
        self.spent_s += time.perf_counter() - started
        self.spent_cpu_s += time.thread_time() - started_cpu


class InstantHandle:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


def byte_tokenizer() -> str:
    """A vocabulary of 151,936 byte-level tokens, as large models have it: id 0 is EOS, then bytes,
    then words of three to five letters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ("".join(letters) for n in (3, 4, 5) for letters in product(ascii_lowercase, repeat=n))
    tokens = ["<eos>", *alphabet, *islice(words, VOCAB_SIZE - 257)]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", normalized=False)])
    return tokenizer.to_str()


def step_time(
    num_running: int,
    *,
    depth: int,
    wanted: StructuredOutputsParams | None = None,
    num_windows: int = 20,
    num_steps: int = 50,
) -> float:
    """Seconds per decode step with `num_running` sequences of one client. wanted: of each."""
    config = EngineConfig.from_kwargs(max_num_seqs=num_running, max_inflight_steps=depth)
    executor = InstantExecutor(vocab_size=1000 if wanted is None else VOCAB_SIZE)
    info = executor.start()
    compiler = None if wanted is None else GrammarCompiler(byte_tokenizer, info)
    core = EngineCore(config, executor, info, compiler)
    directory = tempfile.mkdtemp()
    server = CoreServer(config, f"ipc://{directory}/core.sock")
    client = server._clients.attach(b"client", time.monotonic())
    encoder = msgspec.msgpack.Encoder()
    params = SamplingParams(max_tokens=None, ignore_eos=True, structured_outputs=wanted)
    for number in range(num_running):
        core.add(client.client_id, AddRequest(number, list(range(1, 100)), params))
    while core.status(epoch="", num_clients=1).num_running < num_running:
        core.step()
    return min(timed(core, server, client, encoder, num_steps) for _ in range(num_windows))


def timed(
    core: EngineCore,
    server: CoreServer,
    client: Client,
    encoder: msgspec.msgpack.Encoder,
    num_steps: int,
) -> float:
    started = time.perf_counter()
    for _ in range(num_steps):
        outputs = core.step()
        if outputs is not None:
            server._clients.collect(outputs)
            encoder.encode(client.outputs)
            client.take_outputs()
    return (time.perf_counter() - started) / num_steps


def schema_step_time(num_running: int, *, num_windows: int = 8) -> tuple[float, float]:
    """Seconds per step of sequences that write JSON by SmolLM2's vocabulary, and CPU seconds of the
    loop's own thread in it: masks are computed by others. What picks tokens is taken off."""
    tokenizer = Tokens.load("smollm2")
    config = EngineConfig.from_kwargs(max_num_seqs=num_running, max_inflight_steps=2)
    executor = PickingExecutor(
        vocab_size=tokenizer.vocab_size, max_model_len=100_000, num_blocks=500_000
    )
    info = executor.start()
    core = EngineCore(config, executor, info, GrammarCompiler(tokenizer.to_json, info))
    server = CoreServer(config, f"ipc://{tempfile.mkdtemp()}/core.sock")
    client = server._clients.attach(b"client", time.monotonic())
    encoder = msgspec.msgpack.Encoder()
    wanted = StructuredOutputsParams(json=RECORDS)
    params = SamplingParams(max_tokens=None, ignore_eos=True, structured_outputs=wanted)
    for number in range(num_running):
        core.add(client.client_id, AddRequest(number, list(range(1, 100)), params))
    while core.status(epoch="", num_clients=1).num_running < num_running:
        core.step()
    best = best_cpu = float("inf")
    for _ in range(num_windows):
        spent, spent_cpu, cpu = executor.spent_s, executor.spent_cpu_s, time.thread_time()
        seconds = timed(core, server, client, encoder, 40) - (executor.spent_s - spent) / 40
        cpu = time.thread_time() - cpu - (executor.spent_cpu_s - spent_cpu)
        best, best_cpu = min(best, seconds), min(best_cpu, cpu / 40)
    return best, best_cpu


def main() -> None:
    for num_running in (8, 256):
        for depth in (1, 2):
            seconds = step_time(num_running, depth=depth)
            print(f"{num_running:4d} running, {depth} in flight: {seconds * 1e6:6.1f} µs a step")
    for depth in (1, 2):
        seconds = step_time(64, depth=depth, wanted=NUMBERS)
        print(
            f"  64 constrained, {depth} in flight: {seconds * 1e6:6.1f} µs a step, masks included"
        )
    seconds, cpu = schema_step_time(64)
    print(f"  64 by a JSON schema: {seconds * 1e6:6.1f} µs a step, the loop's own {cpu * 1e6:6.1f}")


if __name__ == "__main__":
    main()
