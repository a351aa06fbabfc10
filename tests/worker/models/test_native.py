"""Whole native steps against the torch decoder with the same weights, layer by layer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from nanovllm.checkpoint.kv_layout import kv_layout
from nanovllm.checkpoint.locate import Checkpoint, locate
from nanovllm.checkpoint.model_size import read_model_size
from nanovllm.checkpoint.quantization import Scheme, choose_scheme
from nanovllm.checkpoint.spec import DecoderSpec
from nanovllm.worker.attention.select import attention_specs, select_attention
from nanovllm.worker.forward_batch import ForwardBatch
from nanovllm.worker.kernels.native import library as native
from nanovllm.worker.kernels.torch.layer_kernels import TorchKernels
from nanovllm.worker.model_runner import Model
from nanovllm.worker.models.decoder import Decoder
from nanovllm.worker.models.native import NativeDecoder, take_as_stored, unsupported
from nanovllm.worker.quant.gguf import reads_packed
from nanovllm.worker.weights import load_weights
from tests.conftest import SIZES, TINY
from tests.worker.attention.decoding import Driver
from tests.worker.quant.layouts import FORMATS, write
from tests.worker.test_weights import wider

if (unusable := native.unusable()) is not None:
    pytest.skip(unusable, allow_module_level=True)

BLOCK_SIZE = 16
MAX_DIVERGENCE = 0.03  # nats, of the mean over a few tokens; 0.005 is usual with tokens in 8 bits
CPU = torch.device("cpu")


@pytest.fixture(params=native.runnable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param, num_threads=2)
    yield str(request.param)
    native.use(native.choose_isa(), num_threads=2)


def batch_of(rows: list[tuple[int, list[int]]], *, num_blocks: int) -> ForwardBatch:
    """rows: positions computed before, and new ids. Each row has `num_blocks` blocks."""
    counts = torch.tensor([len(ids) for _, ids in rows])
    tables = torch.arange(1, len(rows) * num_blocks + 1, dtype=torch.int32).view(len(rows), -1)
    positions = torch.cat([torch.arange(old, old + len(ids)) for old, ids in rows])
    row_of = torch.repeat_interleave(torch.arange(len(rows)), counts)
    blocks = tables[row_of, positions // BLOCK_SIZE].long()
    lengths = [old + len(ids) for old, ids in rows]
    return ForwardBatch(
        input_ids=torch.tensor([token for _, ids in rows for token in ids]),
        positions=positions,
        slot_mapping=blocks * BLOCK_SIZE + positions % BLOCK_SIZE,
        query_start_loc=torch.cat((torch.zeros(1), counts.cumsum(0))).int(),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_tables=tables,
        num_tokens=len(positions),
        num_rows=len(rows),
        num_decode_rows=int((counts == 1).sum()),
        max_query_len=int(counts.max()),
        max_seq_len=max(lengths),
    )


class Loaded:
    """A model of a checkpoint with a cache of its own."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DecoderSpec,
        *,
        dtype: torch.dtype,
        scheme: Scheme | None = None,
    ) -> None:
        specs = attention_specs(spec, block_size=BLOCK_SIZE, dtype=dtype, device=CPU)
        is_native = dtype == torch.bfloat16
        self.attention = select_attention("native" if is_native else "torch", specs)[0]
        model = Decoder(
            spec,
            kernels=TorchKernels(),
            attention=self.attention,
            dtype=dtype,
            device=CPU,
            scheme=scheme,
        )
        model.lay_out(kv_layout(spec))
        if is_native:
            assert unsupported(spec, self.attention) is None
        if is_native:
            take_as_stored(model)
        load_weights(
            model,
            checkpoint,
            load_format="auto",
            seed=0,
            on_progress=lambda phase, progress: None,
            prepacks=not is_native,
        )
        self.model: Model = NativeDecoder(model) if is_native else model
        num_layers = model.layout.layers_per_block
        shape = self.attention.kv_shape(num_layers=num_layers, num_blocks=200)
        self.cache = torch.zeros(shape, dtype=dtype)
        self.driver = Driver(model, self.model, self.cache, BLOCK_SIZE)

    def logits(self, batch: ForwardBatch, wanted: Tensor | None = None) -> Tensor:
        self.attention.prepare(batch)
        return self.model.compute_logits(self.model.forward(batch, self.cache, wanted=wanted))


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """KL of each row's next-token distribution, in nats."""
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


PROMPT = torch.randint(0, 49000, (64,), generator=torch.Generator().manual_seed(3)).tolist()
# A prompt that is long enough for the kernels of many tokens, then single ones beside a chunk.
STEPS = [
    [(0, PROMPT[:36]), (0, PROMPT[5:10])],
    [(36, PROMPT[36:37]), (5, PROMPT[40:44])],
    [(37, PROMPT[37:38]), (9, PROMPT[44:45])],
]


@pytest.fixture(scope="module")
def smollm2() -> tuple[Checkpoint, DecoderSpec]:
    checkpoint = locate("smollm2")
    spec = read_model_size(checkpoint).spec
    return checkpoint, replace(spec, max_position_embeddings=64)


@pytest.fixture(scope="module")
def expected(smollm2: tuple[Checkpoint, DecoderSpec]) -> list[Tensor]:
    """The logits of each step in float32 by torch."""
    exact = Loaded(*smollm2, dtype=torch.float32)
    return [exact.logits(batch_of(rows, num_blocks=4)) for rows in STEPS]


