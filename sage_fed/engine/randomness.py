"""Random numbers without state: a request's n-th number is a function of its seed and n.

So the tokens of a request depend neither on what else is in the batch nor on restarts.
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """The `index`-th number of `seed`, uniform over the multiples of 2^-52 in [0, 1).

    Two rounds of SplitMix64's finaliser (Steele, Lea, Flood 2014), the first over the seed and
    the second over the index, so that neighbouring seeds share no subsequence.
    52 bits, not 53, so that `u * total < total` for every positive double `total`.
    """
    stream = _mix(((seed & _MASK) + _GOLDEN) & _MASK)
    return (_mix((stream + (index + 1) * _GOLDEN) & _MASK) >> 12) * 2.0**-52


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
