"""A driver for tests of launch plans: functions as CUDA has them that only take notes."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace

STREAM = 77  # torch's current one
_NUMBERS, _BOX = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
_DESCRIBE = (
    ctypes.c_int, _NUMBERS, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, _NUMBERS, _NUMBERS,
    _BOX, _BOX, *4 * [ctypes.c_int],
)  # fmt: skip
_LAUNCH = (ctypes.c_int, ctypes.c_void_p, *7 * [ctypes.c_uint], ctypes.c_void_p, ctypes.c_void_p)


class Driver:
    """What CUDA's driver and torch would be asked, and what they say."""

    def __init__(self) -> None:
        self.launches: list[SimpleNamespace] = []
        self.descriptions: list[SimpleNamespace] = []
        self.device, self.fails, self.parameters = -1, False, 0
        self.functions = (
            ctypes.CFUNCTYPE(*_LAUNCH, ctypes.c_void_p)(lambda *a: self.launch(False, *a[:-1])),
            ctypes.CFUNCTYPE(*_LAUNCH)(lambda *a: self.launch(True, *a)),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))(self.current_device),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.POINTER(ctypes.c_uint64))(
                self.current_stream
            ),
            ctypes.CFUNCTYPE(*_DESCRIBE)(self.describe),
        )

    def addresses(self) -> list[int]:
        return [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in self.functions]

    def launch(self, cooperative, function, *rest) -> int:
        *blocks, shared, stream, parameters = rest
        words = ctypes.cast(parameters, ctypes.POINTER(ctypes.POINTER(ctypes.c_uint64)))
        values = [words[i][0] for i in range(self.parameters)]
        note = SimpleNamespace(function=function, blocks=blocks, shared=shared, stream=stream)
        note.cooperative, note.values = cooperative, values
        note.thread = threading.get_ident()
        self.launches.append(note)
        return int(self.fails)

    def describe(self, to, kind, rank, start, sizes, strides, box, every, *options) -> int:
        assert ctypes.addressof(to.contents) % 64 == 0 and every[:rank] == rank * [1]
        note = SimpleNamespace(kind=kind, start=start, sizes=sizes[:rank], box=box[:rank])
        note.strides, note.options = strides[: rank - 1], options
        self.descriptions.append(note)
        to[0] = 1000 + len(self.descriptions)
        return int(self.fails)

    def current_device(self, to) -> int:
        to[0] = self.device
        return 0

    def current_stream(self, device, to) -> int:
        assert device == -1
        to[0] = STREAM
        return 0
