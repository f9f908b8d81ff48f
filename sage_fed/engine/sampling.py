"""From logits to tokens: penalties, filters, draws and log-probabilities, row by row.

Order, as in `transformers`: penalties, temperature, top_k, top_p, min_p; each filter
sees the distribution renormalised over what the previous ones left. (vLLM applies min_p before
top_k; being relative to the best token it commutes with top_k, but not with top_p.)
Of equal logits at the edge of top_k or top_p the lower ids stay; the masses that top_p compares
are integers, so that no order of adding them moves the edge. Log-probabilities are of the raw
logits, in fp32, before any of the above. Logits hold the tokenizer's own ids only, so padding of
the vocabulary can neither be drawn nor counted.
A row with a NaN or an infinite best has no token: `argmax` finds either, so one look at the best
logit of each row tells, which costs one gather of as many numbers as there are rows.
Every function works on the device and waits for nothing: settings cross to it in one copy,
results come back in another, and `Picked.choices` reads them when they are there.

A draw is Gumbel-max: of the ids that the filters leave, the one with the highest
`(logit - best logit) / temperature + noise`, of equal ones the lowest. The noise is a function of
(seed, index, id) alone, so that two models that are given the same seed and index tend to draw the
same token, and one model always does, whatever else is in the batch and after any restart.
`native/draw.cpp` says the same in C++; both round each operation of fp32 once (no fused
multiply-add), in the order that stands here, so their bits agree, and so must those of any other
way to compute them. A change of any bit is a new `DRAW_VERSION` of `core`.

The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014), thrice: over the seed, the index
and the id. Its upper 32 bits k are w = (k + 1/2) / 2^32 of (0, 1), and the noise is
`-log(-log(1 - w))`; both logarithms are the polynomial of Cephes's `logf`. Above one half
1 - w is made of the bits' complement, so that neither end loses digits.
The noise lies between -3.14 and `NOISE_MAX`: an id whose score is lower than that of
another by more can't win, and needs none.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from sage_fed.core import Logprob, Sampling
from sage_fed.engine.batch import Packer, Vectors
from sage_fed.engine.native.library import DrawRowStruct, Library
from sage_fed.steps import NO_TOKEN, Draw

Choice = tuple[int, Logprob | None]

_COLDEST = 1e-30  # a lower temperature would round to zero in fp32 and make 0 / 0

NOISE_MAX = 22.875
"""No noise is higher: 33 * log(2) = 22.8739, rounded up."""

WEIGHT_ONE = 1 << 44
"""The weight of the best id: half a million of them add up to less than 2^63."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class Picked:
    """Tokens that the device has chosen, perhaps only in a moment.

    `tokens` is int64 [rows]. `results` is all that the host wants of them, in one tensor:
    the tokens, or float64 [rows, 2 + 2 * width] with the log-probabilities. A token that means
    nothing is `NO_TOKEN` there, and some id of the vocabulary in `tokens`.
    """

    tokens: torch.Tensor
    results: torch.Tensor
    draws: tuple[Draw, ...]

    def choices(self, results: torch.Tensor) -> list[Choice]:
        """Read `results`, or their copy on the host."""
        if results.dim() == 1:
            return [(token, None) for token in results.tolist()]
        return _read_logprobs(results, self.draws)


def pick(
    logits: torch.Tensor,
    draws: Sequence[Draw],
    best: torch.Tensor | None = None,
    kernels: Library | None = None,
) -> Picked:
    """Choose a token for every row of `logits` [rows, ids], of any floating type.

    `best` is their `best_of`, where it is known.
    With `kernels` the logits are fp32 on the host, and changed for the time of the call.
    """
    kept = tuple(draws)
    if all(_is_plain(draw.sampling) for draw in draws):
        marked = best_of(logits) if best is None else best
        return Picked(marked.clamp_min(0), marked, kept)
    raw = logits.float()
    if kernels is None:
        tokens, marked = _picked(raw, draws)
    else:
        marked = _picked_by(kernels, raw, draws)
        tokens = marked.clamp_min(0)
    if all(draw.sampling.top_logprobs is None for draw in draws):
        return Picked(tokens, marked, kept)
    return Picked(tokens, _with_logprobs(raw, tokens, marked, draws), kept)


