"""Credentials stay out of URLs, error texts, tracebacks, and everything that a saver writes."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from spotspeed.errors import ConfigError, StorageError
from spotspeed.storage import open_storage
from spotspeed.storage.fsspec_backend import FsspecStorage
from spotspeed.storage.redaction import redact
from tests.distributed.saver_ranks import RankProcess, check_sealed, wait_gone

SECRET = "qV7+Zp3/planted/0secret0WQ="


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET.replace('/', '')}@host/run",
        f"az://container/run?sv=2024&sig={SECRET}",
        f"https://bucket.s3.amazonaws.com/run?X-Amz-Signature={SECRET}",
        f"s3://bucket/run?aws_secret_access_key={SECRET}",
    ],
)
def test_a_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(ConfigError, match="carries credentials") as caught:
        open_storage(url)
    assert "planted" not in str(caught.value) and "***" in str(caught.value)


def test_a_url_may_name_the_container_before_the_host() -> None:
    assert redact("abfs://container@account.dfs.core.windows.net/run").count("*") == 0


@pytest.mark.parametrize(
    "text",
    [
        f"AccountName=a;AccountKey={SECRET};EndpointSuffix=x",
        f"GET https://h/k?sig={SECRET}&sv=1",
        f"Authorization: Bearer {SECRET}",
        f'{{"private_key": "{SECRET}"}}',
        "key AKIAPLANTED234567890 is not known",
    ],
)
def test_what_looks_like_a_credential_is_redacted(text: str) -> None:
    assert "planted" not in redact(text).lower() and "***" in redact(text)


def test_an_error_that_quotes_this_process_s_secret_shows_it_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a client says about its request, in its text or in that of a cause."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    import fsspec

    class Talkative(fsspec.AbstractFileSystem):
        protocol = "talkative"

        def _refuse(self, *_: object, **__: object) -> None:
            try:
                raise ValueError(f"signed with {SECRET}")
            except ValueError as error:
                raise RuntimeError(f"the store refused the key {SECRET}") from error

        cat_file = pipe_file = ls = info = exists = _open = _refuse

    fsspec.register_implementation("talkative", Talkative, clobber=True)
    storage = FsspecStorage("talkative://bucket/run")
    for action in (
        lambda: storage.get("a", 10),
        lambda: storage.put("a", b"x"),
        storage.list,
        lambda: storage.create("a", b"x"),
    ):
        with pytest.raises(StorageError) as caught:
            action()
        shown = "".join(traceback.format_exception(caught.value))
        assert "refused the key ***" in str(caught.value)
        assert SECRET not in shown


def test_nothing_that_a_saver_writes_holds_a_secret_of_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "logs"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with RankProcess(tmp_path / "store") as rank:
        saver = rank.ask("reserve", size_bytes=1 << 20)["saver_pid"]
        assert SECRET.encode() in Path(f"/proc/{saver}/environ").read_bytes(), "it was planted"
        assert SECRET.encode() not in Path(f"/proc/{saver}/cmdline").read_bytes()
        rank.ask("claim")
        rank.ask("stage", step=1, count=2, elements=1000)
        rank.ask("result", step=1)
        assert SECRET not in str(rank.ask("facts"))
        rank.ask("close")
    wait_gone(saver)
    check_sealed(tmp_path / "store", 1, world_size=1, count=2, elements=1000)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 4
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
