"""The synchronous engine: order, shapes of arguments, Ctrl-C, and no core left behind."""

import asyncio
import gc
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from nanovllm.frontend.errors import EngineDeadError
from nanovllm.frontend.llm import LLM
from nanovllm.protocol.messages import (
    Abort,
    AddRequest,
    Call,
    CallResult,
    CoreFailed,
    Finished,
    FromCore,
    Outputs,
    ToCore,
)
from nanovllm.sampling_params import SamplingParams
from tests.frontend.attached import Handle
from tests.frontend.fake_core import STATUS, FakeCore, echo, silent
from tests.frontend.vocabulary import EOS

GREEDY = SamplingParams(temperature=0)


def make_llm(**fields: Any) -> LLM:
    return LLM("m", load_format="dummy", **fields)


@pytest.fixture
def core(address: str) -> Iterator[FakeCore]:
    with FakeCore(address, echo) as core:
        yield core


@pytest.fixture
def llm(core: FakeCore, handle: Handle) -> Iterator[LLM]:
    with make_llm() as llm:
        yield llm


def in_reverse(message: ToCore) -> Iterable[FromCore]:
    """Of three requests the last ends first."""
    if isinstance(message, AddRequest):
        if message.number == 2:
            for number in (2, 1, 0):
                yield Outputs(
                    [number], [65 + number], finished=[Finished(number, "length", None, 0)]
                )
    else:
        yield from silent(message)


def test_outputs_are_in_the_order_of_the_prompts(address: str, handle: Handle) -> None:
    with FakeCore(address, in_reverse), make_llm() as llm:
        outputs = llm.generate(["a", {"prompt": "b"}, [99]], GREEDY, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == ["A", "B", "C"]
    assert [output.prompt for output in outputs] == ["a", "b", None]
    assert all(output.finished for output in outputs)


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        ("hi", ["hi"]),
        (["hi"], ["hi"]),
        ({"prompt": "hi"}, ["hi"]),
        ([104, 105], ["hi"]),
        ([[104, 105], [104]], ["hi", "h"]),
        ([{"prompt_token_ids": [104]}, "hi"], ["h", "hi"]),
        ([], []),
    ],
)
def test_one_prompt_or_many(llm: LLM, prompts: Any, texts: list[str]) -> None:
    outputs = llm.generate(prompts, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == texts


def test_params_and_priorities_for_all_or_for_each(llm: LLM, core: FakeCore) -> None:
    each = [SamplingParams(max_tokens=3, n=2), SamplingParams(max_tokens=4, output_kind="delta")]
    outputs = llm.generate(["ab", "cd"], each, use_tqdm=False, priority=[5, -5])
    assert [[one.text for one in output.outputs] for output in outputs] == [["ab", "ab"], ["cd"]]
    first, second = core.all_of(AddRequest)
    assert (first.params.max_tokens, first.priority) == (3, 5)
    assert (second.params.max_tokens, second.priority) == (4, -5)
    for arguments in ({"sampling_params": each[:1]}, {"priority": [1, 2, 3]}):
        with pytest.raises(ValueError, match="entries for 2 prompts"):
            llm.generate(["ab", "cd"], use_tqdm=False, **arguments)


def test_one_mistake_and_nothing_is_sent(llm: LLM, core: FakeCore) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        llm.generate(["fine", [300]], use_tqdm=False)
    assert core.all_of(AddRequest) == []
    assert llm.generate("ok", use_tqdm=False)[0].outputs[0].text == "ok"


def test_chat_with_one_or_several(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    (alone,) = llm.chat(conversation, use_tqdm=False)
    assert alone.prompt == "user:hi|" == alone.outputs[0].text
    several = llm.chat([conversation, conversation * 2], use_tqdm=False)
    assert [output.prompt for output in several] == ["user:hi|", "user:hi<eos>user:hi|"]
    assert EOS in several[1].prompt_token_ids


def test_the_bar_can_be_had_or_not(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], use_tqdm=False)
    assert capsys.readouterr().err == ""
    llm.generate(["a", "b"])
    assert "2/2" in capsys.readouterr().err


def test_stats_reset_and_facts(address: str, handle: Handle) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        yield from silent(message)
        yield STATUS
        if isinstance(message, Call):
            yield CallResult(message.call_id, result=False)

    with FakeCore(address, script), make_llm() as llm:
        assert llm.stats() == STATUS and llm.reset_prefix_cache() is False
        assert llm.vocab_size == 300 and llm.info.served_model_name == "fake"
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None and tokenizer.encode("a") == [97]


async def test_it_works_where_a_loop_is_running(llm: LLM) -> None:
    assert asyncio.get_running_loop().is_running()
    assert llm.generate("nested", use_tqdm=False)[0].outputs[0].text == "nested"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also in a run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_aborts_and_leaves_it_usable(address: str, handle: Handle) -> None:
    def script(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest) and message.number < 2:
            return []
        return echo(message)

    def interrupt() -> None:
        core.wait_for(AddRequest, 2)
        os.kill(os.getpid(), signal.SIGINT)

    with FakeCore(address, script) as core, make_llm() as llm:
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a", "b"], use_tqdm=False)
        thread.join()
        core.wait_for(Abort, 2)
        assert sorted(n for abort in core.all_of(Abort) for n in abort.numbers) == [0, 1]
        assert llm.generate("ok", use_tqdm=False)[0].outputs[0].text == "ok"


def test_death_reaches_the_caller(address: str, handle: Handle) -> None:
    def fail(message: ToCore) -> Iterable[FromCore]:
        if isinstance(message, AddRequest):
            return [CoreFailed("out of memory", "")]
        return silent(message)

    with FakeCore(address, fail), make_llm() as llm:
        with pytest.raises(EngineDeadError, match="out of memory"):
            llm.generate(["a", "b"], use_tqdm=False)
        with pytest.raises(EngineDeadError, match="out of memory"):
            llm.stats()


def test_a_closed_one_says_so(llm: LLM, handle: Handle) -> None:
    llm.close()
    llm.close()
    assert handle.closed == 1
    with pytest.raises(RuntimeError, match="closed"):
        llm.stats()
    assert not [thread for thread in threading.enumerate() if thread.name == "nanovllm"]


def test_one_that_is_dropped_takes_its_core_along(core: FakeCore, handle: Handle) -> None:
    llm = make_llm()
    assert llm.generate("ok", use_tqdm=False)
    assert handle.closed == 0
    del llm
    gc.collect()
    assert handle.closed == 1


def test_a_failed_start_leaves_nothing(address: str, handle: Handle) -> None:
    with (
        FakeCore(address, lambda message: [CoreFailed("no room", "", usage=True)]),
        pytest.raises(ValueError, match="no room"),
    ):
        make_llm()
    assert handle.closed == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "nanovllm"]


