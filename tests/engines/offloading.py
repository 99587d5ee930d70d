"""Where vLLM's offloading connector puts pages in these tests: other memory of the host.

vLLM's own worker copies from GPUs alone. This one copies on a CPU; what is offloaded, when, and
what is loaded again is decided by vLLM's connector and its manager for memory of the host.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostWorker(OffloadingWorker):
    """Copies whole pages, at once."""

    def __init__(self, caches: CanonicalKVCaches, pages: int) -> None:
        self._here = [cache.tensor for cache in caches.tensors]
        self._there = [
            torch.zeros(pages, *cache.shape[1:], dtype=cache.dtype) for cache in self._here
        ]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for here, there in zip(self._here, self._there, strict=True):
            there[torch.as_tensor(dst_spec.block_ids)] = here[torch.as_tensor(src_spec.block_ids)]
        return self._finish(job_id)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        for here, there in zip(self._here, self._there, strict=True):
            here[torch.as_tensor(dst_spec.block_ids)] = there[torch.as_tensor(src_spec.block_ids)]
        return self._finish(job_id)

    def _finish(self, job_id: int) -> bool:
        self._finished.append(TransferResult(job_id, success=True))
        return True

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""


class HostSpec(CPUOffloadingSpec):
    """vLLM's, with this worker."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return HostWorker(kv_caches, self.num_chunks)