def _picked_by(kernels: Library, logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """A token for each row, by the kernels; `NO_TOKEN` for one that is not finite."""
    rows = (DrawRowStruct * len(draws))()
    for row, draw in zip(rows, draws, strict=True):
        s = draw.sampling
        row.key = draw_key(s.seed, draw.index)
        row.top_p, row.top_k = s.top_p, s.top_k
        row.temperature, row.log_min_p = _scales(s)
        if s.greedy:
            row.temperature = 0.0
    packer = Packer()
    penalties = _pack_penalties(draws, logits.shape[1], packer)
    tokens = torch.empty(len(draws), dtype=torch.int64)
    vectors = packer.move(logits.device)
    changes = _penalise(logits, [vectors[index] for index in penalties])
    kernels.draw(logits.data_ptr(), logits.stride(0), logits.shape[1], rows, tokens.data_ptr())
    for changed in reversed(changes):
        logits.index_put_(changed.at, changed.before)
    return tokens


def _picked(raw: torch.Tensor, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor]:
    """A token for each row, and the same with `NO_TOKEN` for one that is not finite."""
    packer = Packer()
    penalties = _pack_penalties(draws, raw.shape[1], packer)
    methods = [
        (method, packer.add(rows), *_Controls.pack([draws[row] for row in rows], packer))
        for method, rows in _by_method(draws).items()
    ]
    vectors = packer.move(raw.device)
    scores = raw.clone() if penalties else raw
    _penalise(scores, [vectors[index] for index in penalties])
    tokens = scores.argmax(-1)
    finite = _finite(scores, tokens)
    for method, at, controls_at, keys_at, largest_top_k in methods:
        rows, columns = vectors[at], vectors[controls_at].view(torch.float64)
        controls = _Controls.of(columns, vectors[keys_at], largest_top_k)
        if rows.shape[0] == len(draws):
            tokens = method(scores, controls)
        else:
            tokens.index_copy_(0, rows, method(scores.index_select(0, rows), controls))
    return tokens, _marked(tokens, finite)


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Choose, and wait for it."""
    picked = pick(logits, draws)
    return picked.choices(picked.results)


def best_of(logits: torch.Tensor) -> torch.Tensor:
    """The argmax of each row; `NO_TOKEN` for one that is not finite."""
    tokens = logits.argmax(-1)
    return _marked(tokens, _finite(logits, tokens))


def _finite(scores: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Whether each row's scores are numbers: a NaN anywhere is what `argmax` takes for the best."""
    return scores.gather(-1, best[:, None]).squeeze(-1).isfinite()


def _marked(tokens: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    return torch.where(finite, tokens, NO_TOKEN)


def _is_plain(sampling: Sampling) -> bool:
    return sampling.greedy and not sampling.penalises and sampling.top_logprobs is None


def _pack_penalties(draws: Sequence[Draw], num_ids: int, packer: Packer) -> tuple[int, ...]:
    """Pack rows, ids and factors, then rows, ids and offsets; nothing where there are none."""
    rows, ids, factors = array("q"), array("q"), array("d")
    counted_rows, counted, offsets = array("q"), array("q"), array("d")
    for row, draw in enumerate(draws):
        s = draw.sampling
        seen = draw.seen
        if seen and max(seen) >= num_ids:
            seen = tuple(token for token in seen if token < num_ids)
        ids.extend(seen)
        rows.extend(array("q", (row,)) * len(seen))
        factors.extend(array("d", (s.repetition_penalty,)) * len(seen))
        counts = [one for one in draw.counts if one[0] < num_ids]
        counted.extend([token for token, _ in counts])
        counted_rows.extend(array("q", (row,)) * len(counts))
        presence, frequency = s.presence_penalty, s.frequency_penalty
        offsets.extend([presence + count * frequency for _, count in counts])
    if not ids and not counted:
        return ()
    first = packer.add(rows), packer.add(ids), packer.add_doubles(factors)
    return *first, packer.add(counted_rows), packer.add(counted), packer.add_doubles(offsets)


@dataclass(frozen=True, slots=True)
class _Changed:
    """Logits that a penalty has changed: where they are, and what was there."""

    at: tuple[torch.Tensor, torch.Tensor]
    before: torch.Tensor


def _penalise(logits: torch.Tensor, packed: Vectors) -> list[_Changed]:
    """Change logits [rows, ids] by the penalties of earlier tokens; undone in reverse order.

    First the repetition penalty, which scales away from choice as CTRL (arXiv 1909.05858) does,
    then presence and frequency penalties are subtracted, as the OpenAI API defines them:
    `logit - presence - count * frequency` for a token that the output has `count` times. What
    becomes larger than the type ends at its bounds, because what is not finite is the model's
    fault, never a setting's.
    """
    if not packed:
        return []
    rows, ids, factors, counted_rows, counted, offsets = packed
    scaled, lowered = _Changed((rows, ids), logits[rows, ids]), (counted_rows, counted)
    before, factor = scaled.before, factors.view(torch.float64).float()
    worse = torch.where(before > 0, before / factor, before * factor)
    logits.index_put_(scaled.at, _bounded(before, worse))
    then = _Changed(lowered, logits[lowered])
    offset = offsets.view(torch.float64).float()
    logits.index_put_(then.at, _bounded(then.before, then.before - offset))
    return [scaled, then]


def _bounded(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`after`, within its type's bounds where `before` was."""
    bound = torch.finfo(after.dtype).max
    return torch.where(before.isfinite(), after.clamp(-bound, bound), after)


@dataclass(frozen=True, slots=True)
class _Controls:
    """The settings of some rows on the device, each [rows, 1].

    `temperature` and `log_min_p`, -inf where min_p is off, are fp32, `top_k` and `top_p` float64,
    `key` int64: what each row's noise follows from.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    key: torch.Tensor
    largest_top_k: int

    @staticmethod
    def pack(draws: Sequence[Draw], packer: Packer) -> tuple[int, int, int]:
        """Pack the settings; the places of settings and keys, and the largest top_k."""
        values = array("d")
        for draw in draws:
            s = draw.sampling
            values.extend((*_scales(s), float(s.top_k), s.top_p))
        keys = [draw_key(draw.sampling.seed, draw.index) for draw in draws]
        largest_top_k = max(draw.sampling.top_k for draw in draws)
        return packer.add_doubles(values), packer.add(keys), largest_top_k

    @classmethod
    def of(cls, values: torch.Tensor, keys: torch.Tensor, largest_top_k: int) -> Self:
        """What was packed, on the device: float64 [rows * 4] and int64 [rows]."""
        columns = values.view(keys.shape[0], 4, 1)
        temperature, log_min_p = columns[:, :2].float().unbind(1)
        top_k, top_p = columns[:, 2:].unbind(1)
        return cls(temperature, top_k, top_p, log_min_p, keys[:, None], largest_top_k)


def _scales(sampling: Sampling) -> tuple[float, float]:
    """The temperature that scores are divided by, and the log of min_p."""
    floor = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
    return max(sampling.temperature, _COLDEST), floor


Pick = Callable[[torch.Tensor, _Controls], torch.Tensor]


def _by_method(draws: Sequence[Draw]) -> dict[Pick, list[int]]:
    """Which random rows are drawn how; chosen per row, so a row's neighbours change nothing."""
    methods: dict[Pick, list[int]] = {}
    for row, draw in enumerate(draws):
        sampling = draw.sampling
        if sampling.greedy:
            continue
        if sampling.top_k > 0:
            method: Pick = _draw_from_best
        elif sampling.top_p < 1.0:
            method = _draw_from_nucleus
        else:
            method = _draw_from_all
        methods.setdefault(method, []).append(row)
    return methods


def _relative(scores: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Scores over temperature, shifted to a best of 0: log of the ratio to the best token."""
    return (scores - scores.amax(-1, keepdim=True)) / temperature


def _draw_from_all(scores: torch.Tensor, controls: _Controls) -> torch.Tensor:
    """Draw from what min_p leaves: no filter of these rows needs an order."""
    relative = _relative(scores, controls.temperature)
    if not _may_select(scores):
        ids = torch.arange(scores.shape[-1], device=scores.device)
        noisy = relative + noise(controls.key, ids)
        return noisy.masked_fill_(relative < controls.log_min_p, -math.inf).argmax(-1)
    # Only an id that comes within the noise's bound of what the best has can win.
    floor = noise(controls.key, relative.argmax(-1, keepdim=True)) - NOISE_MAX
    rows, ids = (relative >= torch.maximum(floor, controls.log_min_p)).nonzero(as_tuple=True)
    noisy = relative[rows, ids] + noise(controls.key[rows, 0], ids)
    none = int(ranks(torch.tensor(-math.inf), torch.tensor(0)))
    found = torch.full((scores.shape[0],), none)
    return ids_of(found.scatter_reduce_(0, rows, ranks(noisy, ids), "amax"))


def _draw_from_best(scores: torch.Tensor, controls: _Controls) -> torch.Tensor:
    """Draw among the best top_k, and of those from what top_p and min_p leave."""
    return _draw_descending(scores, controls, controls.largest_top_k, None)


def _draw_from_nucleus(scores: torch.Tensor, controls: _Controls) -> torch.Tensor:
    """Draw from what top_p and min_p leave; where it can, it orders only what carries the mass."""
    width = scores.shape[-1]
    relative = _relative(scores, controls.temperature)
    weight = weights(relative)
    total = weight.sum(-1, keepdim=True)
    if _may_select(scores):
        wanted = controls.top_p * total.double()
        for floor in _FLOORS:
            inside = relative >= floor
            mass = weight.masked_fill(~inside, 0).sum(-1, keepdim=True)
            if bool((mass.double() >= wanted).all()):
                width = int(inside.sum(-1).amax())
                break
    return _draw_descending(scores, controls, width, total)


_FLOORS = (-1.0, -2.0, -4.0, -8.0, -16.0)
_SMALL = 4096


def _may_select(scores: torch.Tensor) -> bool:
    """Whether to look how many ids are worth the work: costs nothing but on the host."""
    return scores.device.type == "cpu" and scores.shape[-1] > _SMALL


def _draw_descending(
    scores: torch.Tensor, controls: _Controls, width: int, total: torch.Tensor | None
) -> torch.Tensor:
    """Draw from the best `width`, in descending order; `total` is the weight that top_p divides."""
    num_ids = scores.shape[-1]
    ranked = ranks(scores, torch.arange(num_ids, device=scores.device))
    if 0 < width < num_ids:
        best = ranked.topk(width, dim=-1).values
    else:
        best = ranked.sort(dim=-1, descending=True).values
    ids = ids_of(best)
    relative = _relative(scores.gather(-1, ids), controls.temperature)
    rank = torch.arange(ids.shape[-1], device=scores.device)
    beyond = (rank >= controls.top_k) & (controls.top_k > 0)
    weight = weights(relative).masked_fill_(beyond, 0)
    if total is None:
        total = weight.sum(-1, keepdim=True)
    # A token stays while the mass before it is short of top_p; the best one always does.
    before = (weight.cumsum(-1) - weight).double()
    dropped = beyond | (before >= controls.top_p * total.double())
    dropped |= relative < controls.log_min_p
    dropped[:, 0] = False
    noisy = (relative + noise(controls.key, ids)).masked_fill_(dropped, -math.inf)
    return ids_of(ranks(noisy, ids).amax(-1))


def _with_logprobs(
    raw: torch.Tensor, tokens: torch.Tensor, marked: torch.Tensor, draws: Sequence[Draw]
) -> torch.Tensor:
    """Token, its log-probability, and ids and log-probabilities of the best, row by row."""
    width = min(max(draw.sampling.top_logprobs or 0 for draw in draws), raw.shape[1])
    logprobs = raw.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None])
    top = logprobs.topk(width, dim=-1)
    # Doubles hold ids and fp32 log-probabilities exactly, so one copy carries them all.
    return torch.cat((marked[:, None].double(), chosen, top.indices.double(), top.values), dim=-1)


def _read_logprobs(results: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    width = results.shape[1] // 2 - 1
    choices: list[Choice] = []
    for row, draw in zip(results.tolist(), draws, strict=True):
        token, count = int(row[0]), draw.sampling.top_logprobs
        if count is None:
            choices.append((token, None))
            continue
        ids, values = row[2 : 2 + width], row[2 + width :]
        best = tuple((int(i), v) for i, v in zip(ids, values, strict=True))[:count]
        choices.append((token, Logprob(token, row[1], best)))
    return choices


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
