"""Where the training stands in its stream of samples: the samples of completed updates.

Not what a loader has fetched: workers are batches ahead of the step that is being computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from spotspeed.core.sample_order import SampleOrder
from spotspeed.errors import ConfigError, FormatError


class Cursor:
    """Counts the samples that updates have consumed since stream position `start_sample`.

    `global_samples` is the engine's count at that position; the engine advances it by one global
    batch at every update, skipped ones included. The stream advances by what `taken` makes of that:
    the same, but for the last steps of a stream that has an end.
    """

    __slots__ = ("_global_samples", "_start_sample", "_taken", "order")

    def __init__(
        self, order: SampleOrder, *, start_sample: int, global_samples: int,
        taken: Callable[[int], int] = int,
    ) -> None:  # fmt: skip
        self.order = order
        self._start_sample, self._global_samples = start_sample, global_samples
        self._taken = taken

    def at(self, global_samples: int) -> dict[str, Any]:
        """The stored form of the position at the boundary with that count of samples."""
        return {
            "sample": self._start_sample + self._taken(global_samples - self._global_samples),
            "dataset_size": self.order.dataset_size,
            "seed": self.order.seed,
            "shuffle": self.order.shuffle,
        }


def resume_cursor(stored: Mapping[str, Any], global_samples: int) -> Cursor:
    """The cursor that goes on from a stored position, where the engine counts `global_samples`.

    Raises FormatError when it is no position.
    """
    sample, order = _parse(stored)
    return Cursor(order, start_sample=sample, global_samples=global_samples)


def resume_sample(stored: Mapping[str, Any] | None, order: SampleOrder) -> int:
    """The position to go on from: the stored one, or 0 when there is none.

    Raises ConfigError when the stored position belongs to another stream, because no position in
    the new one would keep samples from being lost or seen twice; FormatError when it is no cursor.
    """
    if stored is None:
        return 0
    sample, then = _parse(stored)
    if then != order:
        raise ConfigError(
            f"the checkpoint is at sample {sample} of {then}, but the loader now gives {order}: "
            f"resume with the data, seed and shuffling of the checkpoint"
        )
    return sample


def _parse(stored: Mapping[str, Any]) -> tuple[int, SampleOrder]:
    try:
        sample = stored["sample"]
        order = SampleOrder(stored["dataset_size"], stored["seed"], stored["shuffle"])
    except (KeyError, TypeError, ConfigError) as error:
        raise FormatError(f"the stored position in the data is not one: {error}") from error
    if type(sample) is not int or sample < 0:
        raise FormatError(f"the stored position in the data is {sample!r}")
    return sample, order
