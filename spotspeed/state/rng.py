"""Every random number generator that a training step may draw from: captured, restored, reseeded.

Covered: Python's `random`, numpy's global generator, torch's CPU generator, the accelerator's
generator of the current device, and the named states of DeepSpeed's activation-checkpointing
tracker. Generators that the user's code owns are the user's to store.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker
from torch import Tensor

from spotspeed.errors import FormatError


@dataclass(frozen=True, slots=True)
class RngState:
    """The generators at one moment; the fields own what they hold."""

    python: tuple[Any, ...]
    numpy: Mapping[str, Any]
    torch: Tensor
    device: tuple[str, Tensor] | None
    """The accelerator's name and the state of its current device; None where that is the CPU."""
    tracker: Mapping[str, Tensor]

    def to_dict(self) -> dict[str, Any]:
        """Plain data but for the tensors; `restore` takes it back."""
        return {
            "python": self.python,
            "numpy": dict(self.numpy),
            "torch": self.torch,
            "device": self.device,
            "tracker": dict(self.tracker),
        }


def capture() -> RngState:
    """The generators as they are now, in a few tens of microseconds."""
    return RngState(
        random.getstate(),
        np.random.get_state(legacy=False),
        torch.get_rng_state(),
        _capture_device(),
        # The tracker replaces its tensors and never writes into them: the dict is enough.
        get_cuda_rng_tracker().get_states(),
    )


def restore(state: Mapping[str, Any], *, spare_seed: bytes) -> list[str]:
    """Set every generator as `RngState.to_dict` has it; returns what had to be reseeded instead.

    `spare_seed` seeds the accelerator's generator when the state is of another kind of device.
    Raises FormatError when a generator refuses its state.
    """
    notes: list[str] = []
    try:
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        live, stored = _device_name(), state["device"]
        if live is not None and stored is not None and stored[0] == live:
            get_accelerator().set_rng_state(stored[1])
        elif live is not None:
            get_accelerator().manual_seed(_word(spare_seed, "device", 8))
            notes.append(f"the {live} generator was reseeded: its state was not stored")
        if state["tracker"]:
            get_cuda_rng_tracker().set_states(dict(state["tracker"]))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise FormatError(f"the stored state of a random generator is unusable: {error}") from error
    return notes


def seed_of(seed: int, rank: int, step: int) -> bytes:
    """What rank `rank` is reseeded from when it resumes at `step` and has no state of its own."""
    return hashlib.sha256(f"spotspeed rng {seed} {rank} {step}".encode()).digest()


def reseed(seed: bytes) -> None:
    """Seed every generator from `seed`; equal seeds give equal streams, whatever was before."""
    random.seed(_word(seed, "python", 32))
    numpy_seed = _word(seed, "numpy", 16)
    np.random.seed([(numpy_seed >> shift) & 0xFFFFFFFF for shift in (0, 32, 64, 96)])
    torch.default_generator.manual_seed(_word(seed, "torch", 8))
    tracker = get_cuda_rng_tracker()
    if _device_name() is not None:
        get_accelerator().manual_seed(_word(seed, "device", 8))
    for name in tracker.get_states():
        tracker.states_[name] = _fresh_device_state(_word(seed, f"tracker {name}", 8))


def _capture_device() -> tuple[str, Tensor] | None:
    name = _device_name()
    return None if name is None else (name, get_accelerator().get_rng_state())


def _device_name() -> str | None:
    name: str = get_accelerator().device_name()
    return None if name == "cpu" else name


def _fresh_device_state(word: int) -> Tensor:
    """The state that the tracker would hold for `word`; the device's own state is left alone."""
    accelerator = get_accelerator()
    before = accelerator.get_rng_state()
    accelerator.manual_seed(word)
    state: Tensor = accelerator.get_rng_state()
    accelerator.set_rng_state(before)
    return state


def _word(seed: bytes, purpose: str, size_bytes: int) -> int:
    digest = hashlib.sha256(seed + purpose.encode()).digest()
    return int.from_bytes(digest[:size_bytes], "little")
