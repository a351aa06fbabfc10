"""The command line's parser, and flags derived from struct fields: name, type, default and help
are written once. `launch` and `cli` use it for `EngineConfig`; any struct of plain fields will do.

What is not given as a flag is looked for in `--config FILE`, then in the environment.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
from msgspec import inspect

from nanovllm.config import SECTIONS, field_names

USAGE_ERROR = 2
MODEL = "MODEL"
VARIABLE = "NANOVLLM_{name}"
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
# The config fields that `--help` shows; `--help=all` shows the others too.
COMMON = {
    *("model", "tokenizer", "dtype", "quantization", "max_model_len", "device", "threads", "seed"),
    *("gpu_memory_utilization", "kv_cache_dtype", "max_num_seqs", "tensor_parallel_size"),
    "log_level",
}


class Parser(argparse.ArgumentParser):
    """It says in one line what is wrong, and shows rare flags to those who ask for all."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, add_help=False, formatter_class=_formatter)
        text = "show this; --help=all: every flag"
        self.add_argument("-h", "--help", action=_Help, nargs="?", choices=["all"], help=text)
        self.rare: list[argparse.Action] = []
        self.variables: list[argparse.Action] = []  # those that the environment may set

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(  # type: ignore[override]  # typeshed wants each overload
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Of this parser's own words. What it does not know is an error here, and not the caller's:
        a command's parser knows what the user may have meant."""
        given = list(sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(self._with_settings(given), namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        if (named := getattr(parsed, MODEL, None)) is not None:
            if any(word.partition("=")[0] == "--model" for word in given):
                self.error("model: it is named twice: give MODEL or --model")
            parsed.model = named
        return parsed, unknown

    def print_help(self, file: Any = None, *, whole: bool = False) -> None:
        positionals = argparse.HelpFormatter(self.prog)
        positionals.add_usage(None, self._get_positional_actions(), [])
        words = positionals.format_help().removeprefix("usage: ").strip()
        self.usage = words.replace(self.prog, f"{self.prog} [FLAG ...]", 1).replace("%", "%%")
        if not whole and self.rare:
            self.epilog = f"{len(self.rare)} more flags: {self.prog} --help=all"
            for action in self.rare:
                action.help = argparse.SUPPRESS
        super().print_help(file)

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"{word!r} is one word too many: put quotes around a text of several"
        flag = word.partition("=")[0]
        known = [name for action in self._actions for name in action.option_strings]
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
        return f"no flag {flag}" + (f": did you mean {near[0]}?" if near else "")

    def _with_settings(self, given: list[str]) -> list[str]:
        """The flags that the environment and the file stand for, and then those given."""
        words: list[str] = []
        for action in self.variables:
            if (text := os.environ.get(VARIABLE.format(name=action.dest.upper()))) is not None:
                words += _flag(action, _of_text(action, text))
        flags = {action.dest: action for action in self._actions if action.option_strings}
        if "config" not in flags:
            return given
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", nargs="?")
        file = finder.parse_known_args(given)[0].config
        if file is not None:
            for name, value in self._read(Path(file), known=flags.keys()).items():
                words += _flag(flags[name], value)
        # Behind flags of several values another flag must stand: they would take a MODEL too.
        return [*words, f"--config={file or ''}", *given] if words else given

    def _read(self, path: Path, *, known: Collection[str]) -> dict[str, Any]:
        """A file's settings by field name."""
        import yaml

        try:
            found = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(f"--config {path}: cannot be read: {' '.join(str(error).split())}")
        if not isinstance(found, dict):
            self.error(f"--config {path}: it must hold lines of `flag: value`")
        settings = {str(name).replace("-", "_"): value for name, value in found.items()}
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                remedy = f"did you mean {near[0]!r}?" if near else "it is no flag of this command"
                self.error(f"--config {path}: {name!r}: {remedy}")
        return {name: value for name, value in settings.items() if value is not None}


def _formatter(prog: str) -> argparse.HelpFormatter:
    """In colours on a terminal: Python's own from 3.14 on, before with the extra `shell`."""
    if sys.version_info < (3, 14) and sys.stdout.isatty():
        with suppress(ModuleNotFoundError):
            from rich_argparse import RichHelpFormatter

            coloured = RichHelpFormatter(prog)
            coloured.group_name_formatter = str
            coloured.text_markup = coloured.help_markup = False  # there are brackets in texts
            formatter: argparse.HelpFormatter = coloured
            return formatter
    return argparse.HelpFormatter(prog)


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        parser.print_help(whole=values == "all")
        parser.exit()


def _flag(action: argparse.Action, value: Any) -> Iterator[str]:
    """The words that set it."""
    flag = action.option_strings[0]
    if isinstance(action, argparse.BooleanOptionalAction) and isinstance(value, bool):
        yield action.option_strings[0 if value else 1]
    elif isinstance(value, list) and action.nargs is not None:
        yield from (flag, *map(str, value))
    else:
        for one in value if isinstance(value, list) else [value]:
            yield f"{flag}={one}"


def _of_text(action: argparse.Action, text: str) -> Any:
    truths = {"1": True, "true": True, "0": False, "false": False}
    if isinstance(action, argparse.BooleanOptionalAction):
        return truths.get(text.lower(), text)
    return text


def count(text: str) -> int:
    """For `type=` of a flag: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


count.__name__ = "number"  # as argparse calls what it could not read


def size(text: str) -> int:
    """For `type=` of a flag: bytes, also as `512M` or `1.5GiB` (a K is 1024)."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: say 4G, 512M or a number of bytes")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """MODEL, which is the same as --model."""
    parser.add_argument(MODEL, nargs="?", help="the same as --model")


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per config field (`max_model_len` → `--max-model-len`), grouped by section."""
    text = "a YAML file of `flag: value`; flags given here count more"
    parser.add_argument("--config", metavar="FILE", help=text)
    for section, config_type in SECTIONS.items():
        actions = add_struct_flags(parser.add_argument_group(section), config_type)
        if isinstance(parser, Parser):
            parser.rare += [action for action in actions if action.dest not in COMMON]
            parser.variables += actions


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


def add_struct_flags(group: Any, struct: type[msgspec.Struct]) -> list[argparse.Action]:
    """Add a flag per field; those not given stay out of the parsed namespace."""
    actions = []
    info = inspect.type_info(struct)
    assert isinstance(info, inspect.StructType)
    for field in info.fields:
        description, options = _options(field.type)
        default = (
            "" if field.default in (None, msgspec.NODEFAULT) else f" (default: {field.default})"
        )
        if field.name.endswith("_bytes"):
            options |= {"type": size, "metavar": "SIZE"}
        action = group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=(description + default).replace("%", "%%"),
            **options,
        )
        actions.append(action)
    return actions


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
