"""The core's masks and a worker's copy of their table, through whatever may come between them."""

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
import torch

from nanovllm.core import grammar as grammar_module
from nanovllm.core.grammar import Grammar, GrammarCompiler, Masks, MasksUnderWay, Matcher
from nanovllm.core.kept_masks import SentMasks, Vocabulary
from nanovllm.protocol.plan import StepMasks, num_mask_lines
from nanovllm.sampling_params import StructuredOutputsParams
from nanovllm.worker.sampling.bitmask import MaskTable
from tests.core.fake_executor import VOCAB_SIZE, allowed_ids
from tests.core.places import unkept
from tests.core.vocabulary import make_compiler, with_small_table

MAX_NUM_SEQS, NUM_KEPT = 8, 12
WANTED: list[dict[str, Any]] = [
    {"regex": "([a-z]{1,3} ){1,9}end"},
    {"regex": "[ab]{4,9}"},
    {"choice": ["yes", "no", "perhaps", "perhaps not"]},
    {"json": {"type": "array", "items": {"type": "string", "maxLength": 3}}},
    {"grammar": 'start: "(" start ")" | "[" start "]" | /[0-9]+/'},  # is not followed
    {"regex": "[a-c]+", "after": "x"},
]


class Outputs:
    """Some that go on at random, each beside one whose masks are never kept."""

    def __init__(self, rng: random.Random, *, kept: GrammarCompiler, plain: GrammarCompiler):
        self._rng = rng
        self._grammars = [(self._compile(kept, one), self._compile(plain, one)) for one in WANTED]
        self.pairs = [self._begin() for _ in range(MAX_NUM_SEQS)]

    @staticmethod
    def _compile(compiler: GrammarCompiler, wanted: dict[str, Any]) -> Grammar:
        return compiler.compile(StructuredOutputsParams(**wanted))

    def _begin(self) -> tuple[Matcher, Matcher]:
        place = self._rng.randrange(len(WANTED))
        kept, plain = (self._grammars[place][which].matcher() for which in (0, 1))
        return kept, plain if "after" in WANTED[place] else unkept(plain)

    def go_on(self, places: list[int], masks: list[bytes]) -> None:
        """Each by a token that its mask allows."""
        for place, mask in zip(places, masks, strict=True):
            token_id = self._rng.choice(allowed_ids(mask))
            one, other = self.pairs[place]
            goes_on = one.accept(token_id)
            assert goes_on == other.accept(token_id)
            if not goes_on:
                self.pairs[place] = self._begin()


@pytest.mark.parametrize("worth_a_thread_s", [0.0, 1e9])
@pytest.mark.parametrize("seed", range(4))
def test_a_worker_has_the_masks_of_every_step_that_it_is_sent(
    seed: int, worth_a_thread_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they were kept, overwritten or of one step alone, and after steps of which it got
    nothing."""
    monkeypatch.setattr(grammar_module, "WORTH_A_THREAD_S", worth_a_thread_s)
    rng, seen = random.Random(seed), Counter[str]()
    compiler = with_small_table(make_compiler(), num_kept=NUM_KEPT, num_spare=MAX_NUM_SEQS)
    plain = make_compiler()
    outputs = Outputs(rng, kept=compiler, plain=plain)
    sent = SentMasks(vocab_size=VOCAB_SIZE)
    cpu = torch.device("cpu")
    table = MaskTable(vocab_size=VOCAB_SIZE, max_num_seqs=MAX_NUM_SEQS, device=cpu)
    for _ in range(250):
        places = rng.sample(range(MAX_NUM_SEQS), rng.randint(1, MAX_NUM_SEQS))
        begun = compiler.begin_masks([outputs.pairs[place][0] for place in places])
        rows = plain.compute_masks([outputs.pairs[place][1] for place in places])
        expected = [row.tobytes() for row in rows]
        fate = rng.choices(("comes", "is not sent", "is lost", "fails"), (8, 1, 1, 1))[0]
        seen[fate] += 1
        masks = take(begun, sent, fate)
        if masks is None:
            continue  # all of its sequences have ended meanwhile, or failed
        if fate != "is lost":
            table.take(masks)
            assert [table.words[line].numpy().tobytes() for line in masks.lines] == expected
        if fate != "comes":
            sent.forget()
        seen["nothing new"] += not masks.new_lines
        seen["one line for several"] += len(set(masks.lines)) < len(masks.lines)
        seen["kept"] += sum(line < NUM_KEPT for line in masks.new_lines)
        seen["of one step"] += sum(line >= NUM_KEPT for line in masks.new_lines)
        outputs.go_on(places, expected)
    assert min(seen.values()) > 5 and len(seen) == 8, seen
    assert seen["kept"] > 3 * NUM_KEPT, "lines are overwritten"


def take(begun: MasksUnderWay, sent: SentMasks, fate: str) -> StepMasks | None:
    """A step's masks, as another process reads them."""
    if fate == "is not sent":
        assert begun.exception() is None
        return None
    lines, _, vocabulary = begun.result()
    masks = sent.pack(list(range(len(lines))), lines, vocabulary)
    return msgspec.msgpack.decode(msgspec.msgpack.encode(masks), type=StepMasks)


def test_what_fails_half_way_is_computed_and_sent_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines that were being written have been sent before, with other masks."""
    compiler = with_small_table(make_compiler(), num_kept=4, num_spare=4)
    grammar = compiler.compile(StructuredOutputsParams(**WANTED[4]))
    matchers = [grammar.matcher() for _ in range(4)]
    sent, table = (
        SentMasks(vocab_size=VOCAB_SIZE),
        MaskTable(vocab_size=VOCAB_SIZE, max_num_seqs=4, device=torch.device("cpu")),
    )

    def send(masks: Masks) -> list[list[int]]:
        packed = sent.pack(list(range(len(masks.lines))), masks.lines, masks.vocabulary)
        table.take(packed)
        return [allowed_ids(table.words[line].numpy().tobytes()) for line in packed.lines]

    for matcher in matchers:
        assert matcher.accept(compiler.vocabulary.spelling.index(b"("))
    before = send(compiler.begin_masks(matchers).result())
    for matcher in matchers[1:]:
        assert matcher.accept(compiler.vocabulary.spelling.index(b"7"))
    compute = GrammarCompiler._share_out

    def fail(*arguments: Any) -> None:
        compute(*arguments)
        raise RuntimeError("no masks today")

    with monkeypatch.context() as patched:
        patched.setattr(GrammarCompiler, "_share_out", fail)
        patched.setattr(GrammarCompiler, "_compute_one_by_one", fail)
        assert compiler.begin_masks(matchers).exception() is not None
    after = send(compiler.begin_masks(matchers).result())
    assert after[0] == before[0] and after[1] == after[3] != before[1]


def test_lines_of_one_step_are_behind_all_others() -> None:
    """As many as sequences, in a table of at most 64 MiB where that has room for them."""
    for vocab_size in (100, 1000, 49_152, 151_936, 262_144):
        for max_num_seqs in (1, 64, 256, 1024):
            num_lines = num_mask_lines(vocab_size=vocab_size, max_num_seqs=max_num_seqs)
            num_bytes = num_lines * -(-vocab_size // 32) * 4
            assert num_lines >= 2 * max_num_seqs
            assert num_bytes <= 64 << 20 or num_lines == 2 * max_num_seqs
            assert num_bytes > 63 << 20 or num_lines == 16_384
    assert Vocabulary([], torch.zeros(1).int().numpy(), num_lines=9, num_spare=4).first_spare == 5
