"""An NVIDIA GPU behind the device seam: copy streams beside the compute stream, joined by events only.

The compute stream is whichever is current in torch when `compute_after` and `computed` are called, so a model computes
as it always does. Copies go through streams of their own. Nothing here makes the host wait but `DeviceEvent.wait`,
which the reader threads use for the ring, and `synchronize`, which is for loading and closing.

Page-locked memory is the stream's own mapping, registered with the driver (cudaHostRegister): torch's allocator of
pinned memory rounds up to a power of two, and files can be read straight into a mapping.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from headrace.errors import BudgetError, InvalidRequestError
from headrace.streaming.arena import Arena, TensorMemory
from headrace.streaming.device import COPY_LANES, Copied, CopyPart, DeviceEvent, DeviceMemory
from headrace.units import format_bytes

REBASE_AFTER_S = 20.0
"""cudaEventElapsedTime returns a float of milliseconds: exact to some microseconds up to here."""
REGISTERED_MAX_BYTES = 256 << 30
"""Drivers of 2025 refuse to register 512 GiB of small pages in one call."""
_PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every context


class GpuDescription(NamedTuple):
    """A GPU as the driver describes it."""

    number: int
    name: str
    memory_bytes: int
    free_bytes: int
    compute_capability: str
    multiprocessors: int


def list_gpus() -> list[GpuDescription]:
    """Every GPU that torch sees, in its numbering; empty where there is none or torch was built without CUDA."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        about: Any = torch.cuda.get_device_properties(index)
        try:
            free_bytes = int(torch.cuda.mem_get_info(index)[0])
        except RuntimeError:  # a device in exclusive use by somebody else
            free_bytes = 0
        found.append(
            GpuDescription(
                index,
                about.name,
                int(about.total_memory),
                free_bytes,
                f"{about.major}.{about.minor}",
                int(about.multi_processor_count),
            )
        )
    return found


