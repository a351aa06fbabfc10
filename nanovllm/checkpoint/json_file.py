"""Reads the small JSON files that come with a model, for this room and the tokenizer's files."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file. Raises `ValueError` naming the file if there is no such object."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"model: {path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"model: {path} holds no JSON object: fetch it again")
    return content


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; empty if there is no such file."""
    return read_json(path) if path.is_file() else {}
