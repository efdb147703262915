"""Where the time of training steps went: phases, kernels and waits of a trace that `track.profile` wrote.

A trace is the Chrome JSON of torch's profiler. The work is, on a GPU, its kernels, each counted in the phase that
launched it, and on a CPU its operators without the operators that they call. All figures are means per step.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packhorse.errors import UserError

ON_DEVICE: Final = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES: Final = ("cuda_runtime", "cuda_driver")
WAIT: Final = re.compile(r"Synchronize(_v\d+|_ptsz)?$|^cudaMemcpy$")
KINDS: Final[Mapping[str, re.Pattern[str]]] = {
    "copies": re.compile(r"^Mem(cpy|set)"),
    "communication": re.compile(r"nccl|gloo:|c10d::", re.IGNORECASE),
    "attention": re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE),
    "products": re.compile(
        r"gemm|gemv|cutlass|xmma|nvjet|wgmma|splitk|triton_(tem|mm)"
        r"|^aten::(mm|addmm|bmm|baddbmm|mv|dot|_scaled_mm|_grouped_mm|_int_mm|mkldnn_\w*linear)_?$",
        re.IGNORECASE,
    ),
    "elementwise": re.compile(
        r"elementwise|reduce|norm|softmax|triton_|multi_tensor|foreach|adam|dropout|swiglu|geglu|rope|rotary|quantize"
        r"|cross_entropy|index|scatter|gather|cat(array|_)|embedding|copy_|fill_"
        r"|^aten::(_to_copy|zero|exp|log|neg|pow|square|sqrt|rsqrt|reciprocal|mul|add|sub|div|addcmul|addcdiv|lerp|silu"
        r"|gelu|tanh|sigmoid|sum|mean|max|where|masked_fill|clamp|cat|cos|sin|threshold_backward|silu_backward)_?$",
        re.IGNORECASE,
    ),
}
"""Kind of a kernel or operator by its name: the first that matches. Reductions are counted as elementwise."""


@dataclass(frozen=True)
class PhaseTime:
    """One phase of a step, seconds per step.

    Attributes:
        name: Name as in the heartbeat; `other` is between two phases.
        seconds: Time of the host.
        device_seconds: Time of the kernels that it launched; None on a CPU.
        waits: Number of times that the host waited for the device.
        wait_seconds: Time that the host waited for the device.
    """

    name: str
    seconds: float
    device_seconds: float | None
    waits: float
    wait_seconds: float


@dataclass(frozen=True)
class WorkTime:
    """Kernels or operators of one name or kind.

    Attributes:
        name: Name or kind.
        seconds: Seconds per step.
        share: Share of the time of all kernels or operators.
        calls: Number per step.
    """

    name: str
    seconds: float
    share: float
    calls: float


@dataclass(frozen=True)
class StepTime:
    """Where the time of the steps of a trace went.

    Attributes:
        steps: Numbers of the first and last step.
        step_seconds: Mean seconds of a step.
        idle_share: Share of the time in which the GPU ran nothing; None on a CPU.
        phases: Phases in the order of a step.
        kinds: Kinds of work, the longest first.
        top: Kernels or operators, the longest first.
        elementwise_per_product: Seconds of elementwise work per second of matrix products; None without products.
    """

    steps: tuple[int, int]
    step_seconds: float
    idle_share: float | None
    phases: Sequence[PhaseTime]
    kinds: Sequence[WorkTime]
    top: Sequence[WorkTime]
    elementwise_per_product: float | None


@dataclass(frozen=True)
class _Span:
    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the events of a trace that have a duration.

    Raises:
        UserError: The file is not a complete trace.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            events = json.load(file)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a complete trace: {error}.",
            "the trace is a compressed JSON file of torch's profiler with `traceEvents`.",
            f"remove the file with `rm {path}`, and resume or repeat the run with track.profile.",
        ) from error
    return [event for event in events if event.get("ph") == "X" and "cat" in event]


def step_time(events: Iterable[Mapping[str, Any]]) -> StepTime | None:
    """Return where the time went; None where the trace holds no step.

    Args:
        events: Events of `read_trace`: `cat`, `name`, `tid`, `ts` and `dur` in microseconds, `args`.
    """
    by_category: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        by_category[event["cat"]].append(event)
    marks = sorted(map(_span, by_category["user_annotation"]), key=lambda span: span.start)
    steps = [mark for mark in marks if re.fullmatch(r"step \d+", mark.name)]
    if not steps:
        return None
    first, last = steps[0], steps[-1]
    phases = _Phases([mark for mark in marks if mark.name.startswith("phase ")])
    launched = {_correlation(event): _span(event) for name in LAUNCHES for event in by_category[name]}
    waits = [call for call in launched.values() if WAIT.search(call.name) and first.start <= call.start < last.end]
    kernels = [
        (_span(event), launched[_correlation(event)].start if _correlation(event) in launched else _span(event).start)
        for name in ON_DEVICE
        for event in by_category[name]
    ]
    work = kernels or _without_callees(by_category["cpu_op"])
    work = [(span, at) for span, at in work if first.start <= at < last.end]
    count = len(steps)
    by_kind = _summed([(kind_of(span.name), span.seconds) for span, _ in work], count)
    seconds = {each.name: each.seconds for each in by_kind}
    products = seconds.get("products", 0.0)
    return StepTime(
        steps=(_number(first), _number(last)),
        step_seconds=sum(step.seconds for step in steps) / count,
        idle_share=1 - _busy([span for span, _ in kernels], first.start, last.end) if kernels else None,
        phases=phases.times(steps, work if kernels else None, waits),
        kinds=by_kind,
        top=_summed([(span.name, span.seconds) for span, _ in work], count),
        elementwise_per_product=seconds.get("elementwise", 0.0) / products if products else None,
    )


def kind_of(name: str) -> str:
    """Return the kind of a kernel or operator."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")


