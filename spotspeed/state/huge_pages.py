"""Asks for huge pages for new memory of the host that is about to be filled.

A restore touches each page of new optimizer state for the first time: in pages of 4 KiB the kernel
takes longer to provide the memory than to read into it.
"""

from __future__ import annotations

import ctypes
import mmap

import torch

LEAST_BYTES = 4 * 1024 * 1024
"""Smaller tensors may share their pages with other things, and have little to gain."""


def ask(tensor: torch.Tensor) -> bool:
    """Whether the kernel was asked, which is free to refuse; the contents stay as they are."""
    size_bytes = tensor.numel() * tensor.element_size()
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if tensor.device.type != "cpu" or size_bytes < LEAST_BYTES or advice is None:
        return False
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = (tensor.data_ptr() + size_bytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    madvise = ctypes.CDLL(None).madvise
    return bool(madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), advice) == 0)
