"""The randomness of a draw and the masses that filters compare, equal bit by bit anywhere.

A draw is Gumbel-max: of the ids that the filters leave, the one with the highest
`(logit - best logit) / temperature + noise`, of equal ones the lowest. The noise is a function of
(seed, index, id) alone, so that two models that are given the same seed and index tend to draw the
same token, and one model always does. `native/draw.cpp` says the same in C++; both round each
operation of fp32 once (no fused multiply-add), in the order that stands here, so their bits agree,
and so must those of any other way to compute them. A change of any bit is a new `DRAW_VERSION` of
`core`.

The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014), thrice: over the seed, the index
and the id. Its upper 32 bits k are w = (k + 1/2) / 2^32 of (0, 1), and the noise is
`-log(-log(1 - w))`; both logarithms are the polynomial of Cephes's `logf`. Above one half
1 - w is made of the bits' complement, so that neither end loses digits.
The noise lies between -3.14 and `NOISE_MAX`: an id whose score is lower than that of
another by more can't win, and needs none.
"""

from __future__ import annotations

import torch

NOISE_MAX = 22.875
"""No noise is higher: 33 * log(2) = 22.8739, rounded up."""

WEIGHT_ONE = 1 << 44
"""The weight of the best id: half a million of them add up to less than 2^63."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def draw_key(seed: int, index: int) -> int:
    """The 64 bits, signed, that the noise of output token `index` follows from."""
    stream = _mix(((seed & _MASK) + _GOLDEN) & _MASK)
    return _signed(_mix((stream + (index + 1) * _GOLDEN) & _MASK))


def noise(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Noise fp32 of ids under keys, both int64 and of shapes that broadcast."""
    return gumbel(_mixed(keys + (ids + 1) * _signed(_GOLDEN)) >> 32 & 0xFFFFFFFF)


def gumbel(k: torch.Tensor) -> torch.Tensor:
    """`-log(-log(1 - w))` in fp32 for w = (k + 1/2) / 2^32, `k` int64 below 2^32."""
    upper = k >= 1 << 31
    small = (torch.where(upper, 0xFFFFFFFF - k, k).float() + 0.5) * 2.0**-32
    near = ~upper & (small < 0.25)  # 1 - w would lose w's digits
    f, e = _split(torch.where(upper, small, 1.0 - small))
    exponential = -_log(torch.where(near, -small, f), torch.where(near, 0.0, e))
    return -_log(*_split(exponential))


def weights(relative: torch.Tensor) -> torch.Tensor:
    """`exp(relative) * WEIGHT_ONE` as int64, for fp32 `relative` <= 0.

    Integers, so that a sum of them does not depend on the order in which it is made.
    """
    x = relative.clamp_min(-40.0)
    n = torch.round(x * 1.44269504)
    r = (x - n * 0.693359375) - n * -2.12194440e-4
    y = torch.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        y = y * r + coefficient
    y = (y * (r * r) + r) + 1.0
    scaled = (y.view(torch.int32) + (n.int() << 23)).view(torch.float32)
    return (scaled * float(WEIGHT_ONE)).long()


def ranks(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 that order fp32 scores and, among equal ones, lower ids first: higher is better."""
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: -0.0 is no less than 0.0
    return ((bits ^ (bits >> 31 & 0x7FFFFFFF)) << 32) + (0xFFFFFFFF - ids)


def ids_of(ranked: torch.Tensor) -> torch.Tensor:
    """The ids in what `ranks` returned."""
    return 0xFFFFFFFF - (ranked & 0xFFFFFFFF)


_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_EXP = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_SQRT_HALF = 0x3F3504F3


def _split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """F and e with x = (1 + f) * 2^e and 1 + f between sqrt(1/2) and sqrt(2); both fp32."""
    bits = x.view(torch.int32)
    e = (bits - _SQRT_HALF) >> 23
    return (bits - (e << 23)).view(torch.float32) - 1.0, e.float()


def _log(f: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """log((1 + f) * 2^e), as Cephes's `logf` computes it."""
    z = f * f
    y = torch.full_like(f, _LOG[0])
    for coefficient in _LOG[1:]:
        y = y * f + coefficient
    y = (y * f) * z
    y = (y + e * -2.12194440e-4) - z * 0.5
    return (f + y) + e * 0.693359375


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _mixed(value: torch.Tensor) -> torch.Tensor:
    """`_mix` of int64, whose products wrap and whose shifts have to lose the sign."""
    value = (value ^ (value >> 30 & (1 << 34) - 1)) * _signed(_FIRST)
    value = (value ^ (value >> 27 & (1 << 37) - 1)) * _signed(_SECOND)
    return value ^ (value >> 31 & (1 << 33) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
