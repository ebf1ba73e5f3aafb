"""Streams one object through fsspec's own file objects, for stores without uploads in parts."""

from __future__ import annotations

import contextlib
from typing import Any

from fsspec.spec import AbstractBufferedFile

from spotspeed import events
from spotspeed.storage.contract import ReadBuffer, Writer, as_bytes_view
from spotspeed.storage.fsspec_failures import remote_error
from spotspeed.storage.redaction import harmless


class FsspecWriter(Writer):
    """A streamed upload; `written` and `final` differ where the store publishes early."""

    def __init__(self, fs: Any, file: Any, names: tuple[str, str], place: str) -> None:
        self._fs = fs
        self._file = file
        self._written, self._final = names
        self._place = place
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    def write(self, buffer: ReadBuffer) -> None:
        file, view = self._open_file(), as_bytes_view(buffer)
        try:
            file.write(view)
        except Exception as error:
            what = f"write at byte {self._position} of"
            raise remote_error(what, self._place, error) from harmless(error)
        self._position += len(view)

    def commit(self) -> None:
        file = self._open_file()
        try:
            file.close()
            if self._written != self._final:
                self._fs.mv(self._written, self._final)
            self._file = None
        except Exception as error:
            raise remote_error("commit", self._place, error) from harmless(error)
        finally:
            self.abort()

    def abort(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            _discard(file, self._place)
            if self._written != self._final:
                with contextlib.suppress(OSError):
                    self._fs.rm_file(self._written)

    def _open_file(self) -> Any:
        if self._file is None:
            raise ValueError(f"{self._place}: the writer is closed")
        return self._file


def _discard(file: Any, place: str) -> None:
    """Give an upload up without publishing it: closing, even by its finalizer, would publish."""
    if isinstance(file, AbstractBufferedFile):
        try:
            file.discard()
        except Exception as error:
            # Its parts are invisible but may cost money until the bucket's own rule expires them.
            events.emit(events.Lost(f"unfinished upload of {place}", f"not discarded: {error}"))
        file.closed = True
    else:
        with contextlib.suppress(OSError):
            file.close()
