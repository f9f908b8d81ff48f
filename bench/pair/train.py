"""Trains the bundled pair from nothing: tokenizer, tactical model, and the strategic grown from it.

    python bench/pair/train.py                  # both, under 50 minutes on 2 cores
    python bench/pair/train.py --tier tactical  # one of them, on the same tokenizer

Owns: the optimisation (Muon for the matrices, AdamW for the rest, warm-up, constant, linear decay),
checkpoints in `bench/.work/`, saving in the Hugging Face layout, a record in `bench/results/`.
Does not know: what the tasks are. A killed run resumes from its checkpoint with the same command;
`--fresh` forgets it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from data import NUM_EXAMPLES_PER_STEP, MicroBatch, probe, training_step
from growth import grow
from network import SHAPES, PairModel, to_transformers, transformers_config
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tasks import FAMILIES, GRADES
from tokenizer import END_OF_TEXT, TURN_END, train_tokenizer
from transformers import GenerationConfig, Qwen2Tokenizer
from workers import Crew, run_workers

REPOSITORY = Path(__file__).resolve().parents[2]
WORK = REPOSITORY / "bench" / ".work"
MODELS = REPOSITORY / "sage_fed" / "models"
RESULTS = REPOSITORY / "bench" / "results"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast one tier is trained.

    `schedule` gives the share of the peak learning rate at some steps, linear in between; the last
    of them is the number of steps.
    """

    schedule: tuple[tuple[int, float], ...]
    matrix_lr: float
    other_lr: float
    weight_decay: float = 0.02

    @property
    def num_steps(self) -> int:
        """How many steps there are."""
        return self.schedule[-1][0]

    def rate(self, step: int) -> float:
        """The share of the peak learning rate at a step."""
        for (start, low), (end, high) in pairwise(self.schedule):
            if step <= end:
                return low + (high - low) * (step - start) / (end - start)
        raise AssertionError("a step beyond the schedule")


# The tactical model's second rise is where its second phase of data begins (see `data`).
RECIPES = {
    "tactical": Recipe(
        ((-1, 0.0), (99, 1.0), (3000, 1.0), (4400, 0.533), (4500, 1.0), (5600, 1.0), (7400, 0.0)),
        matrix_lr=4e-3,
        other_lr=4e-3,
    ),
    "strategic": Recipe(
        ((-1, 0.0), (99, 1.0), (700, 1.0), (1250, 0.45), (1560, 0.0)),
        matrix_lr=2.5e-3,
        other_lr=2e-3,
    ),
}


def optimizers(model: PairModel, recipe: Recipe, crew: Crew) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of this worker's layers, AdamW for everything that is no such matrix.

    Muon's orthogonalisation costs a fifth of a step, so the workers share it out by layers; AdamW
    costs nothing, so each worker does all of it and they stay equal.
    """
    mine = matrices_by_owner(model, crew)[crew.rank]
    inside = {id(p) for layer in model.layers for p in layer.parameters() if p.ndim == 2}
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(
            mine,
            lr=recipe.matrix_lr,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]


def matrices_by_owner(model: PairModel, crew: Crew) -> list[list[torch.nn.Parameter]]:
    """The matrices inside the layers, by the worker that updates them."""
    owned: list[list[torch.nn.Parameter]] = [[] for _ in range(crew.num_workers)]
    for index, layer in enumerate(model.layers):
        owned[crew.owner(index)] += [p for p in layer.parameters() if p.ndim == 2]
    return owned


def validation_accuracy(
    model: PairModel, tokenizer: Qwen2Tokenizer, num_tasks: int
) -> dict[tuple[str, int], float]:
    """Share of validation tasks whose every answer token is the model's first choice.

    That is exactly greedy decoding's exact match, at the price of one forward pass.
    """
    accuracy = {}
    with torch.no_grad():
        for family in FAMILIES:
            for grade in GRADES:
                batch = probe(tokenizer, family, grade, "validation", num_tasks)
                wrong = model(batch.token_ids, batch.places).argmax(-1) != batch.targets
                num_wrong = len(set(batch.rows[wrong].tolist()))
                accuracy[family, grade] = 1 - num_wrong / num_tasks
    return accuracy


def save(model: PairModel, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write the Hugging Face layout, weights in bfloat16."""
    eos, pad = (tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, END_OF_TEXT))
    exported = to_transformers(model, transformers_config(model.shape, eos, pad))
    exported = exported.to(torch.bfloat16)
    exported.generation_config = GenerationConfig(
        bos_token_id=pad, eos_token_id=[eos, pad], pad_token_id=pad, do_sample=False
    )
    exported.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # the weights come out readable by their owner alone