HELLO = {"role": "user", "content": "Hello"}


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda llm: llm.generate(5), "prompt must be"),
        (lambda llm: llm.generate(None), "prompt must be"),
        (lambda llm: llm.generate(["a", 5.5]), "prompt must be"),
        (lambda llm: llm.generate("a", {"max_tokens": 5}), r"SamplingParams\(\*\*params\)"),
        (lambda llm: llm.generate("a", "greedy"), "sampling_params"),
        (lambda llm: llm.generate(["a"], [{"n": 1}]), r"SamplingParams\(\*\*params\)"),
        (lambda llm: llm.chat("Hello"), r"messages must be a list such as \[\{'role'"),
        (lambda llm: llm.chat(HELLO), "messages must be a list"),
        (lambda llm: llm.chat(["Hello"]), "messages must be a list"),
        (lambda llm: llm.chat([HELLO, "x"]), r"messages\[1\] must be a dict"),
        (lambda llm: llm.chat([{"role": "robot", "content": "x"}]), r"messages\[0\].role.*robot"),
        (lambda llm: llm.chat([{"content": "x"}]), r"messages\[0\].role"),
        (
            lambda llm: llm.chat([{"role": "user", "content": [{"type": "image_url"}]}]),
            r"messages\[0\].content of type 'image_url': this model reads text only",
        ),
        (lambda llm: llm.chat([{"role": "user", "content": 5}]), r"messages\[0\].content"),
    ],
)
def test_what_cannot_be_names_its_field_and_the_remedy(
    llm: LLM, core: FakeCore, call: Any, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        call(llm)
    assert not core.all_of(AddRequest)
    assert llm.generate("ok", GREEDY, use_tqdm=False)[0].outputs[0].text == "ok"


def test_contents_of_several_texts_are_joined(llm: LLM) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (output,) = llm.chat([{"role": "user", "content": parts}], use_tqdm=False)
    assert output.prompt == "user:a\nb|"


def test_after_a_fork_it_raises_instead_of_waiting(llm: LLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            llm.generate("a", use_tqdm=False)
        except RuntimeError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            llm.close()  # ends nothing that is not its own
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert llm.generate("ok", use_tqdm=False)[0].outputs[0].text == "ok"
