"""Every kind of expert in `open_lm.moe.experts.EXPERTS`, value and slope, as functions inside Triton kernels."""

# Kernels are in Triton's language, which only looks like Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportReturnType=false
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportIndexIssue=false

import triton
import triton.language as tl


@triton.jit
def tanh(x, FAST: tl.constexpr):
    """tanh in float32; FAST is the GPU's instruction, good to 2^-11, for 16-bit results."""
    if FAST:
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        # exp of what is never positive cannot overflow
        e = tl.exp(-2 * tl.abs(x))
        t = (1 - e) / (1 + e)
        return tl.where(x < 0, -t, t)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    if FAST:
        return 0.5 + 0.5 * tanh(0.5 * x, FAST)
    else:
        return tl.sigmoid(x)


@triton.jit
def activate(x, KIND: tl.constexpr, FAST: tl.constexpr):
    """The activation of float32 x."""
    if KIND == "gelu" or KIND == "geglu_tanh":
        t = tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x), FAST)
        half = 0.5 * x
        return half + half * t
    elif KIND == "gelu_exact" or KIND == "geglu":
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif KIND == "relu" or KIND == "reglu":
        return tl.maximum(x, 0.0)
    elif KIND == "relu_squared":
        r = tl.maximum(x, 0.0)
        return r * r
    elif KIND == "silu" or KIND == "swiglu":
        return x * sigmoid(x, FAST)
    else:
        tl.static_assert(KIND == "bilinear", "a kind of expert that this kernel does not know")
        return x


@triton.jit
def activate_and_slope(x, KIND: tl.constexpr, FAST: tl.constexpr):
    """(the activation of float32 x, its derivative)."""
    if KIND == "gelu" or KIND == "geglu_tanh":
        square = x * x
        t = tanh(x * (0.7978845608028654 + 0.035677408136300125 * square), FAST)
        half = 0.5 * x
        slope = 0.7978845608028654 + 0.10703222440890037 * square
        return half + half * t, 0.5 + 0.5 * t + half * (1 - t * t) * slope
    elif KIND == "gelu_exact" or KIND == "geglu":
        below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        return x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "relu" or KIND == "reglu":
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    elif KIND == "relu_squared":
        r = tl.maximum(x, 0.0)
        return r * r, 2 * r
    elif KIND == "silu" or KIND == "swiglu":
        s = sigmoid(x, FAST)
        return x * s, s + x * s * (1 - s)
    else:
        tl.static_assert(KIND == "bilinear", "a kind of expert that this kernel does not know")
        return x, tl.full(x.shape, 1.0, tl.float32)
