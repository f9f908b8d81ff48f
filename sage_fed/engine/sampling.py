"""From logits to tokens: penalties, filters, draws and log-probabilities, row by row.

Order, as in `transformers`: penalties, temperature, top_k, top_p, min_p; each filter
sees the distribution renormalised over what the previous ones left. (vLLM applies min_p before
top_k; being relative to the best token it commutes with top_k, but not with top_p.)
The draw inverts the cumulative distribution at one uniform number, so it is a function of the
row's logits, its settings, its seed and its index alone. Log-probabilities are of the raw
logits, in fp32, before any of the above. Logits hold the tokenizer's own ids only, so padding
of the vocabulary can neither be drawn nor counted.
A row with a NaN or an infinite best has no token: `argmax` finds either, so one look at the best
logit of each row tells, which costs one gather of as many numbers as there are rows.
Every function works on the device and waits for nothing: settings cross to it in one copy,
results come back in another, and `Picked.choices` reads them when they are there.
Random numbers have no state: a request's n-th is a function of its seed and n, so its tokens depend
neither on what else is in the batch nor on restarts.
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
from sage_fed.steps import NO_TOKEN, Draw

Choice = tuple[int, Logprob | None]

_COLDEST = 1e-30  # a lower temperature would round to zero in fp32 and make 0 / 0


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


def pick(logits: torch.Tensor, draws: Sequence[Draw], best: torch.Tensor | None = None) -> Picked:
    """Choose a token for every row of `logits` [rows, ids], of any floating type.

    `best` is their argmax, where it is known; `NO_TOKEN` for a row that is not finite.
    """
    kept = tuple(draws)
    if all(_is_plain(draw.sampling) for draw in draws):
        if best is not None:  # by a pass on the host, so no device keeps the tokens
            return Picked(best, best, kept)
        tokens = logits.argmax(-1)
        return Picked(tokens, _marked(tokens, _finite(logits, tokens)), kept)
    raw = logits.float()
    packer = Packer()
    penalties = _pack_penalties(draws, logits.shape[1], packer)
    methods = [
        (method, packer.add(rows), _Controls.pack([draws[row] for row in rows], packer))
        for method, rows in _by_method(draws).items()
    ]
    vectors = packer.move(logits.device)
    scores = _penalised(raw, [vectors[index] for index in penalties])
    tokens = scores.argmax(-1)
    finite = _finite(scores, tokens)
    for method, at, (controls_at, largest_top_k) in methods:
        rows, columns = vectors[at], vectors[controls_at].view(torch.float64)
        controls = _Controls.of(columns, rows.shape[0], largest_top_k)
        if rows.shape[0] == len(draws):
            tokens = method(scores, controls)
        else:
            tokens.index_copy_(0, rows, method(scores.index_select(0, rows), controls))
    marked = _marked(tokens, finite)
    if all(draw.sampling.top_logprobs is None for draw in draws):
        return Picked(tokens, marked, kept)
    return Picked(tokens, _with_logprobs(raw, tokens, marked, draws), kept)


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Choose, and wait for it."""
    picked = pick(logits, draws)
    return picked.choices(picked.results)


