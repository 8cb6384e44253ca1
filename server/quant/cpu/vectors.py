"""LLVM vector instructions for numba: what the kernels of this package are written in.

numba compiles plain loops well, but leaves products of 8-bit integers to chance. A kernel's innermost part is
therefore spelled out as LLVM instructions on vectors (`Emitter`), and everything around it is ordinary numba. Addresses
are int64; no pointer is checked.

Which instructions multiply 8-bit integers is found once (`ISA`): with AVX-512 VNNI and AVX-VNNI `vpdpbusd` adds four
products to each 32-bit lane; AVX2 pairs `vpmaddubsw` with `vpmaddwd`. Other processors are not served by this package.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from server.config import cache_dir

Isa = Literal["avx512-vnni", "avx-vnni", "avx2"]

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


def detect() -> Isa | None:
    """The best way this processor has to multiply 8-bit integers; OUTPACE_CPU_ISA asks for a lesser one."""
    features = llvm.get_host_cpu_features()
    if not (features.get("avx2") and features.get("fma") and features.get("f16c")):
        return None
    best: list[Isa] = ["avx2"]
    if features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl")):
        best.insert(0, "avx-vnni")
    if features.get("avx512vnni") and features.get("avx512bw") and features.get("avx512vl"):
        best.insert(0, "avx512-vnni")
    wanted = os.environ.get("OUTPACE_CPU_ISA")
    return next((isa for isa in best if isa == wanted), best[0])


ISA: Isa | None = detect()
LANES = 16 if ISA == "avx512-vnni" else 8
"""Outputs that a tile of a weight has: the 32-bit lanes of a register."""


def _own_cache() -> Path:
    """Where compiled code is kept: no change of this package can meet code of an older one there."""
    digest = hashlib.sha256(f"{ISA}".encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    directory = cache_dir() / "cpu-kernels" / digest.hexdigest()[:16]
    setattr(numba.config, "CACHE_DIR", str(directory))  # noqa: B010  # made at run time
    return directory


_CACHE = _own_cache()


def cached(function: str) -> bool:
    """Whether this version's compiled code of a function of that name is kept."""
    return any(_CACHE.rglob(f"*.{function}-*.nbc"))


jit: Callable[..., Any] = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")
"""Decorator of this package's functions."""


