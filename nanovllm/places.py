"""Where this program keeps files of its own, by the XDG Base Directory specification.

Nothing is made here: whoever writes makes the directory, for this user alone.
"""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Of models: $NANOVLLM_CACHE, else nanovllm/ in the user's cache directory."""
    if own := os.environ.get("NANOVLLM_CACHE"):
        return Path(own).expanduser()
    return _base("XDG_CACHE_HOME", "~/.cache") / "nanovllm"


def state_directory() -> Path:
    """Of logs and histories: nanovllm/ in the user's state directory."""
    return _base("XDG_STATE_HOME", "~/.local/state") / "nanovllm"


def _base(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or default).expanduser()
