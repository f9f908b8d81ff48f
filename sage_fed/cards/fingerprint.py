"""What a measured price belongs to: the device, the engine and the two models that were loaded.

A price measured on one is no price on another, so a card carries the fingerprint of what it was
measured on, and the daemon compares it with what it has loaded. Only what changes the speed
counts: not the models' names, not the sizes of pools and queues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType

from sage_fed.cards.reading import Reader
from sage_fed.core import TIER_ROLES, ModelInfo, Tier


@dataclass(frozen=True, slots=True)
class ModelPrint:
    """A model's shape, as far as it decides what a step costs, and whose code computes it."""

    architecture: str
    parameters: int
    step_bytes: int
    kv_token_bytes: int
    precision: str
    kernels: str


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`threads` are those of one forward pass on the CPU, 0 on a GPU; `engine` is our version."""

    device: str
    threads: int
    engine: str
    models: Mapping[Tier, ModelPrint]

    @classmethod
    def of(
        cls, device: str, threads: int, engine: str, models: Mapping[Tier, ModelInfo]
    ) -> Fingerprint:
        """Return the fingerprint of what is loaded."""
        return cls(
            device=" ".join(device.split()),
            threads=threads,
            engine=engine,
            models=MappingProxyType(
                {
                    tier: ModelPrint(
                        *(getattr(models[tier], field.name) for field in fields(ModelPrint))
                    )
                    for tier in TIER_ROLES
                }
            ),
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, the same for the same fields on any machine."""
        text = json.dumps(self._plain(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """What is not the same, in words: `tactical.precision is fp32 here, bf16 there`."""
        mine, theirs = _flat(self._plain()), _flat(other._plain())
        return tuple(
            f"{key} is {theirs[key]}, the card's is {mine[key]}"
            for key in mine
            if mine[key] != theirs[key]
        )

    def _plain(self) -> dict[str, object]:
        return {
            "device": self.device,
            "threads": self.threads,
            "engine": self.engine,
            **{tier.name: asdict(self.models[tier]) for tier in TIER_ROLES},
        }


def read_fingerprint(reader: Reader) -> Fingerprint:
    """Read a card's `[fingerprint]`; its `id` has to be that of its fields."""
    fingerprint = Fingerprint(
        device=reader.text("device"),
        threads=reader.count("threads"),
        engine=reader.text("engine"),
        models=MappingProxyType({tier: _model(reader.table(tier.name)) for tier in TIER_ROLES}),
    )
    if reader.text("id") != fingerprint.digest:
        reader.fail("id", f"must be {fingerprint.digest}, which is what the other keys give")
    reader.finish()
    return fingerprint


def _model(reader: Reader) -> ModelPrint:
    model = ModelPrint(
        architecture=reader.text("architecture"),
        parameters=reader.count("parameters", 1),
        step_bytes=reader.count("step_bytes", 1),
        kv_token_bytes=reader.count("kv_token_bytes", 1),
        precision=reader.text("precision"),
        kernels=reader.text("kernels"),
    )
    reader.finish()
    return model


def _flat(plain: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
