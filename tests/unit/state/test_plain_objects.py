"""Objects that training scripts keep come back as they were, and nothing runs on their way."""

from __future__ import annotations

import argparse
import datetime
import decimal
import enum
import fractions
import pathlib
import types
import uuid
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any

import pytest
import torch

from spotspeed.checkpoint.named import encode_client_state
from spotspeed.core import plain
from spotspeed.core.plain import Tagged
from spotspeed.errors import CaptureError, FormatError
from spotspeed.state.plain_objects import OBJECT_TAGS
from spotspeed.state.plain_tensors import from_plain

UTC2 = datetime.timezone(datetime.timedelta(hours=2))


class Colour(enum.IntEnum):
    RED = 3


class Mode(enum.Enum):
    FAST = "fast"


class Table(dict):  # type: ignore[type-arg]
    def items(self) -> Any:
        raise AssertionError("no code of a subclass runs")


class Words(str):
    def __str__(self) -> str:
        raise AssertionError("no code of a subclass runs")


Point = namedtuple("Point", "x y")


def round_trip(value: Any) -> Any:
    return from_plain(plain.decode(encode_client_state({"k": value}).data, source="test"))["k"]


@pytest.mark.parametrize("value", [
    argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), data=pathlib.Path("/data"), at=None),
    types.SimpleNamespace(a=[1]), defaultdict(list, {"a": [1]}), defaultdict(None, {1: 2}),
    deque([1, (2,)], maxlen=5), deque(["x"]), range(1, 9, 2), slice(None, 3),
    pathlib.Path("a/b"), pathlib.PurePosixPath("/x"), pathlib.PureWindowsPath("c:\\x"),
    datetime.datetime(2024, 5, 6, 7, 8, 9, 10), datetime.datetime(2024, 5, 6, tzinfo=UTC2),
    datetime.date(2024, 5, 6), datetime.time(7, 8, 9), datetime.timedelta(3, 4, 5),
    decimal.Decimal("1.10"), fractions.Fraction(2, 3), uuid.UUID(int=7),
    {pathlib.Path("as a key"): {range(3): 1}}, OrderedDict(a=deque([defaultdict(int, b=1)])),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_it_comes_back_with_its_type_and_value(value: Any) -> None:
    found = round_trip(value)
    assert found == value and type(found) is type(value)
    if isinstance(value, defaultdict):
        assert found.default_factory is value.default_factory
    if isinstance(value, deque):
        assert found.maxlen == value.maxlen


@pytest.mark.parametrize(("value", "kept"), [
    (Colour.RED, 3), (Mode.FAST, "fast"), (Point(1, [2]), (1, [2])), (Table(a=1), {"a": 1}),
    (Words("w"), "w"), (defaultdict(lambda: 7, a=1), {"a": 1}),
    (types.MappingProxyType({"a": Colour.RED}), {"a": 3}),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_what_only_code_could_make_again_comes_back_as_its_built_in_value(
    value: Any, kept: Any
) -> None:
    found = round_trip(value)
    assert found == kept and type(found) is type(kept)


def test_tensors_inside_are_kept() -> None:
    found = round_trip(argparse.Namespace(seen=deque([torch.arange(3)])))
    assert found.seen[0].tolist() == [0, 1, 2]


class Own:
    pass


@pytest.mark.parametrize("make", [
    lambda: argparse.Namespace(a=[Own()]), lambda: deque([Own()]), Own, lambda: Own,
    lambda: (cycle := argparse.Namespace(), setattr(cycle, "me", cycle), cycle)[2],
    lambda: (cycle := deque(), cycle.append(cycle), cycle)[2],
])  # fmt: skip
def test_what_has_no_plain_form_is_refused_by_its_key(make: Any) -> None:
    with pytest.raises(CaptureError, match=r"client_state\['k'\]"):
        encode_client_state({"k": make()})


@pytest.mark.parametrize("tag", sorted(OBJECT_TAGS))
@pytest.mark.parametrize("parts", [None, 5, "x", (), ("os", "system"), {1: 2}, ([], [], [], [])])
def test_parts_that_are_none_of_the_type_are_refused_or_harmless(tag: str, parts: Any) -> None:
    try:
        found = from_plain([Tagged(tag, parts)])[0]
    except FormatError as error:
        assert tag in str(error)
    else:
        assert type(found).__module__ in ("builtins", "pathlib", "collections", "decimal",
                                          "fractions", "datetime")  # fmt: skip
