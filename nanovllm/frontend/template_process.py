"""The process in which chat templates run: a template is untrusted code.

`ChatTemplate` starts it and may kill it. Its standard input is a socket: first comes the template's
source, then a mapping of variables for each prompt, in MessagePack; each is answered. Jinja's
sandbox with what Hugging Face promises to template writers (transformers' chat templating docs),
within limits on memory and processor time.
"""

import contextlib
import json
import resource
import time
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanovllm.frontend.child_process import parent, receive, send

MAX_MEMORY_BYTES = 1 << 30
MAX_CPU_S = 2  # of one prompt; thousands of messages take tenths
MAX_RENDERED_CHARS = 1 << 23


class Rendered(msgspec.Struct, frozen=True, array_like=True):
    """The prompt, or why there is none. is_template_fault: whatever the messages were."""

    text: str = ""
    error: str | None = None
    is_template_fault: bool = False


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Jinja's own `tojson` would escape HTML characters, which no model has been trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _compile(source: str) -> jinja2.Template | Rendered:
    try:
        return _environment().from_string(source)
    except Exception as error:  # a source may be wrong in any way: too deep, too large, no template
        return Rendered(error=str(error) or type(error).__name__, is_template_fault=True)


def _render(template: jinja2.Template, variables: dict[str, Any]) -> Rendered:
    try:
        text = template.render(variables)
    except Exception as error:  # likewise: division by zero, recursion, a type it did not expect
        return Rendered(error=str(error) or type(error).__name__)
    if len(text) > MAX_RENDERED_CHARS:
        most = f"at most {MAX_RENDERED_CHARS} are allowed"
        return Rendered(error=f"the prompt would have {len(text)} characters: {most}")
    return Rendered(text)


def _grant_time() -> None:
    """From now on; beyond, the system kills this process."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time()) + 1 + MAX_CPU_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def main() -> None:
    """Serve until the other side closes."""
    channel = parent()
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    with contextlib.suppress(ConnectionError):
        source = receive(channel)
        if source is None:
            return
        _grant_time()
        template = _compile(source.decode("utf-8", "surrogatepass"))
        while (frame := receive(channel)) is not None:
            _grant_time()
            if isinstance(template, Rendered):
                answer = template
            else:
                answer = _render(template, msgspec.msgpack.decode(frame))
            send(channel, msgspec.msgpack.encode(answer))


if __name__ == "__main__":
    main()
