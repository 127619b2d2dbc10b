"""What the device asks of a run: its name, tensors on it, determinism on a CPU, its errors in the user's words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from nsa_cli.errors import ExitCode, NsaError, is_out_of_memory


def device_name(device: torch.device) -> str:
    """What a reader should know of the device: "cpu (2 threads)", "cuda:0 (NVIDIA H200)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array as a tensor on the device; to a GPU through pinned memory, so that the host need not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """bfloat16 arithmetic over float32 weights when asked for; float32 and float64 need none."""
    if dtype is not torch.bfloat16:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def random_states(device: torch.device) -> list[Tensor]:
    """The states of the generators that a run on this device draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Puts back what `random_states` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def deterministic_on_cpu(device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for a run on the CPU, where a parallel scatter-add would add in any order."""
    if device.type != "cpu":
        yield
        return
    settings = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid, a write of every buffer
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@contextmanager
def explained_errors(windows: int, context: int) -> Iterator[None]:
    """NsaError with exit 1 in place of the allocators' errors (`windows` of `context` tokens were at work) and of
    torch.compile's, with the flag that helps."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch._dynamo.exc.TorchDynamoException):
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NsaError(f"torch.compile failed: {reason}", "leave out --compile", ExitCode.FAILURE) from error
        if not is_out_of_memory(error):
            raise
        message = f"out of memory with --micro-batch-tokens {windows * context}, {windows} windows of {context} at once"
        hint = "lower --context or the model's size"
        if windows > 1:
            hint = f"try --micro-batch-tokens {windows // 2 * context}"
        raise NsaError(message, hint, ExitCode.FAILURE) from error
