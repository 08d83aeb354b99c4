"""The inverse Fourier transform inside a GPU program, in registers.

A length N = T·M has T odd and M a power of two. The T-point transforms come first, one
output at a time, each followed by a transform of length M in passes of radix up to 16. A
pass is plain arithmetic on a tuple of tensors of one shape, so every thread owns whole
butterflies; only between passes do elements change threads (in Stockham's order, so nothing
is ever bit-reversed). No tensor core: at these lengths a transform's 5·N·log2 N operations
cost less than the products that would carry float32 through them, and every GPU computes
them exactly.

Complex tensors go as pairs (real, imaginary). S transforms run side by side, their index
fastest. Roots of unity come from one table per length, see `kernel_layout.root_table`. What
keeps the code this short also keeps compilation short: Triton's passes take time that grows
with the square of a kernel's operations, times its loads and stores.
"""

# mypy: ignore-errors
# ruff: noqa: RET505, RUF005
# Triton compiles these functions itself: their arguments are tensors, tuples and constants
# of its own language, which mypy does not know; a return needs its else, tuples grow by +.

import math

import triton
import triton.language as tl


@triton.constexpr_function
def _cosine(turns, length):
    return math.cos(2 * math.pi * turns / length)


@triton.constexpr_function
def _sine(turns, length):
    return math.sin(2 * math.pi * turns / length)


@triton.constexpr_function
def pass_radix(length, limit):
    """Of the first pass over ``length``: passes as few as can be, then as even as can be."""
    bits, most = length.bit_length() - 1, limit.bit_length() - 1
    return 2 ** -(-bits // max(1, -(-bits // most)))


@triton.jit
def _turned(xr, xi, turn: tl.constexpr, length: tl.constexpr):
    """x · exp(2πi · turn / length), 0 ≤ turn < length / 2; the easy angles without products."""
    if turn == 0:
        return xr, xi
    elif 4 * turn == length:
        return -xi, xr
    else:
        cosine: tl.constexpr = _cosine(turn, length)
        sine: tl.constexpr = _sine(turn, length)
        return xr * cosine - xi * sine, xr * sine + xi * cosine


@triton.jit
def _small_inverse(xr, xi):
    """Inverse transform over tuples of 2^k tensors; natural order."""
    length: tl.constexpr = len(xr)
    if length == 1:
        return xr, xi
    else:
        er, ei = _small_inverse(xr[0::2], xi[0::2])
        odd_r, odd_i = _small_inverse(xr[1::2], xi[1::2])
        yr = ()
        yi = ()
        upper_r = ()
        upper_i = ()
        for k in tl.static_range(length // 2):
            tr, ti = _turned(odd_r[k], odd_i[k], k, length)
            yr = yr + (er[k] + tr,)
            yi = yi + (ei[k] + ti,)
            upper_r = upper_r + (er[k] - tr,)
            upper_i = upper_i + (ei[k] - ti,)
        return yr + upper_r, yi + upper_i


@triton.jit
def _power(wr, wi, exponent: tl.constexpr):
    """w to a power ≥ 1, by squaring: its rounding grows with the logarithm only."""
    if exponent == 1:
        return wr, wi
    else:
        hr, hi = _power(wr, wi, exponent // 2)
        sr = hr * hr - hi * hi
        si = 2 * (hr * hi)
        if exponent % 2 == 0:
            return sr, si
        else:
            return sr * wr - si * wi, sr * wi + si * wr


@triton.jit
def _joined(parts):
    """2^k tensors ``(X,)`` -> one ``(X, 2, … 2)``, the tuple's index in the new axes."""
    count: tl.constexpr = len(parts)
    if count == 1:
        return parts[0]
    else:
        return tl.join(_joined(parts[0::2]), _joined(parts[1::2]))


@triton.jit
def _parted(x, count: tl.constexpr):
    """``(X, count)`` -> count tensors ``(X,)``."""
    block: tl.constexpr = x.shape[0]
    if count == 1:
        return (tl.reshape(x, [block]),)
    else:
        even, odd = tl.split(tl.reshape(x, [block, count // 2, 2]))
        evens = _parted(even, count // 2)
        odds = _parted(odd, count // 2)
        parts = ()
        for i in tl.static_range(count // 2):
            parts = parts + (evens[i], odds[i])
        return parts


@triton.jit
def _interleaved(parts, block: tl.constexpr, inner: tl.constexpr):
    """Outputs of a pass, in the order of the next one's inputs: one flat tensor."""
    count: tl.constexpr = len(parts)
    x = tl.reshape(_joined(parts), [block, inner, count])
    return tl.reshape(tl.permute(x, [0, 2, 1]), [block * inner * count])


@triton.jit
def power_of_two_inverse(
    xr, xi, table, size, length: tl.constexpr, inner: tl.constexpr, limit: tl.constexpr
):
    """Inverse transform of ``length`` points, ``inner`` of them side by side.

    xr, xi: ``(length · inner,)``, point p of transform q at [p·inner + q]; so is the result.
    table: of the passes' roots, real parts; the imaginary ones are ``size`` further on.
    """
    total: tl.constexpr = xr.shape[0]
    if length == 1:
        return xr, xi
    else:
        radix: tl.constexpr = pass_radix(length, limit)
        block: tl.constexpr = length // radix
        part: tl.constexpr = total // radix
        yr, yi = _small_inverse(
            _parted(tl.permute(tl.reshape(xr, [radix, part]), [1, 0]), radix),
            _parted(tl.permute(tl.reshape(xi, [radix, part]), [1, 0]), radix),
        )
        if block == 1:
            return _interleaved(yr, 1, part), _interleaved(yi, 1, part)
        else:
            p = tl.arange(0, part) // inner
            wr = tl.load(table + p)
            wi = tl.load(table + size + p)
            tr = (yr[0],)
            ti = (yi[0],)
            for k in tl.static_range(1, radix):
                pr, pi = _power(wr, wi, k)
                tr = tr + (yr[k] * pr - yi[k] * pi,)
                ti = ti + (yr[k] * pi + yi[k] * pr,)
            zr = _interleaved(tr, block, inner)
            zi = _interleaved(ti, block, inner)
            return power_of_two_inverse(zr, zi, table + block, size, block, inner * radix, limit)


@triton.jit
def odd_output(
    xr, xi, k, table, size, power: tl.constexpr, inner: tl.constexpr, limit: tl.constexpr
):
    """Points k, T + k, 2T + k, … of the inverse transform of a length T·M.

    xr, xi: T tensors ``(M · inner,)``, point t·M + p of transform q at [p·inner + q] of the
    t-th. The result is one such tensor: point T·c + k at [c·inner + q].
    """
    odd: tl.constexpr = len(xr)
    if odd == 1:
        return power_of_two_inverse(xr[0], xi[0], table, size, power, inner, limit)
    else:
        yr = xr[0]
        yi = xi[0]
        for t in tl.static_range(1, odd):
            cosine = tl.load(table + t * k % odd)
            sine = tl.load(table + size + t * k % odd)
            yr += xr[t] * cosine - xi[t] * sine
            yi += xr[t] * sine + xi[t] * cosine
        place = table + odd + k * power + tl.arange(0, power * inner) // inner
        cosine = tl.load(place)
        sine = tl.load(place + size)
        zr = yr * cosine - yi * sine
        zi = yr * sine + yi * cosine
        passes = table + odd + odd * power
        return power_of_two_inverse(zr, zi, passes, size, power, inner, limit)
