"""Functions that need a process of their own, which a server forks: torch is imported once.

For what a process decides once (the instruction set) or never takes back (its peak of memory).
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "nnarch.functional", "numpy", "pytest", "hypothesis"])


def measures_memory(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of a peak of memory: Linux alone counts it in kB, and sanitizers add to it."""
    on_linux = pytest.mark.skipif(
        not sys.platform.startswith("linux"), reason="ru_maxrss is in kB on Linux alone"
    )
    return pytest.mark.no_sanitizer(on_linux(test))


def alone(
    function: Callable[..., Any],
    *arguments: object,
    environment: dict[str, str] | None = None,
    timeout: float = 120,
) -> Any:
    """The result of function(*arguments) in a new process with one thread and torch's seed 0.

    Args:
        function: of a module, not a local one; so is what it returns.
        environment: added to this process's before the function runs.
        timeout: in seconds.

    Raises:
        AssertionError: with its traceback if the function raised; if its process died or took
            too long.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    call = pickle.dumps((function, arguments))  # whose module is imported in the environment
    process = _CONTEXT.Process(target=_run, args=(sender, environment or {}, call))
    process.start()
    sender.close()
    try:
        assert receiver.poll(timeout), f"{function.__name__} took more than {timeout} seconds"
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"{function.__name__} died, exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    assert error is None, error
    return result


def _run(sender: Connection, environment: dict[str, str], call: bytes) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        function, arguments = pickle.loads(call)
        sender.send((function(*arguments), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_pytest(*arguments: str, environment: dict[str, str], timeout: float = 1800) -> str:
    """What `pytest` with these arguments prints in a process of its own.

    For what is decided when a package is imported: the server has imported torch and nnarch alone.

    Raises:
        AssertionError: with what it prints, if a test failed.
    """
    code, output = alone(_pytest, arguments, environment=environment, timeout=timeout)
    assert code == 0, output
    return output


def _pytest(arguments: tuple[str, ...]) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments])
    return int(code), output.getvalue()
