"""How many bytes of tensors are alive, and at most were: on real tensors and on fake ones.

    with LiveBytes() as memory:
        loss(model, batch).backward()
    memory.peak         # bytes above what was alive at entry
    memory.at_peak(5)   # what they were

Bytes are those of storages, so views and aliases count once. Under `FakeTensorMode` the same code takes seconds and no
memory at any size; enter the counter inside of it.

What it cannot see: workspaces inside kernels (cuBLAS, attention), the allocator's rounding and fragmentation, and whatever
allocates without dispatching an operator (`Storage.resize_`, tensors over numpy's memory, compiled graphs and the inside of
custom operators on fake tensors). Storages that were there before entry never count, neither held nor freed.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BUILT_IN = frozenset({"aten", "prim", "prims", "quantized"})
BACKENDS = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}
# Frames of these folders are not where a tensor was asked for.
MACHINERY = (str(Path(torch.__file__).parent), "<", __file__)


class Held(NamedTuple):
    """One kind of tensor that was alive at the peak: together ``bytes``, in ``count`` storages."""

    bytes: int
    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str


@dataclass(eq=False)
class _Record:
    """Bytes that were allocated at one moment (a number of allocation) and not yet freed."""

    bytes: int
    time: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str


@dataclass(eq=False)
class _Storage:
    """``size``: bytes when last looked at; ``base``: those that were there before entry."""

    alive: weakref.ref
    size: int
    base: int
    record: _Record | None = field(default=None)


class LiveBytes(TorchDispatchMode):
    """Counts bytes of storages that operators allocate while it is on, backward included. Entering again starts afresh.

    Attributes:
        live: bytes allocated since entry and not freed; stands still after exit.
        peak: the most that ``live`` has been.
    """

    supports_higher_order_operators = True

    def __init__(self, *, stacks: bool = False):
        """``stacks``: name the file and line behind each allocation too, which is slower."""
        super().__init__()
        self.stacks = stacks
        self._depth = 0
        self._reset()

    def _reset(self) -> None:
        self.live = self.peak = 0
        self._time = self._peak_time = 0
        self._storages: dict[int, _Storage] = {}
        self._freed_since_peak: list[_Record] = []

    def __enter__(self) -> LiveBytes:
        if self._depth == 0:
            self._reset()
        self._depth += 1  # torch leaves and enters a mode again around nested operators
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._depth -= 1

    def at_peak(self, top: int = 10) -> list[Held]:
        """What was alive at the peak, largest first, by shape, dtype and the operator that allocated it."""
        sizes: Counter = Counter()
        counts: Counter = Counter()
        for record in self._alive_at_peak():
            key = record.shape, record.dtype, record.where
            sizes[key] += record.bytes
            counts[key] += 1
        return [Held(size, counts[key], *key) for key, size in sizes.most_common(top)]

    def table(self, top: int = 10) -> str:
        """`at_peak` in words, in GB (1e9 bytes)."""
        lines = [f"peak {self.peak / 1e9:.3f} GB"]
        for held in self.at_peak(top):
            dtype = str(held.dtype).removeprefix("torch.")
            lines.append(f"{held.bytes / 1e9:9.3f} GB  {held.count:4d} x {dtype} {list(held.shape)}  {held.where}")
        return "\n".join(lines)

    def _alive_at_peak(self) -> Iterator[_Record]:
        for storage in self._storages.values():
            if storage.record is not None and storage.record.time <= self._peak_time:
                yield storage.record
        yield from self._freed_since_peak

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # `torch.tensor` fills its memory unseen and shows it here first.
        fresh = func is torch.ops.aten.lift_fresh.default
        if not fresh:
            for tensor in inputs:
                self._look(tensor, func, existed=True)
        result = self._run(func, inputs, args, kwargs)
        for tensor in (*inputs, *(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))):
            self._look(tensor, func)
        return result

    def _run(self, func: Any, inputs: list[Tensor], args: tuple, kwargs: dict) -> Any:
        """The operator; with the counter on inside of it, where that has operators of its own."""
        if isinstance(func, torch._ops.OpOverload):
            if func.namespace not in BUILT_IN and inputs and not any(isinstance(t, FakeTensor) for t in inputs):
                backend = BACKENDS.get(inputs[0].device.type)
                if backend is not None:  # straight to the kernel: dispatch would come back here
                    with self:
                        return func.redispatch(torch._C.DispatchKeySet(backend), *args, **kwargs)
            elif func.namespace in BUILT_IN and torch.is_inference_mode_enabled() and func._can_decompose():
                with self:  # in inference mode composite operators arrive whole
                    return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)

    def _look(self, tensor: Tensor, func: Any, *, existed: bool = False) -> None:
        """Take notice of a tensor's storage: a new one, or a known one of another size."""
        if tensor.layout is not torch.strided:
            return
        handle = tensor.untyped_storage()
        key, size = handle._cdata, handle.nbytes()
        storage = self._storages.get(key)
        if storage is not None and storage.alive() is not handle:  # the address of one that has gone
            self._free(key, storage.alive)
            storage = None
        if storage is None:
            # Its Python object lives as long as the memory, also where only autograd holds it.
            alive = weakref.ref(handle, lambda ref, key=key: self._free(key, ref))
            storage = self._storages[key] = _Storage(alive, size, size if existed else 0)
        elif storage.size == size:
            return
        else:
            self._close(storage)
            storage.size = size
        added = size - storage.base
        if added <= 0:
            return
        self._time += 1
        storage.record = _Record(added, self._time, tuple(tensor.shape), tensor.dtype, self._where(func))
        self.live += added
        if self.live > self.peak:
            self.peak, self._peak_time = self.live, self._time
            self._freed_since_peak.clear()

    def _free(self, key: int, ref: weakref.ref) -> None:
        storage = self._storages.get(key)
        if storage is not None and storage.alive is ref and self._depth > 0:
            del self._storages[key]
            self._close(storage)

    def _close(self, storage: _Storage) -> None:
        """Its bytes are no longer alive."""
        record, storage.record = storage.record, None
        if record is not None:
            self.live -= record.bytes
            if record.time <= self._peak_time:
                self._freed_since_peak.append(record)

    def _where(self, func: Any) -> str:
        name = str(func)
        if not self.stacks:
            return name
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(MACHINERY):
            frame = frame.f_back
        if frame is None:  # backward in a thread of its own
            return name
        path = Path(frame.f_code.co_filename)
        return f"{name} at {path.parent.name}/{path.name}:{frame.f_lineno}"
