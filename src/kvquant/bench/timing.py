"""Timing of calls, and the memory's bandwidth, on a GPU and on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

__all__ = [
    "Call",
    "Captured",
    "buffers_for",
    "cpu_bandwidth",
    "graph_ms",
    "graphs_ms",
    "read_ceiling",
    "read_ms",
    "wall_ms",
]

Call = Callable[[], object]


@dataclass(frozen=True)
class Captured:
    """Calls in a CUDA graph, which rotates through them; ``before`` runs ahead of each replay."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Call]  # whose tensors the graph reads
    count: int
    before: Call | None = None

    @classmethod
    def of(cls, calls: Sequence[Call], per_graph: int = 10, before: Call | None = None) -> Captured:
        """Warmed up, captured and replayed once."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(per_graph):
                calls[i % len(calls)]()
        graph.replay()
        return cls(graph, calls, per_graph, before)

    def ms(self, rounds: int) -> float:
        """Median milliseconds of a call, without what runs before a replay."""
        times: list[float] = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            if self.before is not None:
                self.before()
            start.record()
            self.graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / self.count)
        return statistics.median(times)


def graph_ms(
    calls: Sequence[Call], rounds: int = 11, per_graph: int = 10, before: Call | None = None
) -> float:
    """Median milliseconds of a call, by replays of a CUDA graph that rotates through ``calls``.

    ``before`` runs ahead of each replay, outside the time taken.
    """
    return Captured.of(calls, per_graph, before).ms(rounds)


def graphs_ms(
    graphs: Mapping[str, Captured], repetitions: int = 5, rounds: int = 5
) -> dict[str, tuple[float, float]]:
    """Milliseconds of each graph's call and their spread, (largest - smallest) / median.

    The graphs take turns; a repetition's figure is a median of ``rounds``, and what is returned is
    the median of the repetitions.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for i in range(repetitions):
        for name in list(graphs)[:: 1 if i % 2 else -1]:
            times[name].append(graphs[name].ms(rounds))
    return {
        name: (statistics.median(of), (max(of) - min(of)) / statistics.median(of))
        for name, of in times.items()
    }


def read_ms(nbytes: int, *, rounds: int = 7, per_graph: int = 10) -> float:
    """Milliseconds of a kernel that only reads about ``nbytes``: the best of some launches."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(x, out, block: tl.constexpr, steps: tl.constexpr):  # type: ignore[no-untyped-def]
        program = tl.program_id(0)
        total = tl.zeros((block,), tl.int32)
        for i in range(steps):
            at = program.to(tl.int64) * block * steps + i * block
            total += tl.load(x + at + tl.arange(0, block))
        tl.store(out + program, tl.sum(total, 0))

    words = nbytes // 4
    buffers = [
        torch.randint(0, 255, (words,), dtype=torch.int32, device="cuda")
        for _ in range(buffers_for(nbytes))
    ]
    best = float("inf")
    for block, programs in (
        (4096, words // 32768), (2048, words // 32768), (8192, words // 131072),
        (1024, words // 65536),
        (2048, 264), (4096, 264), (2048, 528), (2048, 2112),
    ):  # fmt: skip
        steps = words // (block * max(1, programs))
        if not steps or not programs:
            continue
        out = torch.empty(programs, dtype=torch.int32, device="cuda")

        def call(
            x: torch.Tensor, block: int = block, steps: int = steps, out: torch.Tensor = out
        ) -> None:
            read[(out.numel(),)](x, out, block, steps, num_warps=8)

        ms = graph_ms([partial(call, x) for x in buffers], rounds, per_graph)
        best = min(best, ms * words / (block * steps * programs))
    return best


def read_ceiling() -> float:
    """TB/s of a kernel that only reads 2 GiB: the ceiling for whatever reads a cache."""
    nbytes = 1 << 31
    return nbytes / read_ms(nbytes, per_graph=3) / 1e9


def buffers_for(nbytes: int, *, at_least: int = 400_000_000, most: int = 8) -> int:
    """How many buffers of ``nbytes`` to rotate so that the L2 cache does not serve them."""
    return max(1, min(most, at_least // max(1, nbytes)))


def wall_ms(*rotations: Sequence[Call], rounds: int, turns: int = 3) -> list[float]:
    """Median milliseconds of a call of each rotation, in turns that warm up with one round."""
    times: list[list[float]] = [[] for _ in rotations]
    for _ in range(turns):
        for calls, mine in zip(rotations, times, strict=True):
            for call in calls:
                call()
            for call in [*calls] * rounds:
                start = time.perf_counter()
                call()
                mine.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(mine) for mine in times]


def cpu_bandwidth() -> float:
    """GB/s of a sum over 512 MiB by all threads: the ceiling for whatever reads a cache."""
    x = torch.ones(1 << 27)
    return x.nbytes / min(wall_ms([x.sum], rounds=3, turns=1)[0] for _ in range(5)) / 1e6