class Emitter:
    """Instructions on vectors at the place that `builder` is at."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    # -- constants, memory ---------------------------------------------------------------------------------

    def full(self, element: ir.Type, lanes: int, value: float) -> ir.Value:
        """A constant vector of one value."""
        return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)

    def splat(self, value: ir.Value, lanes: int) -> ir.Value:
        """A vector of one value."""
        nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        return self.shuffle(self.b.insert_element(nothing, value, I32(0)), [0] * lanes)

    def shuffle(self, value: ir.Value, order: list[int]) -> ir.Value:
        """Lanes `order` of a vector."""
        indices = ir.Constant(ir.VectorType(I32, len(order)), order)
        return self.b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), indices)

    def pointer(self, address: ir.Value, offset: int | ir.Value, kind: ir.Type) -> ir.Value:
        """Pointer to a `kind` that lies `offset` bytes after `address`."""
        offset = I64(offset) if isinstance(offset, int) else offset
        return self.b.inttoptr(self.b.add(address, offset), ir.PointerType(kind))

    def load(self, address: ir.Value, offset: int | ir.Value, kind: ir.Type) -> ir.Value:
        """Reads a `kind`, however it is aligned."""
        return self.b.load(self.pointer(address, offset, kind), align=1)

    def store(self, value: ir.Value, address: ir.Value, offset: int | ir.Value = 0) -> None:
        """Writes a value, however it is aligned."""
        self.b.store(value, self.pointer(address, offset, value.type), align=1)

    def prefetch(self, address: ir.Value, num_bytes: int) -> None:
        """Asks for the cache lines from `address` on."""
        for offset in range(0, num_bytes, 64):
            pointer = self.pointer(address, offset, I8)
            self.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))

    def variable(self, value: ir.Value) -> ir.Value:
        """A place on the stack, which becomes a register; use `self.b.load` and `self.b.store`."""
        return cgutils.alloca_once_value(self.b, value)

    # -- arithmetic ----------------------------------------------------------------------------------------

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Calls a function by its symbol."""
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, name), arguments)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """X * y + z, rounded once: the same bits wherever it is compiled."""
        return self.call(f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)

    def unary(self, name: str, x: ir.Value) -> ir.Value:
        """`fabs`, `sqrt`, `roundeven`… of a float vector."""
        return self.call(f"llvm.{name}.v{x.type.count}f32", x.type, x)

    def maximum(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """The larger, lane by lane; NaN where one is."""
        return self.call(f"llvm.maximum.v{x.type.count}f32", x.type, x, y)

    def reduce(self, value: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]) -> ir.Value:
        """All lanes combined, halves first: one order of operations wherever it is compiled."""
        while value.type.count > 1:
            half = value.type.count // 2
            low, high = (self.shuffle(value, list(range(at, at + half))) for at in (0, half))
            value = combine(low, high)
        return self.b.extract_element(value, I32(0))

    def dot(self, total: ir.Value, unsigned: ir.Value, signed: ir.Value) -> ir.Value:
        """Adds to total [L] i32 the sums of four products of unsigned [4 L] u8 and signed [4 L] i8.

        With AVX2 sums of two products must fit 16 bits: `unsigned` is at most 128 there.
        """
        lanes = total.type.count
        if ISA != "avx2":
            width = "512" if lanes == 16 else "256"
            words = (self.b.bitcast(v, total.type) for v in (unsigned, signed))
            return self.call(f"llvm.x86.avx512.vpdpbusd.{width}", total.type, total, *words)
        pairs = self.call("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 2 * lanes), unsigned, signed)
        fours = self.call("llvm.x86.avx2.pmadd.wd", total.type, pairs, self.full(I16, 2 * lanes, 1))
        return self.b.add(total, fours)

    def exp(self, x: ir.Value) -> ir.Value:
        """Exponential of x for x <= 88; 0 below -87. Within 2 units in the last place.

        x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial in r (Cephes' expf, Moshier 1989).
        """
        b, lanes = self.b, x.type.count
        constant = lambda value: self.full(F32, lanes, value)  # noqa: E731
        n = self.unary("roundeven", b.fmul(x, constant(1.44269504088896341)))
        r = self.fma(n, constant(-0.693359375), x)
        r = self.fma(n, constant(2.12194440e-4), r)
        series = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
        p = constant(series[0])
        for coefficient in series[1:]:
            p = self.fma(p, r, constant(coefficient))
        p = b.fadd(self.fma(p, b.fmul(r, r), r), constant(1.0))
        exponent = b.add(b.fptosi(n, ir.VectorType(I32, lanes)), self.full(I32, lanes, 127))
        power = b.bitcast(b.shl(exponent, self.full(I32, lanes, 23)), x.type)
        return b.select(b.fcmp_ordered("<", x, constant(-87.0)), constant(0.0), b.fmul(p, power))


def kernel(arguments: tuple[types.Type, ...], result: types.Type = types.void) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: a function that emits instructions, `body(emitter, *values)`, to one that jitted code can call."""

    def decorate(body: Callable[..., Any]) -> Any:
        def definition(typing_context: Any, *given: types.Type) -> Any:
            def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[ir.Value]) -> ir.Value:
                made = body(Emitter(builder), *values)
                return context.get_dummy_value() if made is None else made

            return result(*arguments), generate

        names = ["typing_context", *list(inspect.signature(body).parameters)[1:]]
        positional = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        definition.__name__ = body.__name__
        definition.__signature__ = inspect.Signature(positional)  # type: ignore[attr-defined]  # numba asks for names
        return intrinsic(definition)

    return decorate


def addresses(count: int) -> tuple[types.Type, ...]:
    """Types of so many int64 arguments."""
    return (types.int64,) * count
