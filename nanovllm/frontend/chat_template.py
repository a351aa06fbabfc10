"""Chat templates: Jinja programs, shipped with a model, that turn messages into a prompt.

Called by `Tokenizer`. Templates are foreign code, so they run in Jinja's sandbox, with exactly the
environment that Hugging Face promises to template writers (transformers' chat templating docs).
"""

import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]


class ChatTemplate:
    """A compiled template. Raises `ValueError` if `source` is not one."""

    def __init__(self, source: str) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template does not compile: {error}") from None

    def render(self, messages: list[Message], **variables: Any) -> str:
        """The prompt. Raises `ValueError` with the template's own words if it refuses."""
        try:
            return self._template.render(messages=messages, **variables)
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"messages do not suit the model's chat template: {error}") from None


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
