"""Giving memory back to the system while a model is quantized: mapped checkpoint pages, and freed heap pages."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor, nn

_MADV_PAGEOUT = 21  # linux/mman.h, since 5.4: drops clean file pages, loses no data


def drop_mapped_pages(tensor: Tensor) -> None:
    """Let go of the pages of a weight that is read no more. Only for memory that torch did not allocate: a mapped file.

    A checkpoint is mapped as one piece, which stays mapped until the last tensor in it is gone.
    """
    storage = tensor.untyped_storage()
    if sys.platform != "linux" or storage.device.type != "cpu" or storage.resizable():
        return
    page = mmap.PAGESIZE
    start = -(-storage.data_ptr() // page) * page
    length = (storage.data_ptr() + storage.nbytes()) // page * page - start
    if length > 0:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


def own_memory(model: nn.Module) -> None:
    """Copy what is left of a mapped checkpoint (norms, biases), so that the mapping can go."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            if storage.nbytes() and not storage.resizable():
                tensor.data = tensor.data.clone()


def return_freed_heap() -> None:
    """Give freed heap pages back to the system (glibc keeps them otherwise)."""
    if sys.platform == "linux" and hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
