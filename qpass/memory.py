"""What qpass tells the system about memory: mapped pages and freed heap that may go, weights that want large pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

# linux/mman.h
_MADV_HUGEPAGE = 14
_MADV_PAGEOUT = 21  # since 5.4: drops clean file pages, loses no data
_MADV_COLLAPSE = 25  # since 6.1
_HUGE_PAGE = 1 << 21
_M_MMAP_THRESHOLD = -3  # malloc.h


def drop_mapped_pages(tensor: Tensor) -> None:
    """Let go of the pages of a weight that is read no more. Only for memory that torch did not allocate: a mapped file.

    A checkpoint is mapped as one piece, which stays mapped until the last tensor in it is gone.
    """
    storage = tensor.untyped_storage()
    if sys.platform != "linux" or storage.device.type != "cpu" or storage.resizable():
        return
    _advise(tensor, mmap.PAGESIZE, _MADV_PAGEOUT)


def outside_of_graphs(make: Callable[[], Tensor]) -> Tensor:
    """A tensor to keep on a GPU, ready for every stream. It is made in another thread: what this one allocates may belong to a
    CUDA graph, which Inductor checks and gives back, and this one may be tracing."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_made_and_there, make).result()


def _made_and_there(make: Callable[[], Tensor]) -> Tensor:
    made = make()
    if made.device.type == "cuda":
        torch.cuda.synchronize(made.device)
    return made


def for_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages behind memory that was not written yet: the first write of each page is a fault. Returns `tensor`."""
    if sys.platform == "linux" and tensor.device.type == "cpu":
        _advise(tensor, _HUGE_PAGE, _MADV_HUGEPAGE)
    return tensor


def into_huge_pages(tensor: Tensor) -> Tensor:
    """Put large pages behind a weight that will be read at every step, where the system has them; returns `tensor`.

    Finding pages of 4 KB costs a tenth to a quarter of the read bandwidth. Memory that malloc gives twice has such pages
    already, so advice alone comes too late: the pages are exchanged now, if the kernel can.
    """
    if sys.platform == "linux" and tensor.device.type == "cpu" and tensor.untyped_storage().resizable():
        _advise(tensor, _HUGE_PAGE, _MADV_HUGEPAGE)
        _advise(tensor, _HUGE_PAGE, _MADV_COLLAPSE)
    return tensor


def _advise(tensor: Tensor, page: int, advice: int) -> None:
    """madvise for the whole pages in the tensor's storage. It is advice: that it has no effect is no error."""
    storage = tensor.untyped_storage()
    start = -(-storage.data_ptr() // page) * page
    length = (storage.data_ptr() + storage.nbytes()) // page * page - start
    if length > 0:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), advice)


def own_memory(model: nn.Module) -> None:
    """Copy what is left of a mapped checkpoint (norms, biases), so that the mapping can go."""
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter):
            tensor.data = own_copy(tensor.data)


def own_copy(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it lies in memory that torch did not allocate: a file, an array of somebody else."""
    storage = tensor.untyped_storage()
    mapped = tensor.device.type == "cpu" and storage.nbytes() > 0 and not storage.resizable()
    return tensor.clone() if mapped else tensor


def return_freed_heap() -> None:
    """Give freed heap pages back to the system (glibc keeps them otherwise)."""
    if sys.platform == "linux" and hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


def give_back_large_blocks() -> None:
    """From now on freed memory of 1 MB and more goes back to the system at once, in this process: slower to take, but blocks of
    many sizes leave no gaps (glibc keeps up to 32 MB each in its heap otherwise)."""
    if sys.platform == "linux" and hasattr(_libc(), "mallopt"):
        _libc().mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
