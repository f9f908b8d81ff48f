"""Of small changes to the core, which does no test notice?

mutmut makes the changes (`[tool.mutmut]` in pyproject.toml says where, and with which tests) and
runs, for each, the tests that reach the changed function. It changes no decorated function, no
property and no constant of a module. A change that only alters the wording of a string is counted
apart: no test is to nail down sentences.

The score is the part that was noticed (a test failed or never ended) of all that were tried,
wordings left out. A survivor is a missing test, dead code, or equivalent: the program means the
same with it. Which it is, a person has to say.

Run: python bench/mutants.py [--sample N of each package] [--seed 1] [--packages ledger router]
     [--children 2]
Continues where an earlier run stopped, as long as the code is the same; writes
bench/results/mutants.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import report

ROOT = Path(__file__).parent.parent
MUTANTS = ROOT / "mutants"
MUTMUT = Path(sys.executable).parent / "mutmut"

NOTICED = {1: "killed", 3: "killed", 24: "timeout", -24: "timeout", 36: "timeout", 152: "timeout"}
"""Exit codes of a mutant's tests; -9 is a worker that was killed for its time, too."""
NOTICED |= {255: "timeout", -9: "timeout"}

_STRING = re.compile(r"""[rbfRBF]{0,2}("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')""")


def main(packages: list[str], sample: int, seed: int, children: int, output: Path | None) -> int:
    """Make mutants, try them, report; the exit code."""
    began_s = time.monotonic()
    # A name that no mutant has: they are made, the tests run once to learn which reaches what,
    # and nothing is tried.
    mutmut("run", "none", check=False)
    made = {name: code for codes in outcomes().values() for name, code in codes.items()}
    if not made:
        print("mutmut made no mutants; run `mutmut run` to see why", file=sys.stderr)
        return 1
    chosen: list[str] = []
    for package in packages or sorted({package_of(name) for name in made}):
        of_package = sorted(name for name in made if package_of(name) == package)
        count = min(sample or len(of_package), len(of_package))
        # Each package draws for itself: a change to one does not move the others' samples.
        chosen += Random(f"{seed} {package}").sample(of_package, count)
    left = [name for name in chosen if made[name] is None]
    print(f"{len(made)} mutants, {len(chosen)} chosen, {len(left)} to try", flush=True)
    if left:
        # Interrupted, it reports what was tried; mutmut begins with those that are quickly tried.
        with contextlib.suppress(KeyboardInterrupt):
            mutmut("run", "--max-children", str(children), *left, check=False)
    result = summary(chosen)
    result |= {"sample": sample or None, "seed": seed if sample else None, "made": len(made)}
    result["took_s"] = round(time.monotonic() - began_s)
    report.write("mutants", result, output)
    return 0


def summary(chosen: list[str]) -> dict[str, Any]:
    """How many of each package were noticed, and the text of those that were not."""
    codes = {name: code for found in outcomes().values() for name, code in found.items()}
    table: dict[str, Counter[str]] = {}
    survivors: dict[str, str] = {}
    for name in chosen:
        status = "untried" if codes[name] is None else NOTICED.get(codes[name] or 0, "survived")
        if status == "survived":
            change = difference(name)
            if is_wording(change):
                status = "wording"
            else:
                survivors[name] = change
        table.setdefault(package_of(name), Counter())[status] += 1
    return {
        "packages": {name: dict(counts) | score(counts) for name, counts in sorted(table.items())},
        "all": score(sum(table.values(), Counter())),
        "survivors": dict(sorted(survivors.items())),
    }


def score(counts: Counter[str]) -> dict[str, float]:
    """The part that was noticed, in percent."""
    noticed = counts["killed"] + counts["timeout"]
    tried = noticed + counts["survived"]
    return {"tried": tried, "score": round(100 * noticed / tried, 1) if tried else 0.0}


def outcomes() -> dict[str, dict[str, int | None]]:
    """By file, the exit code of each mutant's tests; None where they have not run."""
    return {
        str(path): json.loads(path.read_text())["exit_code_by_key"]
        for path in sorted(MUTANTS.rglob("*.meta"))
    }


def package_of(name: str) -> str:
    """The package of a mutant's name: `sage_fed.routing.x_route__mutmut_1`."""
    return name.split(".")[1]


def difference(name: str) -> str:
    """The mutant's changed lines."""
    shown = mutmut("show", name).stdout.splitlines()
    return "\n".join(line for line in shown if re.match(r"[-+](?![-+]{2} )", line))


def is_wording(change: str) -> bool:
    """Whether a change leaves everything but the letters of strings as it was."""
    sides = [
        [_STRING.sub("''", line[1:]) for line in change.splitlines() if line[0] == sign]
        for sign in "-+"
    ]
    return sides[0] == sides[1]


def mutmut(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the tool; its progress is a line that rewrites itself, which a log has no use for."""
    return subprocess.run(
        [MUTMUT, *arguments], cwd=ROOT, check=check, capture_output=True, text=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--packages", nargs="*", default=[])
    parser.add_argument("--sample", type=int, default=0, help="of each package; 0 is all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--children", type=int, default=2)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    sys.exit(main(given.packages, given.sample, given.seed, given.children, given.output))
