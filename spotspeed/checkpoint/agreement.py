"""One rank's value or error on every rank: small decisions, shared over the control plane."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from spotspeed import errors
from spotspeed.errors import SpotSpeedError

T = TypeVar("T")
ROUND_BYTES = 1 << 20
"""What all ranks together say in one round of a long exchange."""
PATIENCE_S = 600.0
"""How long ranks that are expected are waited for."""
Exchange = Callable[[str, bytes], list[bytes]]
"""All-gather over the control plane: (label, this rank's value) -> every rank's value."""


class TimedExchange(Protocol):
    """An `Exchange` that can be told how long to wait for the other ranks."""

    def __call__(self, label: str, value: bytes, timeout_s: float = ..., /) -> list[bytes]: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rank made of something: `error` is empty or the name of an error's class."""

    rank: int
    error: str
    text: str

    @property
    def kind(self) -> type[SpotSpeedError]:
        """The class to raise for this verdict; its message is `text`."""
        found = getattr(errors, self.error, SpotSpeedError)
        if found is errors.ChecksumMismatchError:
            return errors.CorruptionError
        return found if isinstance(found, type) else SpotSpeedError


def share(
    exchange: Exchange, label: str, rank: int, decide: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """What `decide` returned on rank 0, on every rank; its SpotSpeedError, raised on every rank.

    `decide` is called on rank 0 only and returns plain JSON data.
    """
    answer: dict[str, Any] = {}
    if rank == 0:
        try:
            answer = {"value": dict(decide())}
        except SpotSpeedError as error:
            answer = {"error": type(error).__name__, "text": str(error)}
        except Exception as error:  # whatever it is: the others wait for a word
            answer = {"error": SpotSpeedError.__name__, "text": f"rank 0: {error!r}"}
            exchange(label, json.dumps(answer).encode())
            raise
    first = json.loads(exchange(label, json.dumps(answer).encode())[0])
    if "value" not in first:
        verdict = Verdict(0, first.get("error", ""), first.get("text", "rank 0 sent nothing"))
        raise verdict.kind(verdict.text)
    value: dict[str, Any] = first["value"]
    return value


def vote(exchange: Exchange, label: str, error: SpotSpeedError | None) -> list[Verdict]:
    """The verdicts of the ranks that object, on every rank alike; empty when all agree."""
    mine = {"error": type(error).__name__, "text": str(error)} if error else {"error": ""}
    answers = exchange(label, json.dumps(mine).encode())
    verdicts = []
    for rank, answer in enumerate(answers):
        data = json.loads(answer)
        if data["error"]:
            verdicts.append(Verdict(rank, data["error"], data["text"]))
    return verdicts


def all_or_none(exchange: Exchange, label: str, action: Callable[[], T]) -> T:
    """This rank's result of `action`; the first rank's SpotSpeedError on every rank if any raised.

    Every rank calls it; none returns before all have acted.
    """
    objection: SpotSpeedError | None = None
    try:
        result = action()
    except SpotSpeedError as error:
        objection = error
    except Exception as error:  # as above
        vote(exchange, label, SpotSpeedError(repr(error)))
        raise
    raise_first(vote(exchange, label, objection))
    return result


def raise_first(verdicts: list[Verdict]) -> None:
    """Raise the first objection as the error it was, naming its rank."""
    if verdicts:
        raise verdicts[0].kind(f"rank {verdicts[0].rank}: {verdicts[0].text}")


def share_all(exchange: Exchange, label: str, value: Any) -> list[Any]:
    """Every rank's plain JSON value, in order of rank."""
    return [json.loads(answer) for answer in exchange(label, json.dumps(value).encode())]


def share_large(exchange: Exchange, label: str, value: Any) -> list[Any]:
    """As `share_all`, for values of any size: in rounds that the control plane can carry."""
    data = json.dumps(value).encode()
    sizes = share_all(exchange, label, len(data))
    step = max(1, ROUND_BYTES // len(sizes))
    parts: list[list[bytes]] = [[] for _ in sizes]
    for start in range(0, max(sizes), step):
        answers = exchange(f"{label} from {start}", data[start : start + step])
        for part, answer in zip(parts, answers, strict=True):
            part.append(answer)
    return [json.loads(b"".join(part)) for part in parts]


def waiting(exchange: TimedExchange, timeout_s: float) -> Exchange:
    """`exchange`, whose every call waits `timeout_s` for the others."""
    return lambda label, value: exchange(label, value, timeout_s)


def impatient(exchange: TimedExchange, first_s: float) -> Exchange:
    """`exchange`, whose first call waits `first_s` for the others, and every later one as usual."""
    limits = iter([first_s])
    return lambda label, value: exchange(label, value, next(limits, PATIENCE_S))
