"""Compile the launches of the Triton kernels ahead of time and read what came out.

A case calls a launcher with meta tensors while :func:`nnarch.kernels.gpu.launch.record` collects
its launches, so what is compiled here is what a GPU would be sent: same arguments, same
specialisation, same options. No driver is needed. Everything this reports is *compiled* or
*predicted*, nothing is measured.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from nnarch.kernels.gpu import tiles
from nnarch.kernels.gpu.launch import Launch, record
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable

FAMILIES = (
    "conv2d",
    "conv_transpose2d",
    "depthwise",
    "depthwise_separable",
    "linear",
    "pooling",
    "normalization",
    "activation",
    "recurrent",
    "local_response_norm",
    "layer_norm",
    "upsample",
    "capsule_routing",
    "dropout",
    "embedding",
    "cross_entropy",
    "attention",
)

_TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class StaticCase:
    """An operation at the shape that its kernels are meant for.

    Attributes:
        name: operation and shape, such as "conv2d 3×3 C64 H56 N8".
        run: calls the launcher on meta tensors of the given dtype.
        flops: of the operation, two for a multiply-add.
        elements: tensor elements that must be read or written, in the dtype of the case.
        fixed_bytes: what must move on top in any dtype, such as int64 indices.
        matrix: whether its main kernel multiplies matrices.
        main: which of its launches does the work that is counted; the others prepare or finish it.
        only: the precision that it ever runs in; "" where it runs in all.
        shared_bytes: of shared memory without which another algorithm serves the case.
    """

    name: str
    run: Callable[[torch.dtype], Any]
    flops: float
    elements: float
    fixed_bytes: float = 0.0
    matrix: bool = False
    main: int = 0
    only: str = ""
    shared_bytes: int = 0


# -------------------------------------------------------------------------- cases and launches


def family_cases(families: Iterable[str] = FAMILIES) -> dict[str, list[StaticCase]]:
    """The `STATIC_CASES` of the families' triton_kernel.py."""
    return {
        family: list(importlib.import_module(f"nnarch.kernels.{family}.triton_kernel").STATIC_CASES)
        for family in families
    }


def meta(*size: int, dtype: torch.dtype, channels_last: bool = True) -> torch.Tensor:
    """An input for a case: no storage; 4-D tensors channels_last."""
    last = channels_last and len(size) == 4
    format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=format)


def precisions(case: StaticCase, target: Target) -> tuple[str, ...]:
    """What to compile a case for: "float16", and float32 by each dot precision of the target."""
    if target.shared_bytes < case.shared_bytes:
        return ()
    if case.only:
        return (case.only,)
    if not case.matrix:
        return ("float16", "float32")
    return ("float16", *target.dot_precisions)


@dataclass(frozen=True)
class Variant:
    """The launches of a case with one tile.

    Attributes:
        launches: in order.
        tile: None where the launcher does not choose among several.
        problem: what the tile was chosen for.
        table: name of the tiles' table; "" as for `tile`.
        default: whether this is what runs without a search.
    """

    launches: tuple[Launch, ...]
    tile: Tile | None
    problem: Problem | None
    table: str
    default: bool


def variants(case: StaticCase, target: Target, precision: str) -> Iterator[Variant]:
    """A case's launches with the default tile first, then with every other that fits."""
    launches, asked = _record(case, target, precision, {})
    if not asked:
        yield Variant(launches, None, None, "", True)
        return
    table, problem = asked[0]
    candidates = table.candidates(problem, target)
    for candidate in candidates:
        launches, _ = _record(case, target, precision, {table.name: candidate})
        yield Variant(launches, candidate, problem, table.name, candidate == candidates[0])


def _record(
    case: StaticCase, target: Target, precision: str, forced: dict[str, Tile]
) -> tuple[tuple[Launch, ...], list[tuple[TileTable, Problem]]]:
    dtype = torch.float16 if precision == "float16" else torch.float32
    dots = precision if precision in ("ieee", "tf32", "tf32x3") else ""
    with tiles.force(**forced), tiles.asked() as asked, record(target, dots) as launches:
        case.run(dtype)
    return tuple(launches), asked


# ---------------------------------------------------------------------------------- compiling


@dataclass(frozen=True)
class Binary:
    """Resources and code of a compiled kernel.

    Attributes:
        stack_reads: NVIDIA's only: instructions that take the stack pointer (R1) for an operand. In
            a kernel without a stack they are the assembler's mistake: R1 stands for a value that
            was never computed (ptxas 12.8, in descriptors of sm_90's products).
    """

    registers: int
    spills: int
    shared: int
    matrix_instructions: int
    stack_reads: int = 0


def compile_launch(launch: Launch, target: Target) -> Binary:
    """Compile a recorded launch for a target and read its binary."""
    source = ASTSource(launch.kernel, *_specialise(launch))
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    compiled = triton.compile(source, target=gpu, options=launch.options)
    shared, matrix = int(compiled.metadata.shared), _matrix_instruction(launch, target)
    if target.backend == "hip":
        return _read_amdgcn(compiled.asm["amdgcn"], shared, matrix)
    return _read_cubin(compiled.asm["cubin"], shared, matrix)


def _matrix_instruction(launch: Launch, target: Target) -> str:
    """What a launch should multiply matrices with, a regex. Those of Hopper and Blackwell that read
    shared memory take at least 64 rows: smaller tiles have the instruction of the GPUs before."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_B")
    sizes = [launch.arguments[name] for name in names if name in launch.arguments]
    small = target.operands == "shared" and max(sizes, default=64) < 64
    return "HMMA" if small else target.matrix


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes, as Triton derives them from a launch's arguments."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.arguments[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = _type_name(value)
        aligned = isinstance(value, torch.Tensor) or (type(value) is int and value % 16 == 0)
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_name(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPE_NAMES[value.dtype]
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPE_NAMES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read_cubin(cubin: bytes, shared: int, matrix: str) -> Binary:
    usage = _cuobjdump(cubin, "-res-usage")
    fields = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    code = _cuobjdump(cubin, "-sass")
    return Binary(
        registers=fields["REG"],
        spills=fields["STACK"] + fields["LOCAL"],
        shared=shared,
        matrix_instructions=_count(matrix, code),
        stack_reads=len(re.findall(r"\*/ +[^;\n]*, *-?\|?R1\b[^;\n]*;", code)),
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_amdgcn(assembly: str, shared: int, matrix: str) -> Binary:
    def field(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", assembly)), default=0)

    return Binary(
        registers=field("vgpr_count"),
        spills=field("private_segment_fixed_size"),
        shared=shared,
        matrix_instructions=_count(matrix, assembly),
    )


def _count(instruction: str, code: str) -> int:
    return len(re.findall(rf"\b{instruction}\w*", code))
