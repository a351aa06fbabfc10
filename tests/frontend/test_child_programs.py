"""The programs behind `ChildProcess`, run here: what each limits itself to, and answers."""

import itertools
import json
import resource
import signal
import socket
from datetime import datetime
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from tokenizers import processors

from nanovllm.frontend import child_process, encoding_process, template_process
from nanovllm.frontend.child_process import receive, send
from nanovllm.frontend.encoding_process import LongText
from nanovllm.frontend.server import body_trial
from nanovllm.frontend.server.body_trial import NICENESS, BodyFacts, Refusal, Trial
from nanovllm.frontend.template_process import MAX_MEMORY_BYTES, Rendered
from tests.frontend.fake_core import INFO
from tests.frontend.vocabulary import BOS, fast_tokenizer

PROCESS_TIME_S = 3.7


class Program:
    """Runs the `main` of a module on frames that are sent to it, and notes what it sets up."""

    def __init__(self, module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[Any] = []
        self._main = module.main
        self._ours, self._theirs = socket.socketpair()
        stubs = {
            "socket": SimpleNamespace(socket=lambda fileno: {0: self._theirs}[fileno]),
            "signal": SimpleNamespace(
                SIGINT=signal.SIGINT, SIG_IGN=signal.SIG_IGN, signal=self._note
            ),
            "resource": SimpleNamespace(
                **{name: getattr(resource, name) for name in dir(resource) if name[:2] == "RL"},
                getrlimit=lambda kind: (5, {resource.RLIMIT_CPU: 99}[kind]),
                setrlimit=self._note,
            ),
            "time": SimpleNamespace(process_time=lambda: PROCESS_TIME_S),
            "os": SimpleNamespace(nice=lambda by: self._note("nice", by)),
            "gc": SimpleNamespace(freeze=lambda: self._note("freeze")),
        }
        for one, name in itertools.product((module, child_process), stubs):
            if hasattr(one, name):
                monkeypatch.setattr(one, name, stubs[name])

    def _note(self, *what: Any) -> None:
        self.done.append(what)

    def answers(self, *frames: bytes) -> list[bytes]:
        """To all of them, after which nobody waits for more."""
        with self._ours:
            with self._theirs:
                for frame in frames:
                    send(self._ours, frame)
                self._ours.shutdown(socket.SHUT_WR)
                self._main()
            found = []
            while (answer := receive(self._ours)) is not None:
                found.append(answer)
            return found


IGNORES_CTRL_C = (signal.SIGINT, signal.SIG_IGN)
NO_CORE = (resource.RLIMIT_CORE, (0, 0))
TEMPLATE_LIMITS = [IGNORES_CTRL_C, NO_CORE, (resource.RLIMIT_AS, (MAX_MEMORY_BYTES,) * 2)]
CPU = (resource.RLIMIT_CPU, (3 + 1 + 2, 99))


def rendered(monkeypatch: pytest.MonkeyPatch, source: str, *prompts: dict[str, Any]) -> Any:
    program = Program(template_process, monkeypatch)
    found = program.answers(source.encode(), *map(msgspec.msgpack.encode, prompts))
    assert program.done == TEMPLATE_LIMITS + [CPU] * (1 + len(prompts))
    return [msgspec.msgpack.decode(one, type=Rendered) for one in found]


def test_each_prompt_of_a_template_has_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [{"x": "a"}, {"x": "b"}]
    assert rendered(monkeypatch, "{{ x }}!", *prompts) == [Rendered("a!"), Rendered("b!")]


def test_a_template_that_is_wrong_fails_every_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = rendered(monkeypatch, "{% for", {}, {})
    assert first == second and first.error and first.is_template_fault and not first.text


def test_what_a_template_raises_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{{ raise_exception(x) if x is defined else 1 / 0 }}"
    found = rendered(monkeypatch, source, {"x": "no"}, {"x": ""}, {})
    assert [one.error for one in found] == ["no", "TemplateError", "division by zero"]
    assert not any(one.is_template_fault or one.text for one in found)


def test_a_prompt_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "MAX_RENDERED_CHARS", 4)
    fits, exceeds = rendered(monkeypatch, "{{ x }}", {"x": "abcd"}, {"x": "abcde"})
    assert fits == Rendered("abcd") and "would have 5 characters: at most 4" in exceeds.error


def test_templates_have_what_hugging_face_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "{% generation %}\n  {% for i in [1, 2, 3] %}\n{% if i == 2 %}{% break %}{% endif %}"
        "{{ i }}{% endfor %}{% endgeneration %}\n"
        "{{ x | tojson }}{{ x | tojson(indent=1) | length }}{{ strftime_now('%Y') }}"
    )
    value = {"a": "<é>"}
    (found,) = rendered(monkeypatch, source, {"x": value})
    shown = json.dumps(value, ensure_ascii=False)
    long = len(json.dumps(value, ensure_ascii=False, indent=1))
    assert found == Rendered(f"1{shown}{long}{datetime.now():%Y}")


@pytest.mark.parametrize("module", [template_process, encoding_process, body_trial])
def test_who_is_asked_nothing_ends(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program(module, monkeypatch)
    assert program.answers() == []
    assert program.done[0] == IGNORES_CTRL_C and NO_CORE in program.done
    assert CPU not in program.done


def test_texts_are_encoded_as_they_are_asked_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fast_tokenizer()
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    program = Program(encoding_process, monkeypatch)
    wanted = [LongText("ab", False), LongText("ab", True)]
    found = program.answers(fast.to_str().encode(), *map(msgspec.msgpack.encode, wanted))
    assert [msgspec.msgpack.decode(one) for one in found] == [[97, 98], [BOS, 97, 98]]
    assert program.done == [IGNORES_CTRL_C, NO_CORE]


def test_bodies_are_checked_behind_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that comes in part is none."""
    trial = msgspec.msgpack.encode(Trial("CompletionBody", BodyFacts(INFO, None)))
    program = Program(body_trial, monkeypatch)
    found = program.answers(trial, b'{"prompt": "x"}', trial, b'{"prompt": 1.5}', trial)
    good, bad = (msgspec.msgpack.decode(one, type=Refusal | None) for one in found)
    assert good is None and bad is not None and bad.status == 400
    assert program.done == [IGNORES_CTRL_C, NO_CORE, ("nice", NICENESS), ("freeze",)]
