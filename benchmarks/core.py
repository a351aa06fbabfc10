"""How light the core is: CPU time per step, without a device.

    python benchmarks/core.py

A fake executor answers at once, so what is timed is schedule + submit + update + sorting outputs to
clients + encoding them: all the core does in a step. The best of several windows is printed, since
other programs on the machine only ever add time. Targets: 256 running ≤ 500 µs, 8 running ≤ 40 µs,
64 constrained ≤ 1 ms. Of JSON there are two lines: random tokens, of which hardly any has been met
before, and texts that no output has had before, but spelled as a model spells them: what a server
that has its grammars for a while mostly does. What a request waits for its first output,
`first_output.py` measures.
"""

import json
import random
import tempfile
import time
from collections.abc import Iterator
from itertools import islice, product
from string import ascii_lowercase

import msgspec
import numpy as np
import numpy.typing as npt
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
        self._last_ids: dict[int, int] = {}  # that masks allow, by line

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

    def check(self) -> None:
        pass

    def submit(self, plan: StepPlan) -> "InstantHandle":
        self._result = StepResult(plan.step, [7] * len(plan.sampling))
        return InstantHandle(self._result)

    def sample(self, step: int, masks: StepMasks | None) -> None:
        if masks is not None:
            for line, words in new_lines(masks):
                (places,) = words.nonzero()
                self._last_ids[line] = (
                    32 * int(places[-1]) + int(words[places[-1]]).bit_length() - 1
                )
            for index, line in zip(masks.indices, masks.lines, strict=True):
                self._result.token_ids[index] = self._last_ids[line]

    def shutdown(self) -> None:
        pass


def new_lines(masks: StepMasks) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
    """Those that a step brings, with their masks: [num_words]."""
    if masks.new_lines:
        words = np.frombuffer(masks.words, np.uint32).reshape(len(masks.new_lines), -1)
        yield from zip(masks.new_lines, words, strict=True)


class PickingExecutor(InstantExecutor):
    """Where there is a mask, any of the ids it allows. spent_s, spent_cpu_s: on picking."""

    spent_s = spent_cpu_s = 0.0
    random = np.random.default_rng(0)

    def __init__(self, *, vocab_size: int, max_model_len: int, num_blocks: int) -> None:
        super().__init__(vocab_size=vocab_size, max_model_len=max_model_len, num_blocks=num_blocks)
        self._allowed: dict[int, npt.NDArray[np.intp]] = {}  # ids, by line

    def sample(self, step: int, masks: StepMasks | None) -> None:
        started, started_cpu = time.perf_counter(), time.thread_time()
        if masks is not None:
            for line, words in new_lines(masks):
                bits = np.unpackbits(words.view(np.uint8), bitorder="little")
                self._allowed[line] = np.flatnonzero(bits)
            for index, line in zip(masks.indices, masks.lines, strict=True):
                self._result.token_ids[index] = int(self.random.choice(self._allowed[line]))
        self.spent_s += time.perf_counter() - started
        self.spent_cpu_s += time.thread_time() - started_cpu


class WritingExecutor(InstantExecutor):
    """Samples the texts, as ids, that it is given for each prompt, which its first id tells."""

    def __init__(self, texts: dict[int, list[int]], *, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size, max_model_len=100_000, num_blocks=500_000)
        self._texts = texts
        self._rows: dict[int, tuple[int, list[int]]] = {}  # length of the prompt, and what follows

    def submit(self, plan: StepPlan) -> "InstantHandle":
        for new in plan.new_rows:
            self._rows[new.row] = new.num_prompt_tokens, self._texts[new.token_ids[0]]
        token_ids = []
        for entry in plan.sampling:
            num_prompt_tokens, text = self._rows[plan.rows[entry]]
            at = plan.num_computed[entry] + plan.num_scheduled[entry] - num_prompt_tokens
            token_ids.append(text[at])
        return InstantHandle(StepResult(plan.step, token_ids))

    def sample(self, step: int, masks: StepMasks | None) -> None:
        pass


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
    executor = PickingExecutor(
        vocab_size=tokenizer.vocab_size, max_model_len=100_000, num_blocks=500_000
    )
    core, server, client = writing_records(executor, tokenizer, num_running)
    encoder = msgspec.msgpack.Encoder()
    best = best_cpu = float("inf")
    for _ in range(num_windows):
        spent, spent_cpu, cpu = executor.spent_s, executor.spent_cpu_s, time.thread_time()
        seconds = timed(core, server, client, encoder, 40) - (executor.spent_s - spent) / 40
        cpu = time.thread_time() - cpu - (executor.spent_cpu_s - spent_cpu)
        best, best_cpu = min(best, seconds), min(best_cpu, cpu / 40)
    return best, best_cpu


