"""Is the engine right on this device? Small models by a reference, large ones by their numbers.

Owns: small random checkpoints of every architecture, the ragged schedule, the comparison with
`transformers` in fp32 on the CPU; and both real shapes on one device at once, what memory they
take, and whether their probabilities are finite and their ids valid (random weights of that size
have no reference here). Does not know: speed.

A ragged schedule by the real scheduler, on a cache full of NaN: sequences join and leave,
prompts come in chunks, blocks are used again. The reference is teacher-forced on what the engine
answered, one forward pass a sequence: then each greedy token of fp32 has to be the reference's
best, and logits can be compared at every step, also in half precision where the texts part.
Weights are rounded to bf16 first, so that the arithmetic is measured and not the rounding of the
checkpoint. Log-probabilities less their mean are the logits less theirs, so errors of logits are
read from what every client can ask for.

Half precision has no bound of its own that is right for every model: widely spread random
weights multiply each rounding, gentle ones hide it. So its yardstick is what `transformers`
itself loses in that precision, on the CPU, on the same tokens.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

import torch
from gpu_models import Filling, Plan
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from sage_fed.core import Sampling, Tier
from sage_fed.device import Scheduler, SequenceSpec, TierLimits
from sage_fed.engine import PRECISIONS as PRECISION_TYPES
from sage_fed.engine import Engine, EngineOptions, load_engine
from sage_fed.engine import precision as numbers
from sage_fed.engine.cuda_graphs import EagerCapture, GraphForward
from sage_fed.engine.decoder import TorchForward
from sage_fed.steps import BLOCK_SIZE, SampledToken

FP32_BOUND = 1e-4
"""Relative error of all logits of a model."""

HALF_TIMES = 1.5
"""What half precision may lose, in times of what `transformers` loses in it. Quantised weights
compute in bf16 and are held to the same, with the weights that they stand for."""

_PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
_FP8_CAPABILITY = (8, 9)

FP8_BOUND = 0.3
"""Relative: activations are rounded to 3 bits too, which these widely spread weights multiply."""

_SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Far apart logits: a greedy choice must not hang on the last bit of a sum.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
_BUNDLED = ("demo-tactical", "demo-strategic")
_CONTEXT = 256
_LEAVES_AFTER = 6
"""Tokens after which sequence 2 is cancelled, while the others run."""

Answers = Mapping[int, list[SampledToken]]


def precisions(device: torch.device) -> tuple[str, ...]:
    """What the device can run."""
    fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY
    return (*_PRECISIONS, "fp8") if fp8 else _PRECISIONS


def configs() -> dict[str, PretrainedConfig]:
    """One configuration of each architecture, and each way of biases, heads and positions."""
    return {
        "qwen2-tied": Qwen2Config(**_SHAPE, tie_word_embeddings=True),
        "qwen2-untied": Qwen2Config(**_SHAPE, tie_word_embeddings=False),
        "qwen3": Qwen3Config(**_SHAPE, head_dim=16, tie_word_embeddings=True),
        "llama3-rope": LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3, tie_word_embeddings=True),
        "llama-biased": LlamaConfig(**_SHAPE, attention_bias=True, mlp_bias=True),
        "mistral": MistralConfig(**_SHAPE, head_dim=10, sliding_window=None),
    }


def checkpoints(
    names: Collection[str], folder: Path, models: Path
) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Directory and fp32 reference by name: random ones, written here, and bundled ones."""
    found = {}
    for name, config in configs().items():
        if name not in names:
            continue
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                parameter.copy_(parameter.bfloat16())
        model.save_pretrained(folder / name)
        found[name] = (folder / name, model.eval())
    for name in _BUNDLED:
        path = models / name
        if name in names and (path / "model.safetensors").is_file():
            reference = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32, local_files_only=True
            )
            found[name] = (path, reference.eval())
    return found