@dataclass(slots=True)
class Progressed:
    """How far a run has come, over all its resumptions."""

    step: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0


class Run:
    """One tier's training in one worker."""

    def __init__(self, crew: Crew, tier: str, args: argparse.Namespace) -> None:
        recipe = RECIPES[tier]
        self.recipe = replace(
            recipe,
            schedule=_stretched(recipe.schedule, args.steps) if args.steps else recipe.schedule,
            matrix_lr=args.lr or recipe.matrix_lr,
            other_lr=args.other_lr or recipe.other_lr,
        )
        self.crew, self.tier, self.args = crew, tier, args
        self.tokenizer = train_tokenizer(args.seed)
        torch.manual_seed(args.seed)
        self.model = self._first_model()
        self.optims = optimizers(self.model, self.recipe, crew)
        self.peaks = [optim.param_groups[0]["lr"] for optim in self.optims]
        self.owned = matrices_by_owner(self.model, crew)
        self.progressed = Progressed()
        self.checkpoint = WORK / f"{tier}{args.label}.pt"

    def _first_model(self) -> PairModel:
        """The tactical model starts at random, the strategic one grows out of the tactical."""
        if self.tier == "tactical":
            return PairModel(SHAPES["tactical"])
        source = WORK / f"tactical{self.args.label}.pt"
        if not source.exists():
            raise SystemExit("the strategic model grows out of the tactical: train that tier first")
        small = PairModel(SHAPES["tactical"])
        small.load_state_dict(torch.load(source, weights_only=True)["model"])
        return grow(small, SHAPES[self.tier])

    def step(self) -> float:
        """One optimiser step; returns this worker's share of the loss."""
        for optim, peak in zip(self.optims, self.peaks, strict=True):
            for group in optim.param_groups:
                group["lr"] = peak * self.recipe.rate(self.progressed.step)
        batches = training_step(self.tokenizer, self.tier, self.args.seed, self.progressed.step)
        total_weight = sum(batch.weights.sum().item() for batch in batches)
        share = 0.0
        self.progressed.num_tokens += sum(batch.token_ids.numel() for batch in batches)
        for batch in _shared_out(batches, self.crew.num_workers)[self.crew.rank]:
            logits = self.model(batch.token_ids, batch.places)
            losses = F.cross_entropy(logits, batch.targets, reduction="none")
            loss = (losses * batch.weights).sum() / total_weight
            loss.backward()
            share += loss.item()
        self.crew.sum_gradients(list(self.model.parameters()))
        for optim in self.optims:
            optim.step()
        self.crew.share(self.owned)
        self.model.zero_grad(set_to_none=True)
        self.progressed.step += 1
        return share

    def save_checkpoint(self) -> None:
        """Write everything a resumption needs; the previous checkpoint stays whole until then."""
        optims = self.crew.gather([optim.state_dict() for optim in self.optims])
        if self.crew.leads:
            partial = self.checkpoint.with_suffix(".partial")
            state = {"model": self.model.state_dict(), "optims": optims}
            torch.save(state | asdict(self.progressed), partial)
            partial.replace(self.checkpoint)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one, with the same number of workers."""
        if self.args.fresh or not self.checkpoint.exists():
            return
        saved = torch.load(self.checkpoint, weights_only=True)
        if len(saved["optims"]) != self.crew.num_workers:
            raise SystemExit(
                f"checkpoint of {len(saved['optims'])} workers: use --workers, --fresh"
            )
        self.model.load_state_dict(saved["model"])
        for optim, state in zip(self.optims, saved["optims"][self.crew.rank], strict=True):
            optim.load_state_dict(state)
        self.progressed = Progressed(saved["step"], saved["num_tokens"], saved["elapsed_s"])


def _stretched(
    schedule: tuple[tuple[int, float], ...], num_steps: int
) -> tuple[tuple[int, float], ...]:
    """The same schedule over another number of steps."""
    factor = num_steps / schedule[-1][0]
    return tuple((round(step * factor) if step > 0 else step, rate) for step, rate in schedule)


def _shared_out(batches: list[MicroBatch], num_workers: int) -> list[list[MicroBatch]]:
    """Each worker's micro-batches: the largest first, each to whom has least so far."""
    shares: list[list[MicroBatch]] = [[] for _ in range(num_workers)]
    num_tokens = [0] * num_workers
    for batch in sorted(batches, key=lambda batch: -batch.token_ids.numel()):
        worker = num_tokens.index(min(num_tokens))
        shares[worker].append(batch)
        num_tokens[worker] += batch.token_ids.numel()
    return shares


