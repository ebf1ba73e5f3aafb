"""Every error that spotspeed raises, in one tree.

SpotSpeedError
├── ConfigError                the "spotspeed" block, a launch setting or a path is wrong
├── CaptureError               the live training state cannot be described or copied
├── PoolExhaustedError         the staging pool cannot hold what one save needs
├── StorageError               an object could not be read or written
│   ├── TransientStorageError  the same call may succeed later, and is tried again
│   ├── UnreadableError        the device fails to read an object that is there
│   └── ObjectNotFoundError    there is no such object or checkpoint
├── CorruptionError            stored bytes are not the bytes that were written
│   ├── ChecksumMismatchError  a digest does not match
│   └── FormatError            a header, index, receipt or manifest does not parse
├── ReshardError               the stored state does not fit the live layout
│   ├── InvalidLayoutError     the layout contradicts itself or the model
│   └── UnsupportedLayoutError a layout that this version does not know how to fill
└── CoordinationError          the ranks could not agree
    ├── PeerLostError          a rank is gone or silent
    ├── CutTimeoutError        the ranks did not reach one step in time
    ├── LeavingError           all ranks leave, and agree on nothing else any more
    └── OwnedError             the path belongs to another living job
        └── OccupiedError      ... to another process of the same script
"""

from __future__ import annotations


class SpotSpeedError(Exception):
    """Root of the tree; catch this to catch everything spotspeed raises."""


class ConfigError(SpotSpeedError):
    """A setting is wrong; the message names the key, what was found and what to write instead."""


class CaptureError(SpotSpeedError):
    """The live training state could not be described or copied; names the parameter or object."""


class PoolExhaustedError(SpotSpeedError):
    """The staging pool cannot hold the minimum that one save needs."""


class StorageError(SpotSpeedError):
    """An object could not be read or written; names the object and the operation."""


class TransientStorageError(StorageError):
    """The store failed in a way that a later attempt may not; it is tried again for a while."""


class UnreadableError(StorageError):
    """An object that is there cannot be read, at several attempts: a failing device (EIO), a link.

    What a sealed checkpoint lists and cannot be read is damage, as if its bytes had changed.
    """


class ObjectNotFoundError(StorageError):
    """There is no such object, or no checkpoint where one was asked for."""


class CorruptionError(SpotSpeedError):
    """Stored bytes differ from what was written; names the file."""


class ChecksumMismatchError(CorruptionError):
    """The digest of what was read is not the digest that was recorded.

    `key` names the file and the part of it; `expected` and `actual` are digests in hex.
    """

    def __init__(self, *, key: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{key}: the stored digest is {expected}, the bytes read have {actual}; "
            f"the file was damaged after it was written"
        )
        self.key = key
        self.expected = expected
        self.actual = actual

    def __reduce__(self) -> tuple[object, ...]:
        return (_checksum_mismatch, (self.key, self.expected, self.actual))


def _checksum_mismatch(key: str, expected: str, actual: str) -> ChecksumMismatchError:
    return ChecksumMismatchError(key=key, expected=expected, actual=actual)


class FormatError(CorruptionError):
    """A stored structure does not parse, or exceeds a limit of its format; names the file."""


class ReshardError(SpotSpeedError):
    """The stored state does not fit the live model or layout."""


class InvalidLayoutError(ReshardError):
    """The layout contradicts itself or the model; no older checkpoint is tried."""


class UnsupportedLayoutError(ReshardError):
    """A layout that this version does not know; an older checkpoint may be tried, loudly."""


class CoordinationError(SpotSpeedError):
    """The ranks could not agree on something."""


class PeerLostError(CoordinationError):
    """A rank is gone, or silent for longer than `coordinator.peer_timeout_s`."""


class CutTimeoutError(CoordinationError):
    """The ranks did not all reach the agreed step before the deadline."""


class LeavingError(CoordinationError):
    """All ranks leave, on a notice or after a loss, and agree on nothing else any more."""


class OwnedError(CoordinationError):
    """`path` belongs to another job that is alive."""


class OccupiedError(OwnedError):
    """`path` belongs to a living process of this very script, for another engine."""
