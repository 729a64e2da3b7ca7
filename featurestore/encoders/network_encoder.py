"""A network that turns batches of patches into vectors: on any device, in chunks that fit it.

On a CPU every chunk has the same size, padded where patches run out: a vector's bits depend on its own patch
alone, however blocks were batched. On a GPU the chunk is as large as its memory allows, and work is only queued: the
bytes of one batch are copied there from pinned memory, on a stream of their own, while the batch before is computed.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.encoders.precision import autocast
from featurestore.encoders.preprocessing import Preprocess
from featurestore.encoders.protocol import BATCH, EncoderIdentity, PendingVectors
from featurestore.errors import EncoderError

CPU_CHUNK = 16
"""Patches in one forward pass on a CPU: larger ones were no faster."""
GPU_CHUNKS = (8, 512)
"""Patches in the first forward pass on a GPU, and the most in any."""
GPU_BATCH = 256
"""Patches that a GPU is given at once: of a ViT-L/16 enough to fill the largest card, and 38 MB of bytes at 224 px."""
GPU_READERS = 4
"""Threads that read for a GPU: a core reads 1,500 to 3,000 patches of 224 px a second, an H100 encodes 2,700 with a ViT-L.
On 16 cores 4 threads were 1 to 3 % faster than 8, and 12 slower than both: they hold up the thread that feeds the card."""
# Not all of it: the estimate is linear in the patches, and other processes may take memory meanwhile.
GPU_SHARE = 0.6
"""Share of the free memory that one forward pass may take."""


class NetworkEncoder:
    """A network behind the `Encoder` protocol.

    Parameters
    ----------
    identity
        What it is.
    network
        Normalised images ``(n, 3, side, side)`` -> float32 vectors ``(n, dim)``, or ``(n, K, K, dim)`` of tokens.
    preprocess
        Patches -> images.
    device
        Where the network is.
    precision
        ``fp32``, ``fp16`` or ``bf16``.
    casts
        Run the network under torch's autocast; False where it handles its arithmetic itself.
    batch
        Patches in one forward pass; None to choose.
    """

    def __init__(
        self,
        identity: EncoderIdentity,
        network: Callable[[Tensor], Tensor],
        preprocess: Preprocess,
        device: torch.device,
        precision: str,
        *,
        casts: bool = True,
        batch: int | None = None,
    ) -> None:
        self._identity = identity
        self._network, self._preprocess = network, preprocess
        self._device, self._precision = device, precision
        self._casts = casts
        tokens = identity.facts.get("tokens")
        k = () if tokens is None else (int(tokens["groups"]),) * 2
        self._shape = (*k, identity.dim)  # of what a patch gives
        self._chunk = batch or (CPU_CHUNK if device.type == "cpu" else 0)
        self._batch = batch
        self._copies: torch.cuda.Stream | None = None

    @property
    def identity(self) -> EncoderIdentity:
        """What this encoder is."""
        return self._identity

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    @property
    def chunk(self) -> int:
        """Patches in one forward pass; on a GPU 0 before the first batch."""
        return self._chunk

    @property
    def batch(self) -> int:
        """Patches to hand over at once: whole forward passes."""
        wanted = BATCH if self._device.type == "cpu" else GPU_BATCH
        return wanted if self._batch is None else self._batch * max(1, wanted // self._batch)

    @property
    def reading_threads(self) -> int:
        """Threads that have to read slides, or this encoder would wait for them."""
        return 1 if self._device.type == "cpu" else GPU_READERS

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch, ``(n, side, side, 3)`` -> ``(n, dim)``, or ``(n, K, K, dim)`` of tokens; n may be 0.

        Raises
        ------
        EncoderError
            If the patches are not square, or not even one of them fits into memory.
        """
        return self.start(patches)()

    @torch.inference_mode()
    def start(self, patches: NDArray[np.uint8]) -> PendingVectors:
        """Queue a batch on the device; what is returned waits for its vectors. On a CPU they are computed now.

        Raises
        ------
        EncoderError
            As `encode`.
        """
        if len(patches) == 0:
            return lambda: np.empty((0, *self._shape), np.float32)
        if not self._chunk:
            self._chunk = self._chunk_that_fits(patches)
        while True:
            try:
                if self._device.type != "cpu":
                    return self._queue(patches)
                vectors = self._encode(patches)
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                self._halve(error)
            else:
                return lambda: vectors

    def _queue(self, patches: NDArray[np.uint8]) -> PendingVectors:
        """Queue copies and computation of a batch on the GPU; nothing here waits for it."""
        if self._copies is None:
            self._copies = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # A copy from memory that is not pinned would wait for the device. torch reuses pinned memory once its copies
        # are done.
        pinned = torch.from_numpy(patches).pin_memory()
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            pixels = pinned.to(self._device, non_blocking=True)
        computing.wait_stream(self._copies)
        # Or its memory would be given to the next copy while this batch is still computed from it.
        pixels.record_stream(computing)
        parts = [self.forward(pixels[s : s + self._chunk]) for s in range(0, len(pixels), self._chunk)]
        vectors = torch.empty((len(patches), *self._shape), dtype=torch.float32, pin_memory=True)
        vectors.copy_(torch.cat(parts), non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record(computing)

        def wait() -> NDArray[np.float32]:
            copied.synchronize()
            # A copy, since pinned memory is scarce and is reused.
            return vectors.numpy().copy()

        return wait

    def _encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        starts = range(0, len(patches), self._chunk)
        out = np.empty((len(patches), *self._shape), np.float32)
        for start in starts:
            chunk = patches[start : start + self._chunk]
            # Padded to the full chunk: matrix products of another size round differently.
            if len(chunk) < self._chunk:
                padded = np.zeros((self._chunk, *patches.shape[1:]), np.uint8)
                padded[: len(chunk)] = chunk
            else:
                padded = np.ascontiguousarray(chunk)
            out[start : start + len(chunk)] = self.forward(torch.from_numpy(padded))[: len(chunk)].numpy()
        return out

    def forward(self, patches: Tensor) -> Tensor:
        """Queue one pass: uint8 patches ``(n, side, side, 3)`` -> vectors on the device; within `torch.inference_mode`."""
        images = self._preprocess(patches.to(self._device, non_blocking=True))
        with self._arithmetic():
            return self._network(images).float()

    def _arithmetic(self) -> AbstractContextManager[object]:
        return autocast(self._device, self._precision) if self._casts else nullcontext()

    def _chunk_that_fits(self, patches: NDArray[np.uint8]) -> int:
        """Measure what a patch takes on the GPU, and return the power of two that fits its free memory."""
        few, most = GPU_CHUNKS
        # Repeated where the batch is smaller: what a pass takes depends on shapes alone.
        some = torch.from_numpy(np.resize(patches[:few], (few, *patches.shape[1:])))
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        self.forward(some)
        taken = torch.cuda.max_memory_allocated(self._device) - before
        free, _ = torch.cuda.mem_get_info(self._device)
        fits = max(1, int(GPU_SHARE * free * few / max(taken, 1)))
        return min(most, 1 << (fits.bit_length() - 1))

    def _halve(self, error: RuntimeError) -> None:
        if self._chunk == 1:
            raise EncoderError(
                f"{self._identity.key}: the {self._device.type} has too little memory for a single patch; "
                "use a smaller encoder or another --device"
            ) from error
        self._chunk //= 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # blocks cut for the larger chunk would be in the way
        warnings.warn(
            f"{self._identity.key}: out of memory, going on with {self._chunk} patches at once", stacklevel=4
        )


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On a CPU torch raises a plain RuntimeError that names its allocator.
    return isinstance(error, torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
