"""A TCP proxy in front of a server of a test: as slow as it is told, or silent for ever."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from types import TracebackType

PIECE_BYTES = 16 * 1024


class SlowWire:
    """Passes connections at `port` on to `target`, a port of this machine.

    `bytes_per_s` limits what clients send, all together; None is no limit. After `freeze`
    connections are accepted and nothing is passed on any more, until `thaw`.
    """

    def __init__(self, target: int) -> None:
        self.bytes_per_s: float | None = None
        self._target = target
        self._is_flowing = threading.Event()
        self._is_flowing.set()
        self._turn = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []

    def freeze(self) -> None:
        self._is_flowing.clear()

    def thaw(self) -> None:
        self._is_flowing.set()

    def __enter__(self) -> SlowWire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.thaw()
        for sock in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open += [client, server]
            for source, sink, is_limited in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._pass_on, args=(source, sink, is_limited), daemon=True
                ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_limited: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                self._is_flowing.wait()
                rate = self.bytes_per_s
                if is_limited and rate is not None:
                    with self._turn:
                        time.sleep(len(data) / rate)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
