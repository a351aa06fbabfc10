"""Whose key it is decides what is counted for whom, and who learns what of whom."""

import logging
from pathlib import Path
from typing import Any

import pytest

from nanovllm.frontend.server.api_keys import ApiKey, ApiKeys, read_keys
from nanovllm.limits import MAX_NAME_CHARS
from nanovllm.protocol.messages import AddRequest
from tests.frontend.server.served import served


def key_file(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "keys"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = key_file(tmp_path, "# ours\nann s3cret # first\n\nbare\nbob.2 other\n")
    found = read_keys(path)
    assert [(one.name, one.key) for one in found] == [
        ("ann", "s3cret"),
        ("key-4", "bare"),
        ("bob.2", "other"),
    ]
    assert "s3cret" not in repr(found)


@pytest.mark.parametrize(
    ("text", "mode", "complaint"),
    [
        ("ann s3cret", 0o644, "chmod 600"),
        ("", 0o600, "holds no key"),
        ("ann s3cret more", 0o600, "line 1"),
        ("an/n s3cret", 0o600, "line 1"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, mode: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        read_keys(key_file(tmp_path, text, mode))
    assert "s3cret" not in str(error.value)


def test_whose_key_it_is() -> None:
    keys = ApiKeys([ApiKey("ann", "a"), ApiKey("bob", "ü")])
    assert keys.owner("Bearer a") == "ann" and keys.owner("bearer  ü ") == "bob"
    for wrong in ("", "a", "Basic a", "Bearer", "Bearer aa", "Bearer ann"):
        assert keys.owner(wrong) is None
    assert not ApiKeys([])


@pytest.mark.parametrize(
    ("text", "settings", "tenants", "salts"),
    [
        ("ann A\nbob B", {}, ["ann", "bob"], ["ann\ns", "bob\ns"]),
        ("ann A\nbob B", {"isolate_cache": False}, ["ann", "bob"], ["s", "s"]),
        ("ann A", {}, ["me"], ["s"]),
        ("ann A", {"isolate_cache": True}, ["me"], ["ann\ns"]),
    ],
)
async def test_tenants_and_salts(
    address: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    text: str,
    settings: dict[str, Any],
    tenants: list[str],
    salts: list[str],
) -> None:
    path = str(key_file(tmp_path, text))
    with caplog.at_level(logging.DEBUG):
        async with served(address, api_key_file=path, access_log=True, **settings) as server:
            for key in ["A", "B"][: len(tenants)]:
                answer = await server.client.post(
                    "/v1/completions",
                    headers={"authorization": f"Bearer {key}"},
                    json={"prompt": "hi", "user": "me", "cache_salt": "s"},
                )
                assert answer.status_code == 200
            assert (await server.complete()).status_code == 401
            asked = server.core.all_of(AddRequest)
            assert [one.tenant for one in asked] == tenants
            assert [one.cache_salt for one in asked] == salts
            metrics = (await server.client.get("/metrics")).text
            assert 'nanovllm:api_key_requests_total{key="ann"} 1.0' in metrics
    assert "Bearer" not in caplog.text


async def test_a_salt_of_the_longest_kind_has_room_for_the_name_of_a_key(
    address: str, tmp_path: Path
) -> None:
    path, salt = str(key_file(tmp_path, "ann A\nbob B")), "s" * MAX_NAME_CHARS
    async with served(address, api_key_file=path) as server:
        for status, given in ((200, salt), (400, salt + "s")):
            answer = await server.client.post(
                "/v1/completions",
                headers={"authorization": "Bearer A"},
                json={"prompt": "hi", "cache_salt": given},
            )
            assert answer.status_code == status, answer.text
        (asked,) = server.core.all_of(AddRequest)
        assert asked.cache_salt == f"ann\n{salt}"
