"""Calls in parallel on plain threads, which work as long as the process lives.

`concurrent.futures` takes no more work once the main thread has ended; the last checkpoint of a
process is made after that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")


def in_parallel(call: Callable[[T], U], items: Iterable[T], *, threads: int) -> list[U]:
    """`call` of every item, in order; after the first error nothing more is begun.

    When this returns or raises, no call is running any more.
    """
    work = list(items)
    if len(work) < 2 or threads < 2:
        return [call(item) for item in work]
    results: dict[int, U] = {}
    failures: dict[int, BaseException] = {}
    left = iter(range(len(work)))
    lock = threading.Lock()

    def take() -> int | None:
        with lock:
            return None if failures else next(left, None)

    def run() -> None:
        while (index := take()) is not None:
            try:
                results[index] = call(work[index])
            except BaseException as error:  # raised again by the caller below
                with lock:
                    failures[index] = error

    crew = [threading.Thread(target=run, name="spotspeed-parallel", daemon=True)
            for _ in range(min(threads, len(work)))]  # fmt: skip
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    if failures:
        raise failures[min(failures)]
    return [results[index] for index in range(len(work))]