class _Phases:
    """Phases by time."""

    def __init__(self, marks: Sequence[_Span]) -> None:
        self._marks = marks
        self._starts = [mark.start for mark in marks]

    def times(
        self, steps: Sequence[_Span], launched: Sequence[tuple[_Span, float]] | None, waits: Sequence[_Span]
    ) -> list[PhaseTime]:
        host: dict[str, float] = dict.fromkeys((self._name(mark.start) for mark in self._marks), 0.0)
        for mark in self._marks:
            host[self._name(mark.start)] += mark.seconds
        host["other"] = max(0.0, sum(step.seconds for step in steps) - sum(host.values()))
        device: dict[str, float] = defaultdict(float)
        for span, at in launched or ():
            device[self._name(at)] += span.seconds
        waited: dict[str, list[float]] = defaultdict(list)
        for wait in waits:
            waited[self._name(wait.start)].append(wait.seconds)
        count = len(steps)
        return [
            PhaseTime(
                name=name,
                seconds=seconds / count,
                device_seconds=device[name] / count if launched is not None else None,
                waits=len(waited[name]) / count,
                wait_seconds=sum(waited[name]) / count,
            )
            for name, seconds in host.items()
        ]

    def _name(self, at: float) -> str:
        index = bisect_right(self._starts, at) - 1
        inside = index >= 0 and at < self._marks[index].end
        return self._marks[index].name.removeprefix("phase ") if inside else "other"


def _span(event: Mapping[str, Any]) -> _Span:
    start = float(event["ts"]) / 1e6
    return _Span(event["name"], start, start + float(event.get("dur", 0.0)) / 1e6)


def _correlation(event: Mapping[str, Any]) -> int | None:
    number: int | None = event.get("args", {}).get("correlation")
    return number


def _number(step: _Span) -> int:
    return int(step.name.removeprefix("step "))


def _without_callees(events: Sequence[Mapping[str, Any]]) -> list[tuple[_Span, float]]:
    """Return each operator with the time that it spent outside the operators that it called, and its start."""
    found: list[tuple[_Span, float]] = []
    threads: dict[Any, list[_Span]] = defaultdict(list)
    for event in events:
        threads[event["tid"]].append(_span(event))
    for spans in threads.values():
        spans.sort(key=lambda span: (span.start, -span.end))
        own = [span.seconds for span in spans]
        open_ones: list[int] = []
        for index, span in enumerate(spans):
            while open_ones and spans[open_ones[-1]].end <= span.start:
                open_ones.pop()
            if open_ones:
                own[open_ones[-1]] -= span.seconds
            open_ones.append(index)
        found += [
            (_Span(span.name, span.start, span.start + max(0.0, seconds)), span.start)
            for span, seconds in zip(spans, own, strict=True)
        ]
    return found


def _busy(spans: Sequence[_Span], start: float, end: float) -> float:
    """Return the share of the time from `start` to `end` in which at least one of the spans runs."""
    busy, reached = 0.0, start
    for span in sorted(spans, key=lambda span: span.start):
        upto = min(span.end, end)
        if upto > reached:
            busy += upto - max(span.start, reached)
            reached = upto
    return busy / (end - start)


def _summed(work: Sequence[tuple[str, float]], count: int) -> list[WorkTime]:
    """Return the sums by name, the longest first."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for name, each in work:
        seconds[name] += each
        calls[name] += 1
    total = sum(seconds.values())
    found = [
        WorkTime(name, each / count, each / total if total else 0.0, calls[name] / count)
        for name, each in seconds.items()
    ]
    return sorted(found, key=lambda each: -each.seconds)
