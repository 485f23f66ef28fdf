"""Interleaved timing, and results as data.

Contestants run in turn, round after round, so that a clock that drifts or a neighbour that wakes up hits all of them.
Medians and quartiles are over rounds. On a GPU each contestant is captured in a CUDA graph of as many calls as fill
5 ms (an empty graph between two events already reads some 18 us) and its replays are timed by events; where a capture
fails the same events time plain calls, and the result says so. On a CPU the wall clock is read, and beside it the
processor time of the process, which a busy machine disturbs less; short calls find their caches warm.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from dhsa_ext.info import facts

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SCRATCH = ROOT / "build" / "bench"  # of --tiny runs, whose times are no results
GRAPH_MS = 5.0  # the shortest replay that is timed
WARMED_MS = 1000.0  # on a CPU, runs shorter than this are timed with warm caches
SLOW_MS = 5000.0  # a first call that took so long is not repeated to estimate the next
SETTLED = 30  # rounds after which more would not move a median


@dataclass
class Contestant:
    """Something to time: `make()` gives the call, `check` raises AssertionError where one call's answer is wrong."""

    name: str
    make: Callable[[], Callable[[], Any]]
    check: Callable[[Any], None] | None = None
    calls: int = 0  # calls timed together; 0: as many as fill GRAPH_MS
    memory: bool = False  # whether its extra memory is measured


@dataclass
class Timing:
    """Milliseconds of one call: median and quartiles over rounds; `cpu_ms` is the process's processor time."""

    ms: float
    low: float
    high: float
    rounds: int
    how: str
    cpu_ms: float | None = None
    extra_mib: float | None = None


@dataclass
class Failure:
    """Why a contestant has no time, in one line."""

    why: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return cls(f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200])


@dataclass
class _Runner:
    run: Callable[[], None]  # `calls` calls
    calls: int
    how: str
    estimate_ms: float  # of run()
    keeps: Any = None  # whose memory a graph reads: freed, it would be unmapped before a replay
    extra_mib: float | None = None
    rounds: int = 0
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def measure(
    contestants: Iterable[Contestant], device: str, seconds: float = 0.5, least: int = 3
) -> dict[str, Timing | Failure]:
    """Check each contestant's answer, then time all of them in turn, about `seconds` each and at least `least` rounds.

    A contestant that raises, at any point, gets a Failure and the others go on; all end where the GPU is lost.
    """
    results: dict[str, Timing | Failure] = {}
    runners: dict[str, _Runner] = {}
    for contestant in contestants:
        try:
            with torch.inference_mode():
                runner = _prepared(contestant, device)
            runner.rounds = max(least, min(SETTLED, int(seconds * 1e3 / max(runner.estimate_ms, 1e-6))))
            runners[contestant.name] = runner
        except Exception as error:
            results[contestant.name] = Failure.of(error)
            if device_lost(device):
                return results
    longest = max((r.rounds for r in runners.values()), default=0)
    time_once = _time_by_events if device == "cuda" else _time_by_clock
    with torch.inference_mode():
        for i in range(longest):
            for name, runner in runners.items():
                # Contestants with fewer rounds take part in every few, spread over the whole time.
                if name in results or (i + 1) * runner.rounds // longest == i * runner.rounds // longest:
                    continue
                try:
                    time_once(runner)
                except Exception as error:
                    results[name] = Failure.of(error)
                    if device_lost(device):
                        return results
    return results | {name: _summary(runner) for name, runner in runners.items() if name not in results}


def _prepared(contestant: Contestant, device: str) -> _Runner:
    call = contestant.make()
    begin = time.perf_counter_ns()
    answer = call()
    first_ms = (time.perf_counter_ns() - begin) / 1e6
    if contestant.check is not None:
        contestant.check(answer)
    del answer
    extra = extra_bytes(call, device) / 2**20 if contestant.memory else None
    runner = _graphed(call, contestant.calls) if device == "cuda" else _called(call, contestant.calls, first_ms)
    runner.extra_mib = extra
    return runner


def _summary(runner: _Runner) -> Timing:
    wall = runner.wall * 2 if len(runner.wall) == 1 else runner.wall
    low, median, high = statistics.quantiles(wall, n=4, method="inclusive")
    cpu = statistics.median(runner.cpu) if runner.cpu else None
    return Timing(median, low, high, len(runner.wall), runner.how, cpu, runner.extra_mib)


def _time_by_clock(runner: _Runner) -> None:
    if runner.estimate_ms < WARMED_MS:
        runner.run()  # the contestant before has emptied the caches of what this one reads
    cpu, wall = time.process_time_ns(), time.perf_counter_ns()
    runner.run()
    wall, cpu = time.perf_counter_ns() - wall, time.process_time_ns() - cpu
    runner.wall.append(wall / 1e6 / runner.calls)
    runner.cpu.append(cpu / 1e6 / runner.calls)


def _time_by_events(runner: _Runner) -> None:
    runner.wall.append(_events_ms(runner.run) / runner.calls)


