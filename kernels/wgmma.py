"""Write `wgmma.cuh`: one struct per width N around `wgmma.mma_async`, for bf16 (k16) and e4m3 (k32).

The instruction names each of its N/2 accumulator registers, so the text for ten widths is made here instead of
kept."""

WIDTHS = (8, 16, 32, 64, 96, 112, 128, 160, 192, 224, 256)  # columns (tokens) of one m64 instruction


def header(widths: tuple[int, ...] = WIDTHS) -> str:
    parts = [
        "// Written by wgmma.py. d[64, N] (+)= a[64, K] @ b[N, K]^T, both operands K-major in shared memory.",
        "#pragma once",
    ]
    parts.append("template <int N> struct Wgmma;")
    for n in widths:
        parts.append(f"template <> struct Wgmma<{n}> {{")
        parts.append(_method("bf16", f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16", n, ", 0, 0"))
        parts.append(_method("e4m3", f"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3", n, ""))
        parts.append("};")
    return "\n".join(parts) + "\n"


def _method(name: str, instruction: str, n: int, transposes: str) -> str:
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    return (
        f"  static __device__ __forceinline__ void {name}(float (&d)[{count}], unsigned long long a, "
        f"unsigned long long b, int add) {{\n"
        f'    asm volatile("{{.reg .pred p; setp.ne.b32 p, %{count + 2}, 0; {instruction} '
        f'{{{registers}}}, %{count}, %{count + 1}, p, 1, 1{transposes};}}"\n'
        f'      : {operands} : "l"(a), "l"(b), "r"(add));\n'
        "  }"
    )
