"""Options of echo-state networks that are refused at once."""

from __future__ import annotations

from numbers import Real

from nnarch.nn.reservoir import Scaling


def check_network(
    inputs: int, sizes: tuple[int, ...], outputs: int, washout: int, feedback: float,
    bidirectional: bool,
) -> None:  # fmt: skip
    """Sizes, and what excludes each other."""
    name = "EchoStateNetwork"
    if inputs < 0 or (inputs == 0 and not feedback):
        raise ValueError(
            f"{name}: inputs must be at least 1, or 0 with feedback_scaling; got {inputs}"
        )
    if not sizes or min(sizes) < 1:
        raise ValueError(f"{name}: units must be positive, got {sizes}")
    if outputs < 1:
        raise ValueError(f"{name}: outputs must be at least 1, got {outputs}")
    if washout < 0:
        raise ValueError(f"{name}: washout must be at least 0, got {washout}")
    if feedback and bidirectional:
        raise ValueError(f"{name}: a bidirectional network cannot feed back its output")


def check_fit(solver: str, ridge: float, noise: float) -> None:
    """What the readout is fitted with."""
    name = "EchoStateNetwork"
    if solver not in ("ridge", "lstsq"):
        raise ValueError(f"{name}: solver must be 'ridge' or 'lstsq', got {solver!r}")
    if not ridge >= 0:
        raise ValueError(f"{name}: ridge must be at least 0, got {ridge}")
    if not noise >= 0:
        raise ValueError(f"{name}: noise must be at least 0, got {noise}")


def per_input(scaling: Scaling, inputs: int) -> list[float]:
    """One number for each input."""
    if isinstance(scaling, (int, float, Real)):
        return [float(scaling)] * inputs
    if len(scaling) != inputs:
        raise ValueError(
            f"EchoStateNetwork: input_scaling must be a number or {inputs} numbers, "
            f"got {len(scaling)}"
        )
    return [float(s) for s in scaling]