def _finite(scores: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Whether each row's scores are numbers: a NaN anywhere is what `argmax` takes for the best."""
    return scores.gather(-1, best[:, None]).squeeze(-1).isfinite()


def _marked(tokens: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    return torch.where(finite, tokens, NO_TOKEN)


def _is_plain(sampling: Sampling) -> bool:
    return sampling.greedy and not sampling.penalises and sampling.top_logprobs is None


def _pack_penalties(draws: Sequence[Draw], num_ids: int, packer: Packer) -> tuple[int, ...]:
    """Pack rows, ids, factors and offsets of penalised tokens; nothing where there are none."""
    rows, ids, factors, offsets = array("q"), array("q"), array("d"), array("d")
    for row, draw in enumerate(draws):
        sampling = draw.sampling
        factor = dict.fromkeys(draw.seen, sampling.repetition_penalty)
        offset = {
            token: sampling.presence_penalty + count * sampling.frequency_penalty
            for token, count in draw.counts
        }
        penalised = [token for token in {**factor, **offset} if token < num_ids]
        rows.extend([row] * len(penalised))
        ids.extend(penalised)
        factors.extend(factor.get(token, 1.0) for token in penalised)
        offsets.extend(offset.get(token, 0.0) for token in penalised)
    if not ids:
        return ()
    doubles = (packer.add_doubles(factors), packer.add_doubles(offsets))
    return packer.add(rows), packer.add(ids), *doubles


def _penalised(logits: torch.Tensor, packed: Vectors) -> torch.Tensor:
    """Return logits [rows, ids], of any floating type, with the penalties of earlier tokens.

    First the repetition penalty, which scales away from choice as CTRL (arXiv 1909.05858) does,
    then presence and frequency penalties are subtracted, as the OpenAI API defines them:
    `logit - presence - count * frequency` for a token that the output has `count` times. What
    becomes larger than the type ends at its bounds, because what is not finite is the model's
    fault, never a setting's.
    """
    if not packed:
        return logits
    rows, ids, *doubles = packed
    factor, offset = (values.view(torch.float64).float() for values in doubles)
    before = logits[rows, ids]
    worse = torch.where(before > 0, before / factor, before * factor) - offset
    bound = torch.finfo(worse.dtype).max
    bounded = torch.where(before.isfinite(), worse.clamp(-bound, bound), worse)
    return logits.index_put((rows, ids), bounded)


@dataclass(frozen=True, slots=True)
class _Controls:
    """The settings of some rows on the device, each float64 [rows, 1].

    `log_min_p` is -inf where min_p is off, `number` the uniform number of each row's draw.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    log_min_p: torch.Tensor
    number: torch.Tensor
    largest_top_k: int

    @staticmethod
    def pack(draws: Sequence[Draw], packer: Packer) -> tuple[int, int]:
        """Pack the settings; their place in the packer, and the largest top_k."""
        values = array("d")
        for draw in draws:
            s = draw.sampling
            floor = math.log(s.min_p) if s.min_p > 0 else -math.inf
            values.extend((max(s.temperature, _COLDEST), float(s.top_k), s.top_p, floor))
            values.append(uniform(s.seed, draw.index))
        return packer.add_doubles(values), max(draw.sampling.top_k for draw in draws)

    @classmethod
    def of(cls, values: torch.Tensor, rows: int, largest_top_k: int) -> Self:
        """What was packed, on the device: float64 [rows * 5]."""
        temperature, top_k, top_p, log_min_p, number = values.view(rows, -1, 1).unbind(1)
        return cls(temperature, top_k, top_p, log_min_p, number, largest_top_k)


Pick = Callable[[torch.Tensor, _Controls], torch.Tensor]


def _by_method(draws: Sequence[Draw]) -> dict[Pick, list[int]]:
    """Which random rows are drawn how; chosen per row, so a row's neighbours change nothing."""
    methods: dict[Pick, list[int]] = {}
    for row, draw in enumerate(draws):
        sampling = draw.sampling
        if sampling.greedy:
            continue
        if sampling.top_k > 0:
            method: Pick = _pick_from_best
        elif sampling.top_p < 1.0:
            method = _pick_sorted
        else:
            method = _pick_unsorted
        methods.setdefault(method, []).append(row)
    return methods


def _relative(scores: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Scores over temperature, shifted to a best of 0: log of the ratio to the best token."""
    return (scores - scores.amax(-1, keepdim=True)) / temperature.float()


def _invert(probabilities: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """Column [rows, 1] at which the cumulative sum of each row passes `number` of its total."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    target = number * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)


def _pick_unsorted(scores: torch.Tensor, controls: _Controls) -> torch.Tensor:
    """Draw in the order of ids: no filter of these rows needs a sorted distribution."""
    relative = _relative(scores, controls.temperature)
    relative = relative.masked_fill(relative < controls.log_min_p, -math.inf)
    return _invert(relative.softmax(-1), controls.number).squeeze(-1)


def _pick_from_best(scores: torch.Tensor, controls: _Controls) -> torch.Tensor:
    """Draw among the best top_k; sorting a whole vocabulary costs far more."""
    width = min(controls.largest_top_k, scores.shape[-1])
    best, ids = scores.topk(width, dim=-1)
    return _pick_descending(best, ids, controls)


def _pick_sorted(scores: torch.Tensor, controls: _Controls) -> torch.Tensor:
    best, ids = scores.sort(stable=True, dim=-1, descending=True)
    return _pick_descending(best, ids, controls)


def _pick_descending(best: torch.Tensor, ids: torch.Tensor, controls: _Controls) -> torch.Tensor:
    """Draw from scores in descending order, whose token ids are `ids` [rows, width]."""
    relative = _relative(best, controls.temperature)
    rank = torch.arange(best.shape[-1], device=best.device)
    beyond = (rank >= controls.top_k) & (controls.top_k > 0)
    relative = relative.masked_fill(beyond, -math.inf)
    probabilities = relative.softmax(-1, dtype=torch.float64)
    # A token stays while the mass before it is short of top_p; the best one always does.
    before = probabilities.cumsum(-1) - probabilities
    dropped = (before >= controls.top_p) | (relative < controls.log_min_p)
    dropped[:, 0] = False
    column = _invert(probabilities.masked_fill_(dropped, 0.0), controls.number)
    return ids.gather(-1, column).squeeze(-1)


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
