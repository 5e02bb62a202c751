"""Jobs in processes of their own, which may crash or hang without ending the run.

An error on a GPU leaves the process that met it unfit for further work; a kernel that waits for
ever never comes back. So a failed job ends its process, a job past its time is killed, and the next
job starts in a new process.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

_LATE = "took too long and was stopped"
_SPAWN = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Args:
        job: as given.
        result: what the function returned; None where it failed.
        error: "" or one line that says what went wrong.
        cut: whether it was cut off because the time of all jobs was over, which is no error.
    """

    job: Any
    result: Any = None
    error: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Last:
    """A result that leaves its process unfit for more."""

    result: Any


def run_each(
    function: Callable[[Any], Any],
    jobs: Sequence[Any],
    *,
    processes: int = 1,
    timeout: float = 60.0,
    deadline: float | None = None,
    grace: float = 0.0,
) -> Iterator[Outcome]:
    """Call a function on every job, in worker processes, and yield what comes as it comes.

    Args:
        function: importable by its name; an `Exception` it raises is the job's error. What it
            wraps in :class:`Last` is its result, but its process gets no further job.
        jobs: picklable arguments, begun in this order.
        processes: how many at a time; one keeps the order.
        timeout: seconds a job may take.
        deadline: of ``time.monotonic()``, after which no job is begun; those left out are not
            yielded.
        grace: seconds after the deadline at which the jobs begun before it are cut off.
    """
    deadline = math.inf if deadline is None else deadline
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    done: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()

    def serve() -> None:
        worker = _Worker(function)
        try:
            while time.monotonic() < deadline:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    break
                left = deadline + grace - time.monotonic()
                outcome = worker.ask(job, min(timeout, left))
                done.put(
                    dataclasses.replace(outcome, cut=outcome.error == _LATE and left < timeout)
                )
        finally:
            worker.stop()
            done.put(None)

    count = max(1, min(processes, len(jobs)))
    threads = [threading.Thread(target=serve, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    while count:
        outcome = done.get()
        if outcome is None:
            count -= 1
        else:
            yield outcome
    for thread in threads:
        thread.join()


class _Worker:
    """A process that is started when it is needed."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._child: tuple[Any, Connection] | None = None

    def ask(self, job: Any, timeout: float) -> Outcome:
        """Run one job."""
        process, connection = self._child or self._start()
        try:
            connection.send(job)
            if not connection.poll(timeout):
                self.stop()
                return Outcome(job, error=_LATE)
            result, error, goes_on = connection.recv()
        except (EOFError, OSError):
            process.join()
            self.stop()
            return Outcome(job, error=f"its process died (exit code {process.exitcode})")
        if not goes_on:
            self.stop()
        return Outcome(job, result, error)

    def _start(self) -> tuple[Any, Connection]:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(theirs, self._function), daemon=True)
        process.start()
        theirs.close()
        self._child = process, ours
        return self._child

    def stop(self) -> None:
        """End the process, whatever it does."""
        if self._child is not None:
            process, connection = self._child
            process.kill()
            process.join()
            connection.close()
            self._child = None


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """The life of a worker: jobs in; (result, error, whether the process is fit for more) out."""
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            result = function(job)
            last = isinstance(result, Last)
            answer = (result.result if last else result, "", not last)
        except Exception as error:
            answer = (None, one_line(error), False)
        connection.send(answer)


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
