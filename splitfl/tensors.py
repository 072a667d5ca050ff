"""Between torch tensors and the bytes that travel: dtype names, zero-copy views, receive buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from splitfl.slabs import SMALLEST, slabs

__all__ = ["DTYPES", "byte_view", "dtype_name", "receive_buffer", "resolve_device"]

#: The dtypes a hidden state may travel in, by their name on the wire.
DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` to ``"bfloat16"``. Raises ValueError for a dtype that does not travel."""
    try:
        return _NAMES[dtype]
    except KeyError:
        raise ValueError(f"{dtype} does not travel; the wire carries {', '.join(DTYPES)}") from None


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy. Writing through the view writes the tensor."""
    assert tensor.device.type == "cpu", "only host memory can be viewed as bytes"
    assert tensor.is_contiguous(), "only contiguous memory can be viewed as bytes"
    # A view as uint8 works for every dtype, bf16 included, which NumPy itself does not know.
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def receive_buffer(rows: int, hidden: int, dtype: torch.dtype, *, pin: bool = False) -> tuple[torch.Tensor, memoryview]:
    """Uninitialised ``(rows, hidden)`` host memory and its writable bytes. ``pin`` for asynchronous copies to a GPU."""
    size = rows * hidden * dtype.itemsize
    if size >= SMALLEST and not pin:  # torch keeps pinned memory by itself
        slab = slabs().take(size)
        return torch.from_numpy(slab).view(dtype).view(rows, hidden), memoryview(slab)
    if pin:
        tensor = torch.empty((rows, hidden), dtype=dtype, pin_memory=True)
        return tensor, byte_view(tensor)
    # Memory of NumPy's: torch's own takes three calls more, and each message pays them.
    array: Any = np.empty((rows, hidden * dtype.itemsize), np.uint8)
    return torch.from_numpy(array).view(dtype), memoryview(array).cast("B")


def resolve_device(name: str) -> torch.device:
    """``"auto"`` to the best device there is; any other name as torch takes it. Raises ValueError, with what there is."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is not a device: use cpu, cuda, cuda:N, mps or auto") from None
    if (device.type == "cuda" and not cuda) or (device.type == "mps" and not mps):
        raise ValueError(f"this machine has no {device.type} device: use --device cpu or auto")
    return device