def writing_records(
    executor: InstantExecutor, tokenizer: Tokens, num_running: int
) -> tuple[EngineCore, CoreServer, Client]:
    """With so many outputs of `RECORDS` that run."""
    config = EngineConfig.from_kwargs(max_num_seqs=num_running, max_inflight_steps=2)
    info = executor.start()
    core = EngineCore(config, executor, info, GrammarCompiler(tokenizer.to_json, info))
    server = CoreServer(config, f"ipc://{tempfile.mkdtemp()}/core.sock")
    client = server._clients.attach(b"client", time.monotonic())
    wanted = StructuredOutputsParams(json=RECORDS)
    params = SamplingParams(max_tokens=None, ignore_eos=True, structured_outputs=wanted)
    for number in range(num_running):
        core.add(client.client_id, AddRequest(number, [number, *range(1, 99)], params))
    while core.status(epoch="", num_clients=1).num_running < num_running:
        core.step()
    return core, server, client


def records(rng: random.Random, count: int) -> str:
    """The begin of an output of `RECORDS`, with words and blanks as a small model writes them."""
    parts = [
        "ka",
        "mi",
        "ton",
        "er",
        "lan",
        "s",
        "or",
        "The ",
        "New ",
        "ing",
        " 19",
        "é",
        "\\n",
        "-",
    ]

    def text(most: int) -> str:
        return json.dumps("".join(rng.choices(parts, k=rng.randint(1, most))), ensure_ascii=False)

    found = []
    for _ in range(count):
        blank, indent = rng.choice(["", " "]), rng.choice(["", " ", "\n", "\n    ", "\n" + 8 * " "])
        tags = f",{blank}".join(text(4) for _ in range(rng.randint(2, 5)))
        members = {
            **{"name": text(9), "city": text(9), "age": str(rng.randint(0, 120))},
            **{"tags": f"[{tags}]", "married": rng.choice(["true", "false"])},
        }
        spelled = (f"{indent}{json.dumps(key)}:{blank}{one}" for key, one in members.items())
        found.append(f"{{{','.join(spelled)}{indent}}}")
    return f"[{', '.join(found)}"


def text_step_time(num_running: int, *, num_windows: int = 12) -> tuple[float, float]:
    """Seconds per step of sequences that write JSON which a model might write, the best and the
    median; the first windows, in which most is new, are not counted."""
    tokenizer, rng, num_steps = Tokens.load("smollm2"), random.Random(0), 100
    texts = {}
    for number in range(num_running):
        texts[number] = tokenizer.encode(records(rng, num_windows * num_steps // 40))
        assert len(texts[number]) > (num_windows + 1) * num_steps
    executor = WritingExecutor(texts, vocab_size=tokenizer.vocab_size)
    core, server, client = writing_records(executor, tokenizer, num_running)
    encoder = msgspec.msgpack.Encoder()
    windows = [timed(core, server, client, encoder, num_steps) for _ in range(num_windows)]
    assert core.num_unfinished == num_running, "all texts are as the schema has it"
    windows = sorted(windows[num_windows // 3 :])
    return windows[0], windows[len(windows) // 2]


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
    best, median = text_step_time(64)
    print(f"  64 that write JSON texts: {best * 1e6:6.1f} µs a step, median {median * 1e6:6.1f}")


if __name__ == "__main__":
    main()
