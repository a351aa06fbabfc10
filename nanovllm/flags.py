"""Command-line flags derived from struct fields: name, type, default and help are written once.

`launch` and `cli` use it for `EngineConfig`; any msgspec struct of plain fields will do.
"""

import argparse
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from nanovllm.config import SECTIONS, field_names


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per config field (`max_model_len` → `--max-model-len`), grouped by section."""
    for section, config_type in SECTIONS.items():
        add_struct_flags(parser.add_argument_group(section), config_type)


def config_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The config fields that were given on the command line."""
    values = vars(arguments)
    return {name: values[name] for name in field_names() if name in values}


T = TypeVar("T", bound=msgspec.Struct)


def struct_values(arguments: argparse.Namespace, struct: type[T]) -> T:
    """The struct of the flags that `add_struct_flags` added. `ValueError`: out of range."""
    values = vars(arguments)
    given = {name: values[name] for name in struct.__struct_fields__ if name in values}
    try:
        return msgspec.convert(given, struct)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        raise ValueError(f"{path.rstrip('`')}: {message}") from None


def add_struct_flags(group: Any, struct: type[msgspec.Struct]) -> None:
    """Add a flag per field; those not given stay out of the parsed namespace."""
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        description, options = _options(field.type)
        default = (
            "" if field.default in (None, msgspec.NODEFAULT) else f" (default: {field.default})"
        )
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=(description + default).replace("%", "%%"),
            **options,
        )


def _options(field_type: inspect.Type) -> tuple[str, dict[str, Any]]:
    """A field's description, and what argparse needs to read its value."""
    if isinstance(field_type, inspect.Metadata):
        description = (field_type.extra_json_schema or {}).get("description", "")
        return description, _options(field_type.type)[1]
    if isinstance(field_type, inspect.UnionType):
        inner, *lists = (t for t in field_type.types if not isinstance(t, inspect.NoneType))
        if lists:  # one or several: `str | list[str]`
            return "", {**_options(inner)[1], "nargs": "+"}
        return _options(inner)
    if isinstance(field_type, inspect.BoolType):
        return "", {"action": argparse.BooleanOptionalAction}
    if isinstance(field_type, inspect.LiteralType):
        return "", {"choices": field_type.values}
    if isinstance(field_type, inspect.ListType):
        return "", {**_options(field_type.item_type)[1], "action": "append"}
    kinds = {inspect.IntType: int, inspect.FloatType: float, inspect.StrType: str}
    return "", {
        "type": kinds[type(field_type)],
        "metavar": kinds[type(field_type)].__name__.upper(),
    }
