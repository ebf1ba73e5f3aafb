"""Uploads in parts, as S3, Google Cloud Storage and Azure each do them; invisible until completed.

Errors are the clients' own; storage/multipart.py, the only user, translates them.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from fsspec.asyn import sync

PART_BYTES = 16 * 1024 * 1024
"""Size of every part but the last: S3 wants 5 MiB or more, some of its imitations equal parts."""
MAX_PARTS = 10_000
"""S3's limit, so 160 GB an object; Azure takes 50,000 blocks."""
HIDDEN = ".tmp-"
"""Prefix of names that no key may have: what is unfinished, and removed with its directory."""
_COMPOSED_AT_ONCE = 32
"""Objects that one request of Google's may join."""


class PartUpload(Protocol):
    """One upload; parts may be sent from several threads at once."""

    def send(self, number: int, content: bytearray) -> None:
        """Send part `number`, from 0 on; sending it again replaces it."""

    def complete(self, count: int) -> None:
        """Publish parts 0 to `count` - 1 under the key, replacing an older object atomically."""

    def abort(self) -> None:
        """Remove what is left of the parts, if anything; no `send` may be running."""


def upload_kind(fs: Any, protocol: str) -> Callable[[Any, str], PartUpload] | None:
    """How `fs` sends parts, given it and a path; None where it streams in its own way."""
    if protocol in ("s3", "s3a") and hasattr(fs, "call_s3"):
        return S3Upload
    if protocol in ("gs", "gcs") and hasattr(fs, "merge"):
        return GcsUpload
    if protocol in ("az", "abfs", "abfss") and hasattr(fs, "service_client"):
        return AzureUpload
    return None


class S3Upload:
    """A multipart upload (S3 API, CreateMultipartUpload and what follows)."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        bucket, key, _ = fs.split_path(path)
        begun = fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        self._place = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"]}
        self._tags: dict[int, str] = {}
        self._is_complete = False

    def send(self, number: int, content: bytearray) -> None:
        sent = self._fs.call_s3("upload_part", PartNumber=number + 1, Body=content, **self._place)
        self._tags[number] = sent["ETag"]

    def complete(self, count: int) -> None:
        parts = [{"PartNumber": n + 1, "ETag": self._tags[n]} for n in range(count)]
        self._fs.call_s3("complete_multipart_upload", MultipartUpload={"Parts": parts},
                         **self._place)  # fmt: skip
        self._is_complete = True
        self._fs.invalidate_cache(self._path)

    def abort(self) -> None:
        if not self._is_complete:
            place = self._place
            abort_s3_upload(self._fs, place["Bucket"], place["Key"], place["UploadId"])


def s3_uploads(fs: Any, path: str) -> Iterator[tuple[str, str, float]]:
    """(key, upload's name, when it began) of what is unfinished below `path`: stored and billed."""
    bucket, below, _ = fs.split_path(path)
    prefix = f"{below}/" if below else ""
    more: dict[str, str] = {}
    while True:
        found = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **more)
        for upload in found.get("Uploads", ()):
            if upload["Key"].startswith(prefix):
                yield upload["Key"], upload["UploadId"], upload["Initiated"].timestamp()
        if not found.get("IsTruncated"):
            return
        more = {"KeyMarker": found["NextKeyMarker"], "UploadIdMarker": found["NextUploadIdMarker"]}


def abort_s3_upload(fs: Any, bucket: str, key: str, upload: str) -> None:
    """Give an upload up; one that is gone is no error."""
    with contextlib.suppress(FileNotFoundError):
        fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)


class GcsUpload:
    """Hidden objects beside the key, joined by the service (Cloud Storage, "composite objects")."""

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        parent, _, _ = path.rpartition("/")
        self._prefix = f"{parent}/{HIDDEN}{secrets.token_hex(12)}"
        self._made: set[str] = set()

    def send(self, number: int, content: bytearray) -> None:
        self._put(self._part(number), content)

    def complete(self, count: int) -> None:
        names, level = [self._part(number) for number in range(count)], 0
        while len(names) > _COMPOSED_AT_ONCE:
            level += 1
            groups = range(0, len(names), _COMPOSED_AT_ONCE)
            joined = [f"{self._prefix}-{level}-{start:05d}" for start in groups]
            for name, start in zip(joined, groups, strict=True):
                self._made.add(name)
                self._fs.merge(name, names[start : start + _COMPOSED_AT_ONCE])
            names = joined
        self._fs.merge(self._path, names)
        self._fs.invalidate_cache(self._path)

    def abort(self) -> None:
        for name in sorted(self._made):
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(name)
            self._made.discard(name)

    def _part(self, number: int) -> str:
        return f"{self._prefix}-0-{number:05d}"

    def _put(self, name: str, content: bytearray) -> None:
        self._made.add(name)
        self._fs.pipe_file(name, bytes(content))


class AzureUpload:
    """Blocks that a list of them makes a blob (Put Block, Put Block List).

    Blocks that no list names cannot be removed; the service does so after a week. A blob has one
    set of them, so of two uploads to one key that overlap the first completed one ends the other.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._container, self._blob, _ = fs.split_path(path)
        self._token = secrets.token_hex(8)

    def send(self, number: int, content: bytearray) -> None:
        self._call("stage_block", block_id=self._block(number), data=bytes(content),
                   length=len(content))  # fmt: skip

    def complete(self, count: int) -> None:
        from azure.storage.blob import BlobBlock

        blocks = [BlobBlock(self._block(number)) for number in range(count)]
        self._call("commit_block_list", block_list=blocks, metadata={"is_directory": "false"})
        self._fs.invalidate_cache(self._path)

    def abort(self) -> None:
        """Nothing can be done: see above."""

    def _block(self, number: int) -> str:
        return f"{self._token}{number:05d}"

    def _call(self, method: str, **arguments: Any) -> None:
        async def call() -> None:
            client = self._fs.service_client.get_blob_client(self._container, self._blob)
            async with client:
                await getattr(client, method)(**arguments)

        sync(self._fs.loop, call)
