"""Named immutable objects in a directory or an object store; start at contract.py."""

from spotspeed.storage.contract import ObjectInfo, Storage, Writer
from spotspeed.storage.opening import open_storage

__all__ = ["ObjectInfo", "Storage", "Writer", "open_storage"]
