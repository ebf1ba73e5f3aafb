"""Who has gone past a save that others ask for: by its forwards, never by its slowness."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from spotspeed.checkpoint.passing import Passing
from spotspeed.errors import CoordinationError
from spotspeed.storage.local import LocalStorage


class Rank:
    """One rank: how many forwards it has begun, and what it said in the agreement."""

    def __init__(self, storage: LocalStorage) -> None:
        self.forwards, self.said = 0, list[str]()
        self.passing = Passing(storage, 3, forwards=lambda: self.forwards, exchange=self.exchange)

    def exchange(self, label: str, value: bytes) -> list[bytes]:
        self.said.append(label)
        raise CoordinationError("the ranks are not at the same place of the program")

    def look(self) -> list[str]:
        for _ in range(3):  # The first one sees where it is, the next that it is still there.
            self.passing.look()
        return self.said


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    monkeypatch.setattr("spotspeed.checkpoint.passing.PATIENCE_S", 0.0)
    return LocalStorage(tmp_path)


def ask(storage: LocalStorage, save: int, forwards: int) -> None:
    storage.put(f"asking/3/{save}", json.dumps({"forwards": forwards}).encode())


def test_a_rank_that_has_begun_another_forward_answers_once(storage: LocalStorage) -> None:
    rank = Rank(storage)
    rank.forwards = 8
    ask(storage, 1, 6)
    assert rank.look() == ["no save: 2 forwards past it"]
    assert len(rank.look()) == 1


@pytest.mark.parametrize("forwards", [5, 6])
def test_a_rank_that_may_still_come_says_nothing(storage: LocalStorage, forwards: int) -> None:
    rank = Rank(storage)
    rank.forwards = forwards
    ask(storage, 1, 6)
    assert rank.look() == []


def test_a_rank_that_moves_does_not_look(storage: LocalStorage) -> None:
    rank = Rank(storage)
    ask(storage, 1, 0)
    for forwards in range(1, 20):
        rank.forwards = forwards
        rank.passing.look()
    assert rank.said == []


@pytest.mark.parametrize("left", [b"{", b"[]", b'{"forwards": null}', None])
def test_no_question_and_no_sense_are_no_reason_to_answer(
    storage: LocalStorage, left: bytes | None
) -> None:
    rank = Rank(storage)
    rank.forwards = 8
    if left is not None:
        storage.put("asking/3/1", left)
    assert rank.look() == []


def test_a_question_that_this_rank_has_joined_is_not_answered_again(storage: LocalStorage) -> None:
    rank = Rank(storage)
    with rank.passing.asking():
        assert rank.look() == []
    ask(storage, 1, 0)
    rank.forwards = 4
    assert rank.look() == []
    ask(storage, 2, 0)
    assert rank.look() == ["no save: 4 forwards past it"]


def test_who_waits_leaves_a_question_and_takes_it_away(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, gone = threading.Event(), threading.Event()
    put, delete = storage.put, storage.delete
    monkeypatch.setattr(storage, "put", lambda *a: (put(*a), asked.set()))
    monkeypatch.setattr(storage, "delete", lambda *a: (delete(*a), gone.set()))
    rank, other = Rank(storage), Rank(storage)
    rank.forwards, other.forwards = 6, 7
    with rank.passing.asking():
        assert asked.wait(30)
        assert other.look() == ["no save: 1 forwards past it"]
    assert gone.wait(30) and not storage.list("asking")


def test_whoever_takes_its_question_away_late_leaves_the_next_one(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, may_delete, gone = threading.Event(), threading.Event(), threading.Event()
    put, delete = storage.put, storage.delete

    def late(key: str) -> None:
        assert may_delete.wait(30)
        delete(key)
        gone.set()

    monkeypatch.setattr(storage, "put", lambda *a: (put(*a), asked.set()))
    monkeypatch.setattr(storage, "delete", late)
    rank, other = Rank(storage), Rank(storage)
    for each in (rank, other):
        with each.passing.asking():
            assert asked.wait(30)
    ask(storage, 2, 0)
    may_delete.set()
    assert gone.wait(30)
    other.forwards = 3
    assert other.look() == ["no save: 3 forwards past it"]