def _report(run: Run, console: Console, mean_loss: float, tokens_per_s: float) -> None:
    accuracy = validation_accuracy(run.model, run.tokenizer, run.args.probe)
    done = run.progressed
    console.print(
        f"{run.tier} step {done.step} of {run.recipe.num_steps}, {done.elapsed_s:.0f} s, "
        f"loss {mean_loss:.4f}, {tokens_per_s:.0f} tok/s, "
        f"mean accuracy {sum(accuracy.values()) / len(accuracy):.3f}"
    )
    for family in FAMILIES:
        console.print(f"    {family:9} {' '.join(f'{accuracy[family, g]:.2f}' for g in GRADES)}")


def train(crew: Crew, tier: str, args: argparse.Namespace) -> None:
    """Train one tier to the end and save it."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    run = Run(crew, tier, args)
    run.resume()
    num_steps, done = run.recipe.num_steps, run.progressed
    if crew.leads:
        num_params = sum(p.numel() for p in run.model.parameters())
        console.print(f"{tier}: {num_params:,} parameters, {crew.num_workers} workers")
    last = time.monotonic()
    reported = replace(done)
    loss_sum = 0.0
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (crew.leads and console.is_terminal),
    ) as progress:
        bar = progress.add_task(tier, total=num_steps, completed=done.step)
        while done.step < num_steps:
            loss_sum += run.step() * crew.num_workers
            now = time.monotonic()
            done.elapsed_s += now - last
            last = now
            progress.update(bar, completed=done.step)
            at_end = done.step == num_steps
            if done.step % args.report_steps == 0 or at_end:
                if crew.leads:
                    interval_s = done.elapsed_s - reported.elapsed_s
                    _report(
                        run,
                        console,
                        loss_sum / (done.step - reported.step),
                        (done.num_tokens - reported.num_tokens) / interval_s,
                    )
                reported, loss_sum = replace(done), 0.0
            if done.step % args.save_steps == 0 or at_end:
                run.save_checkpoint()
    if crew.leads:
        save(run.model, run.tokenizer, args.out / f"demo-{tier}")
        record = {
            "tier": tier,
            "seed": args.seed,
            "workers": crew.num_workers,
            "examples_per_step": NUM_EXAMPLES_PER_STEP,
            "recipe": asdict(run.recipe),
            **asdict(done),
        }
        args.results.mkdir(exist_ok=True)
        (args.results / f"pair_training_{tier}.json").write_text(
            json.dumps(record, indent=1) + "\n"
        )
        console.print(f"{tier}: {done.num_tokens:,} tokens in {done.elapsed_s:.0f} s")


def main() -> int:
    """Parse the command line and train the tiers it names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tier", choices=(*SHAPES, "both"), default="both")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="steps instead of the recipe's")
    parser.add_argument("--lr", type=float, help="peak learning rate instead of the recipe's")
    parser.add_argument("--other-lr", type=float, help="the same for what Muon does not train")
    parser.add_argument("--workers", type=int, default=2, help="single-threaded processes")
    parser.add_argument("--label", default="", help="suffix of the checkpoint, for trials")
    parser.add_argument("--out", type=Path, default=MODELS, help="folder for the two models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the records")
    parser.add_argument("--fresh", action="store_true", help="forget an existing checkpoint")
    parser.add_argument("--probe", type=int, default=40, help="validation tasks per cell")
    parser.add_argument("--report-steps", type=int, default=200)
    parser.add_argument("--save-steps", type=int, default=100)
    args = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    # As an exception, so that a stopped parent ends its workers on its way out.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    for tier in SHAPES if args.tier == "both" else (args.tier,):
        run_workers(args.workers, train, tier, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