def _events_ms(run: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _repeat(call: Callable[[], Any], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            call()

    return run


def _called(call: Callable[[], Any], calls: int, first_ms: float) -> _Runner:
    once = first_ms
    if once < SLOW_MS:  # the first call may have compiled, or touched memory for the first time
        begin = time.perf_counter_ns()
        call()
        once = (time.perf_counter_ns() - begin) / 1e6
    calls = calls or max(1, min(1000, int(GRAPH_MS / max(once, 1e-3))))
    return _Runner(_repeat(call, calls), calls, f"wall clock, {calls} calls", once * calls)


def _graphed(call: Callable[[], Any], calls: int) -> _Runner:
    torch.cuda.synchronize()
    once = _events_ms(_repeat(call, 1))
    calls = calls or max(1, min(50, int(GRAPH_MS / max(once, 1e-3))))
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        graph.replay()
        torch.cuda.synchronize()
        return _Runner(graph.replay, calls, f"CUDA graph of {calls}", _events_ms(graph.replay), keeps=call)
    except Exception as error:
        if device_lost("cuda"):
            raise
        how = f"plain calls, no graph ({Failure.of(error).why[:80]})"
        return _Runner(_repeat(call, calls), calls, how, once * calls)


def device_lost(device: str) -> bool:
    """Whether an earlier error has ended this process's use of the GPU."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
        return False
    except Exception:
        return True


def extra_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds at once beside its inputs and outputs.

    GPU: the peak of torch's allocator. CPU: the peak of the resident set, which sees every allocation but counts what
    the heap had kept from earlier calls as free, so it is trimmed first. Raises OSError where the kernel cannot say.
    """
    gc.collect()
    with torch.inference_mode():
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            answer = call()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
            before = _resident("VmRSS")
            answer = call()
            peak = _resident("VmHWM")
    outputs = answer if isinstance(answer, tuple) else (answer,)
    return max(0, peak - before - sum(x.nbytes for x in outputs))


def _resident(field_name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field_name}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


# --- results as data -------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """What ran: processor or GPU, its library, torch. No host name and no path."""
    found: dict[str, Any] = {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.system()}
    if device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    about = facts()
    found |= {"torch": torch.__version__, "python": platform.python_version(), "backend": about["backend"].split()[0]}
    found |= {"isa": about["ISA active"], "cuda_archs": about["CUDA archs"].split(" (")[0]}
    return found


def cpu_model() -> str:
    try:
        names = re.findall(r"^(?:model name|Model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.machine()


def commit() -> str:
    """The commit, "+" where files other than results differ from it; DHSA_BENCH_COMMIT for a copy of the tree."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments), cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()  # fmt: skip

    if named := os.environ.get("DHSA_BENCH_COMMIT"):
        return named
    try:
        head = git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if git("status", "--porcelain", "-uno", "--", ".", ":!bench/results") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def command() -> str:
    program = Path(sys.argv[0]).resolve()
    shown = program.relative_to(ROOT) if program.is_relative_to(ROOT) else Path(program.name)
    forced = [f"{name}={value}" for name, value in os.environ.items() if name.startswith(("DHSA_FORCE", "OMP_"))]
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join([*sorted(forced), "python", str(shown), *words])


class Report:
    """The rows of one run, written to a JSON file after every row, so that a run that ends early leaves what it had."""

    def __init__(self, bench: str, device: str, output: str | None = None, append: bool = False) -> None:
        about = machine(device)
        name = re.sub(r"[^a-z0-9]+", "-", (about.get("gpu") or about["cpu"]).lower()).strip("-")
        folder = SCRATCH if bench.endswith("-tiny") else RESULTS
        self.path = Path(output) if output else folder / f"{bench}-{name}.json"
        now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        self.data: dict[str, Any] = {
            "bench": bench, "machine": about, "commit": commit(), "command": command(), "date": now,
            "load_before": load(), "rows": [],
        }  # fmt: skip
        if append and self.path.exists():
            before = json.loads(self.path.read_text())
            kept = ("commit", "command", "date", "load_before", "load_after")
            run = {key: before[key] for key in kept if key in before}
            self.data |= {"earlier_runs": [*before.get("earlier_runs", []), run], "rows": before["rows"]}

    def where(self) -> str:
        """The file, from the repository's root."""
        path = self.path.resolve()
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name

    def head(self) -> str:
        about = self.data["machine"]
        ran = f"{about['gpu']}, CUDA archs {about['cuda_archs']}" if "gpu" in about else f"ISA {about['isa']}"
        return (
            f"{self.data['bench']}: {about['cpu']}, {about['cores']} cores, {ran}, backend {about['backend']}, torch "
            f"{about['torch']}, commit {self.data['commit']}, load {self.data['load_before']}\n$ {self.data['command']}"
        )

    def add(self, row: dict[str, Any]) -> None:
        self.data["rows"].append(row)
        self.write()

    def write(self) -> None:
        self.data["load_after"] = load()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)


def timed(result: Timing | Failure) -> dict[str, Any]:
    """A result as the fields of a row, three figures past the point at most six."""
    if isinstance(result, Failure):
        return {"failed": result.why}
    return {key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in asdict(result).items() if v is not None}
