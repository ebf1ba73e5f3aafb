"""Credentials stay out of URLs, error texts, tracebacks, and everything that a saver writes."""

from __future__ import annotations

import traceback
from pathlib import Path
from urllib.parse import quote

import pytest

from spotspeed.errors import ConfigError, StorageError
from spotspeed.storage import open_storage
from spotspeed.storage.fsspec_backend import FsspecStorage
from spotspeed.storage.redaction import redact, refuse_credentials
from tests.distributed.saver_ranks import RankProcess, check_sealed, wait_gone

SECRET = "qV7+Zp3/planted/0secret0WQ="


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{SECRET}@host/run",
        f"s3://AKIAPLANTED234567890:{SECRET}@bucket/run",
        f"s3://key:{SECRET}@with@bucket/run",
        f"az://container/run#sig={SECRET}",
        f"az://container/run;AccountKey={SECRET}",
        f"az://container/run?sv=2024&sig={SECRET}",
        f"https://bucket.s3.amazonaws.com/run?X-Amz-Signature={SECRET}",
        f"s3://bucket/run?aws_secret_access_key={SECRET}",
    ],
)
def test_a_url_with_credentials_is_refused_without_repeating_them(url: str) -> None:
    with pytest.raises(ConfigError, match="carries credentials") as caught:
        open_storage(url)
    assert "planted" not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://host:8080/run@2", "abfs://container@account.dfs.core.windows.net/run",
            "s3://bucket/run:1@x", "s3://bucket/token=5/run"],
)  # fmt: skip
def test_a_url_without_credentials_is_taken_and_shown_as_it_is(url: str) -> None:
    refuse_credentials(url)
    assert redact(url).partition("token=")[0] == url.partition("token=")[0]


def test_a_secret_is_known_with_a_slash_in_front_and_in_a_url_s_spelling(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What tells where a secret is to be found is none, and useful in an error."""
    secret = f"/{SECRET}"
    (tmp_path / "somewhere").write_text("x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/absent")
    monkeypatch.setenv("SOME_TOKEN", str(tmp_path / "somewhere"))
    for text in (f"signed with {secret}.", f"GET /k?by={quote(secret, safe='')}."):
        assert redact(text).endswith("***.") and "planted" not in redact(text)
    for text in ("no /var/run/absent", f"no {tmp_path}/somewhere"):
        assert redact(text) == text


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