def check(path: Path, reference: PreTrainedModel, device: str, precision: str) -> dict[str, Any]:
    """One model in one precision: `ok`, and by how much."""
    options = EngineOptions(
        model=str(path),
        kv_cache_bytes=4 * 2**20,
        device=device,
        precision=precision,
        max_context_tokens=_CONTEXT,
        max_batch=5,
        kernels="torch" if device == "cpu" else "auto",
    )
    # On the CPU by the way of CUDA, its graphs done eagerly.
    capture = EagerCapture() if device == "cpu" else None
    engine = load_engine(options, lambda _: None, capture)
    vocab: int = reference.config.vocab_size
    jobs = prompts(vocab)
    exact = precision == "fp32"
    try:
        # In fp32 whole prompts and plain greedy steps too: all ways have to say the same.
        poison(engine)
        plain = ragged(engine, jobs, 512, Sampling()) if exact else {}
        poison(engine)
        full = ragged(engine, jobs, 23, Sampling(top_logprobs=vocab))
    finally:
        engine.close()
    expected = {job: reference_logits(reference, jobs[job], ids(row)) for job, row in full.items()}
    error = Error.of(full, expected)
    best = {job: tuple(logits.argmax(-1).tolist()) for job, logits in expected.items()}
    off = sum(a != b for job, row in full.items() for a, b in zip(ids(row), best[job], strict=True))
    found: dict[str, Any] = {"tokens": sum(map(len, full.values())), "tokens_off": off}
    found |= asdict(error)
    if exact:
        found["plain_tokens_equal"] = all(ids(plain[job]) == ids(row) for job, row in full.items())
        good = error.relative < FP32_BOUND and off == 0 and found["plain_tokens_equal"]
    else:
        if PRECISION_TYPES[precision].quantised:
            # Against the weights that the quantised ones stand for; the loss of quantising beside.
            found["of_the_checkpoint"] = error.relative
            reference = narrowed(reference, precision)
            expected = {
                job: reference_logits(reference, jobs[job], ids(row)) for job, row in full.items()
            }
            found |= asdict(error := Error.of(full, expected))
        half = copy.deepcopy(reference).to(dtype=PRECISION_TYPES[precision].compute)
        peer = {job: reference_logits(half, jobs[job], ids(row)) for job, row in full.items()}
        found["transformers_relative"] = Error.between(peer, expected).relative
        found["bound"] = HALF_TIMES * found["transformers_relative"]
        if precision == "fp8":
            found["bound"] = FP8_BOUND
        good = error.relative < found["bound"]
    return {"ok": good, **found}


def narrowed(reference: PreTrainedModel, precision: str) -> PreTrainedModel:
    """The same model, each matrix being what its quantised numbers stand for, in fp32."""
    model = copy.deepcopy(reference)
    own = PRECISION_TYPES[precision]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kind = own.head if name.endswith("lm_head") else own.layers
            made = getattr(numbers, f"quantise_{kind}")(module.weight.detach())
            wide = getattr(numbers, f"dequantise_{kind}")(*made)
            with torch.no_grad():
                module.weight.copy_(wide[:, : module.in_features])
    return model


@dataclass(frozen=True, slots=True)
class Error:
    """||a - b|| / ||b|| of centred logits over all steps and of the worst step; largest |a - b|."""

    relative: float
    relative_worst_step: float
    largest: float

    @classmethod
    def of(cls, answers: Answers, expected: Mapping[int, torch.Tensor]) -> Self:
        """Of what an engine answered, every log-probability of every step."""
        actual = {}
        for job, row in answers.items():
            tops = [d.logprob.top for d in row if d.logprob is not None]
            assert len(tops) == len(row), "an answer without log-probabilities"
            actual[job] = torch.tensor([[value for _, value in sorted(top)] for top in tops])
        return cls.between(actual, expected)

    @classmethod
    def between(
        cls, actual: Mapping[int, torch.Tensor], expected: Mapping[int, torch.Tensor]
    ) -> Self:
        """Of two sets of logits [steps, ids] by job; NaN counts as infinitely wrong."""
        right = _centred(torch.cat([expected[job] for job in expected]))
        difference = _centred(torch.cat([actual[job] for job in expected])) - right
        difference = difference.nan_to_num(nan=math.inf)
        by_step = difference.norm(dim=-1) / right.norm(dim=-1)
        return cls(
            relative=float(difference.norm() / right.norm()),
            relative_worst_step=float(by_step.max()),
            largest=float(difference.abs().max()),
        )


def prompts(vocab: int) -> dict[int, tuple[int, ...]]:
    """Random prompts around the edges of blocks and chunks, by sequence id."""
    random = Random(f"prompts {vocab}")
    lengths = (1, 15, 16, 17, 45, 80, 120, 33)
    return {
        job: tuple(random.randrange(8, vocab - 8) for _ in range(length))
        for job, length in enumerate(lengths)
    }


def ragged(
    engine: Engine, jobs: Mapping[int, tuple[int, ...]], chunk_tokens: int, sampling: Sampling
) -> dict[int, list[SampledToken]]:
    """Run all jobs, two joining every third step and one leaving early; what each was answered."""
    scheduler = Scheduler()
    limits = TierLimits(
        num_blocks=engine.num_blocks,
        max_context_tokens=engine.max_context_tokens,
        max_batch=5,
        prefill_chunk_tokens=chunk_tokens,
    )
    scheduler.open_tier(Tier.TACTICAL, limits, frozenset())
    waiting = list(jobs.items())
    answers: dict[int, list[SampledToken]] = {job: [] for job in jobs}
    for number in itertools.count():
        now = float(number)
        if number % 3 == 0:
            for job, prompt in waiting[:2]:
                # The longest runs on after all others, so every batch size is met.
                spec = SequenceSpec(job, Tier.TACTICAL, prompt, 8 + 2 * job, sampling)
                scheduler.add(spec, now)
            del waiting[:2]
        if len(answers[2]) == _LEAVES_AFTER:
            scheduler.cancel(2, now)
        step = scheduler.next_step(now)
        if step is None and not waiting:
            return answers
        if step is not None:
            outcome = scheduler.complete(step, engine.run(step), now=now, elapsed_s=1e-3)
            for drawn in outcome.tokens:
                answers[drawn.seq_id].append(drawn)
    raise AssertionError("unreachable")