def open_cuda(index: int | None) -> CudaDevice:
    """Open a GPU by its number (None: torch's current one).

    Raises InvalidRequestError that says what was found where there is none, or no such one.
    """
    if torch.version.cuda is None:
        raise InvalidRequestError(
            f"--device cuda: torch {torch.__version__} was built without CUDA; install a CUDA build of torch, or take "
            "--device cpu"
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise InvalidRequestError(
            f"--device cuda: torch {torch.__version__} sees no GPU here (no NVIDIA driver, or CUDA_VISIBLE_DEVICES "
            "hides them); take --device cpu"
        )
    if index is None:
        index = torch.cuda.current_device()
    if not 0 <= index < count:
        names = ", ".join(f"cuda:{gpu.number} ({gpu.name})" for gpu in list_gpus())
        raise InvalidRequestError(f"--device cuda:{index}: there is no such GPU; found: {names}")
    try:
        return CudaDevice(index)
    except RuntimeError as error:
        raise InvalidRequestError(
            f"--device cuda:{index} cannot be used: {_first_line(error)}; look with nvidia-smi who else uses it"
        ) from error


class CudaEvent:
    """A point in a CUDA stream, with the time at which it was passed."""

    __slots__ = ("_clock", "event")

    def __init__(self, event: Any, clock: _Clock) -> None:
        self.event = event
        self._clock = clock

    def wait(self) -> None:
        """Block this thread, and no other, until the device has passed it."""
        self.event.synchronize()

    def passed(self) -> bool:
        """Ask the driver."""
        return bool(self.event.query())

    def moment_s(self) -> float:
        """Seconds on the clock of `time.perf_counter`."""
        return self._clock.moment_s(self.event)


class _Clock:
    """Device events on the host's clock: one event whose host time is known, and the driver's differences to it."""

    def __init__(self, device: torch.device) -> None:
        self._lock = threading.Lock()
        torch.cuda.synchronize(device)
        self._origin = _new_event()
        self._origin.record(torch.cuda.current_stream(device))
        self._origin.synchronize()
        self._origin_s = time.perf_counter()

    def moment_s(self, event: Any) -> float:
        with self._lock:
            elapsed_s = self._origin.elapsed_time(event) / 1e3
            moment_s: float = self._origin_s + elapsed_s
            if elapsed_s > REBASE_AFTER_S:
                self._origin, self._origin_s = event, moment_s
            return moment_s


class CudaDevice:
    """One GPU. See `Device` for what each call promises."""

    uses_host_memory = False

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)
        self.name = f"cuda:{index}"
        with torch.cuda.device(self.torch_device):
            self._streams: list[Any] = [_new_stream(self.torch_device) for _ in range(COPY_LANES)]
            self._clock = _Clock(self.torch_device)

    def allocate(self, size_bytes: int) -> TensorMemory:
        """Take one allocation; raises BudgetError with what is free where the driver refuses.

        Waits for the device: the allocator may give memory that kernels enqueued before still read, which orders it
        behind them in the stream it was asked in, and copies go through others.
        """
        try:
            taken = torch.empty(size_bytes, dtype=torch.uint8, device=self.torch_device)
            self.synchronize()
            return TensorMemory(taken)
        except torch.OutOfMemoryError as error:
            memory = self.memory()
            raise BudgetError(
                f"{self.name} refuses {format_bytes(size_bytes)}: {format_bytes(memory.free_bytes)} of "
                f"{format_bytes(memory.total_bytes)} are free now (other processes may hold the rest); give a smaller "
                "--memory"
            ) from error

    def allocate_host(self, size_bytes: int) -> Arena:
        """Take a mapping on huge pages and lock it; where the driver refuses it stays an ordinary one."""
        arena = Arena(size_bytes)
        arena.touch()
        if 0 < size_bytes <= REGISTERED_MAX_BYTES:
            with torch.cuda.device(self.torch_device):
                arena.pinned = int(_runtime().cudaHostRegister(arena.address, size_bytes, _PORTABLE)) == 0
            if not arena.pinned:
                self._forget_last_error()
            else:
                arena.on_close = lambda: self._unregister(arena.address)
        return arena

    def _forget_last_error(self) -> None:
        """A refusal stays the runtime's last error, and the next kernel launch would be blamed for it."""
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.torch_device)

    def _unregister(self, address: int) -> None:
        with contextlib.suppress(RuntimeError):  # a driver that is going down
            torch.cuda.synchronize(self.torch_device)
        _runtime().cudaHostUnregister(address)

    def copy(self, parts: Sequence[CopyPart], *, after: Sequence[DeviceEvent] = (), lane: int = 0) -> Copied:
        """Enqueue the copies in the lane's own stream."""
        with self._enqueuing(lane, after) as stream:
            begin = self._record(stream)
            for part in parts:
                part.target.copy_(part.source, non_blocking=True)
            return Copied(begin, self._record(stream))

    def fill(self, target: torch.Tensor, value: int, *, after: Sequence[DeviceEvent] = ()) -> DeviceEvent:
        """Enqueue a memset in the first lane's stream."""
        with self._enqueuing(0, after) as stream:
            target.fill_(value)
            return self._record(stream)

    @contextlib.contextmanager
    def _enqueuing(self, lane: int, after: Sequence[DeviceEvent]) -> Iterator[Any]:
        stream = self._streams[lane]
        # Inference mode, since that may write to any tensor, however it was made; it is this thread's alone.
        with torch.inference_mode(), torch.cuda.stream(stream):
            for event in after:
                if isinstance(event, CudaEvent):
                    stream.wait_event(event.event)
            yield stream

    def compute_after(self, event: DeviceEvent) -> None:
        """Let the current stream wait."""
        if isinstance(event, CudaEvent):
            torch.cuda.current_stream(self.torch_device).wait_event(event.event)

    def computed(self) -> CudaEvent:
        """Record the current stream."""
        return self._record(torch.cuda.current_stream(self.torch_device))

    def _record(self, stream: Any) -> CudaEvent:
        event = _new_event()
        event.record(stream)
        return CudaEvent(event, self._clock)

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(self.torch_device)

    def memory(self) -> DeviceMemory:
        """The driver's own figures, which count every process on the GPU."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.torch_device)
        return DeviceMemory(int(free_bytes), int(total_bytes))

    def held_bytes(self) -> int:
        """Reserved by torch's allocator: in use, or kept for reuse."""
        return int(torch.cuda.memory_reserved(self.torch_device))

    def peak_bytes(self) -> int:
        """The allocator's own high-water mark of reserved bytes."""
        return int(torch.cuda.max_memory_reserved(self.torch_device))

    def reset_peak(self) -> None:
        """Start again from what is reserved now."""
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def release_cached(self) -> None:
        """Give the allocator's free segments back to the driver, so that others can have them."""
        torch.cuda.empty_cache()

    def reserve(self, size_bytes: int) -> None:
        """Take one segment and free it: torch's allocator keeps it, and cuts later tensors out of it."""
        self.allocate(size_bytes).close()


def _new_event() -> Any:
    make: Any = torch.cuda.Event  # torch's own annotations leave these three out
    return make(enable_timing=True, blocking=True)  # a waiting thread sleeps and leaves the CPU to others


def _new_stream(device: torch.device) -> Any:
    make: Any = torch.cuda.Stream
    return make(device)


def _runtime() -> Any:
    get: Any = torch.cuda.cudart
    return get()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