@pytest.mark.model
def test_steps_of_a_stored_model(
    isa: str, smollm2: tuple[Checkpoint, DecoderSpec], expected: list[Tensor]
) -> None:
    quick = Loaded(*smollm2, dtype=torch.bfloat16)
    for rows, logits in zip(STEPS, expected, strict=True):
        batch = batch_of(rows, num_blocks=4)
        found = quick.logits(batch)
        assert divergence(logits, found).mean() < MAX_DIVERGENCE
        # Of the tokens that are asked for only; how many there are may choose other kernels.
        ends = batch.query_start_loc[1:].long() - 1
        assert divergence(found[ends], quick.logits(batch, ends)).mean() < MAX_DIVERGENCE


@pytest.mark.model
def test_weights_are_kept_in_the_size_of_the_file(
    smollm2: tuple[Checkpoint, DecoderSpec],
) -> None:
    model = Loaded(*smollm2, dtype=torch.bfloat16).model
    assert isinstance(model, NativeDecoder)
    assert model.weight_bytes < 1.01 * smollm2[0].path.stat().st_size
    assert "210 Q4_1, 1 Q8_0" in model.describe()


# What each has that plain ones have not: norms of heads or of all heads, biases, windows in groups
# of blocks of their own, norms behind blocks, caps, multipliers, growing queries, tokens without
# positions.
FAMILIES = ["llama3", "llama_linear", "llama_yarn", "mistral", "qwen2", "qwen2_windows", "qwen3"]
FAMILIES += ["gemma2", "gemma3", "gemma3_seeing", "olmo2", "olmo3", "phi3", "glm4", "smollm3"]
FAMILIES += ["granite_tied", "ministral3"]


def of_family(name: str, path: Path) -> Checkpoint:
    """A small random model in bfloat16, of widths that native products take."""
    model_class, config_class, changes = TINY[name]
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96} | changes
    if name == "gemma3_seeing":
        sizes |= {"final_logit_softcapping": 2.0}
    model = model_class(config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms begin as ones, biases as zeros
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.bfloat16().save_pretrained(path)
    return Checkpoint(path, "safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_of_families(isa: str, name: str, tmp_path: Path) -> None:
    """Nearer to float32 than plain torch in bfloat16 is, as what lies between products is not
    rounded: of a prompt, then of chunks and single tokens beside each other."""
    checkpoint = of_family(name, tmp_path)
    spec = replace(read_model_size(checkpoint).spec, max_position_embeddings=64)
    exact, quick = (
        Loaded(checkpoint, spec, dtype=dtype).driver for dtype in (torch.float32, torch.bfloat16)
    )
    plain = Driver.load(checkpoint, dtype=torch.bfloat16, block_size=BLOCK_SIZE)
    ids = [token % 160 for token in PROMPT]
    steps: list[tuple[dict[str, list[int]], Tensor | None]] = [
        ({"a": ids[:40], "b": ids[5:10]}, None),
        ({"a": ids[40:41], "b": ids[40:44]}, None),
        ({"a": ids[41:42], "b": ids[44:45], "c": ids[:9]}, torch.tensor([0, 1, 7])),
    ]
    of_native = of_torch = 0.0
    for new, wanted in steps:
        expected, found, rounded = (
            driver.run_batch(new, wanted=wanted) for driver in (exact, quick, plain)
        )
        of_native += float(divergence(expected, found).mean())
        of_torch += float(divergence(expected, rounded).mean())
    assert of_native < of_torch < MAX_DIVERGENCE


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_moe", "a layer has experts"),
        ("cohere2", "side by side"),
        ("gemma4", "keys of layers differ in size"),
        ("gemma3_old", "attention is not native"),
    ],
)
def test_what_has_no_native_steps(name: str, reason: str, tmp_path: Path) -> None:
    spec = read_model_size(of_family(name, tmp_path)).spec
    specs = attention_specs(spec, block_size=BLOCK_SIZE, dtype=torch.bfloat16, device=CPU)
    assert reason in str(unsupported(spec, select_attention("auto", specs)[0]))


PACKED = ["awq 32", "gptq 4 32", "compressed 4 32 symmetric", "compressed 4 32 zeros"]
PACKED += ["compressed 8 32 symmetric", "gptq 4 all inputs", "compressed 8 channel"]


@pytest.mark.parametrize("name", PACKED)
def test_packed_weights_are_multiplied_as_blocks_of_gguf(name: str, tmp_path: Path) -> None:
    """In every layer; a step's distribution is that of the same weights in plain torch."""
    (source := tmp_path / "plain").mkdir()
    write(wider("llama", source), tmp_path, *FORMATS[name])
    checkpoint = Checkpoint(tmp_path, "safetensors")
    scheme = choose_scheme(None, checkpoint.config())
    assert scheme is not None and reads_packed(scheme)
    spec = replace(read_model_size(checkpoint).spec, max_position_embeddings=64)
    plain, packed = (
        Loaded(checkpoint, spec, dtype=dtype, scheme=scheme)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert isinstance(packed.model, NativeDecoder)
    kind = {"gptq 4 all inputs": "Q4_1", "compressed 4 32 symmetric": "Q4_0"}.get(name, "Q4_1")
    kind = "Q8_0" if " 8 " in name else kind
    assert f"{2 * 3 + 5 * 3} {kind}" in packed.model.describe()
    for rows in STEPS:
        ids = [(old, [token % 160 for token in new]) for old, new in rows]
        batch = batch_of(ids, num_blocks=4)
        expected, found = plain.logits(batch), packed.logits(batch)
        assert divergence(expected, found).mean() < MAX_DIVERGENCE


def test_packed_weights_without_a_type_of_gguf() -> None:
    for name in ("gptq 8 32", "gptq 4 ordered", "fp8 blocks 32", "awq 16"):
        scheme = choose_scheme(None, {"quantization_config": FORMATS[name][0]})
        assert scheme is not None and not reads_packed(scheme)
    assert not reads_packed(Scheme.at_load("fp8"))
    assert reads_packed(Scheme.at_load("int4")) and reads_packed(Scheme.at_load("int8"))