def poison(engine: Engine) -> None:
    """NaN in every slot of the cache: whoever reads what it has not written shows it."""
    forward = engine._forward  # noqa: SLF001 - nobody else should be able to
    assert isinstance(forward, TorchForward | GraphForward)
    with torch.inference_mode():
        # The block beyond those that are served is the padding's own: it is never poisoned by
        # what strangers leave.
        pool = forward._decoder._cache._pool  # noqa: SLF001
        pool[:, : engine.num_blocks * BLOCK_SIZE].fill_(math.nan)


def reference_logits(
    model: PreTrainedModel, prompt: tuple[int, ...], answer: tuple[int, ...]
) -> torch.Tensor:
    """Logits [answer, vocabulary] in fp32 from which each token of the answer is to be chosen."""
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([prompt + answer[:-1]])).logits[0]
    return logits[len(prompt) - 1 :].float()


def ids(row: list[SampledToken]) -> tuple[int, ...]:
    """The tokens of one answer."""
    return tuple(d.token_id for d in row)


def _centred(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.mean(-1, keepdim=True)


_PROMPTS = (5, 40, 17, 100)
"""Tokens of each; one sequence joins late, one leaves early."""


def resident(
    build: Callable[[], dict[Tier, Engine]],
    fillings: Mapping[Tier, Filling],
    plan: Plan,
    device: torch.device,
) -> dict[str, Any]:
    """Build the pair, then run tactical, strategic and tactical again on the same prompts."""
    before = _memory(device)
    began = time.perf_counter()
    engines = build()
    built_s = time.perf_counter() - began
    built = _memory(device)
    shapes = {Tier.TACTICAL: plan.tactical, Tier.STRATEGIC: plan.strategic}
    prompts = {tier: _prompts(min(shape.valid_ids, shape.vocab)) for tier, shape in shapes.items()}
    sampling = Sampling(top_logprobs=1)
    answers: dict[Tier, dict[int, list[SampledToken]]] = {}
    for tier, engine in engines.items():
        answers[tier] = ragged(engine, prompts[tier], 64, sampling)
    once = answers[Tier.TACTICAL]
    again = ragged(engines[Tier.TACTICAL], prompts[Tier.TACTICAL], 64, sampling)
    models = {
        tier.name: {
            **asdict(engine.info),
            "kv_tokens": engine.num_blocks * BLOCK_SIZE,
            "filled": asdict(fillings[tier]),
            **_verdict(answers[tier], shapes[tier].valid_ids),
        }
        for tier, engine in engines.items()
    }
    good = all(
        model["finite"] and model["valid_ids"] and model["distinct_ids"] > 1
        and not model["filled"]["not_finite"] and not model["filled"]["denormal"]
        for model in models.values()
    )  # fmt: skip
    return {
        "ok": good,
        "built_s": built_s,
        "models": models,
        "tactical_repeatable": all(ids(once[job]) == ids(again[job]) for job in once),
        "memory": {"before": before, "built": built, "after_steps": _memory(device)},
    }


def _prompts(num_ids: int) -> dict[int, tuple[int, ...]]:
    random = Random(num_ids)
    return {
        job: tuple(random.randrange(num_ids) for _ in range(length))
        for job, length in enumerate(_PROMPTS)
    }


def _verdict(answers: Mapping[int, list[SampledToken]], valid_ids: int) -> dict[str, Any]:
    """A NaN or an infinity in any logit of a row makes its log-probability not finite."""
    drawn = [d for row in answers.values() for d in row]
    return {
        "tokens": len(drawn),
        "finite": all(d.logprob and math.isfinite(d.logprob.logprob) for d in drawn),
        "valid_ids": all(0 <= d.token_id < valid_ids for d in drawn),
        "distinct_ids": len({d.token_id for d in drawn}),
    }


def _memory(device: torch.device) -> dict[str, int] | None:
    """Bytes on the device; None on the CPU, where the process shares them with everything."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return {
        "free": free,
        "total": total,
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak_allocated": torch.cuda.max_memory_allocated(device),
    }
