"""GELU and its derivative inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

ERF, TANH, QUICK = 1, 2, 3


@triton.jit
def _phi_erf(x, CHEAP: tl.constexpr):
    """Return the normal distribution's Phi(x) and density(x)."""
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if CHEAP:
        # Hastings' rational form of erfc on the density's own exponential: absolute error of Phi below 8e-8, far under the
        # rounding of half precision, and at most 3e-3 of Phi itself in its left tail; half the instructions of erf.
        z = tl.abs(x) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.3275911 * z)
        series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = series * (1.2533141373155001 * density)
        phi = tl.where(x > 0, 1.0 - tail, tail)
        phi = tl.where(x == x, phi, x)
    else:
        phi = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
    return phi, density


@triton.jit
def _phi_tanh(x):
    """Return ``(1 + tanh(u)) / 2`` and its derivative by ``2u``, for ``2u = sqrt(8 / pi) (x + 0.044715 x^3)``.

    From ``exp(-|2u|)``, which cannot overflow; and the derivative without subtracting nearly equal numbers.
    """
    inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    z = tl.exp(-tl.abs(inner))
    upper = 1.0 / (1.0 + z)
    return tl.where(inner >= 0, upper, z * upper), z * upper * upper


@triton.jit
def times_sigmoid(x, ALPHA: tl.constexpr):
    """Return ``x sigmoid(ALPHA x)`` and its derivative, from an exponential that cannot overflow."""
    z = tl.exp(-tl.abs(ALPHA * x))
    upper = 1.0 / (1.0 + z)
    sigma = tl.where(x >= 0, upper, z * upper)
    return x * sigma, sigma + ALPHA * x * (z * upper * upper)


@triton.jit
def gelu(x, ACTIVATION: tl.constexpr, CHEAP: tl.constexpr):
    """``x Phi(x)``, Phi from erf (1) or tanh (2) as in ``torch.nn.functional.gelu``, or ``x sigmoid(1.702 x)`` (3)."""
    if ACTIVATION == 3:
        value, _ = times_sigmoid(x, 1.702)
    elif ACTIVATION == 1:
        phi, _ = _phi_erf(x, CHEAP)
        value = x * phi
    else:
        phi, _ = _phi_tanh(x)
        value = x * phi
    return value


@triton.jit
def gelu_and_derivative(x, ACTIVATION: tl.constexpr, CHEAP: tl.constexpr):
    """Return ``gelu(x)`` and ``gelu'(x)``."""
    if ACTIVATION == 3:
        value, derivative = times_sigmoid(x, 1.702)
    elif ACTIVATION == 1:
        phi, density = _phi_erf(x, CHEAP)
        derivative = phi + x * density
        value = x * phi
    else:
        phi, slope = _phi_tanh(x)
        derivative = phi + x * slope * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        value = x * phi
    return value, derivative
