"""Whether an answer solves a HumanEval problem: the answer on stdin, the exit code 0 if it does.

The code is the answer's longest fenced block, or all of it. Where it does not define the function,
it is taken for the body that follows the problem's beginning. The problem's own tests are then run
in this process, which whoever starts it has to limit (`check.command` of a task does).

Run: python bench/humaneval_check.py HumanEval.jsonl.gz HumanEval/0 < answer
"""

from __future__ import annotations

import gzip
import json
import re
import sys

_FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)


def main(file: str, task_id: str) -> None:
    """Run the tests; an exception is a failure."""
    with gzip.open(file, "rt") as lines:
        problem = next(p for p in map(json.loads, lines) if p["task_id"] == task_id)
    answer = sys.stdin.read()
    code = max(_FENCED.findall(answer), key=len, default=answer)
    if f"def {problem['entry_point']}" in code:
        # What the problem imports and defines before its function is there for the answer, too.
        code = problem["prompt"].rpartition(f"def {problem['entry_point']}")[0] + code
    else:
        code = problem["prompt"] + code
    names: dict[str, object] = {"__name__": "solution"}
    exec(f"{code}\n{problem['test']}\ncheck({problem['entry_point']})\n", names)


if __name__ == "__main__":
    main(*sys.argv[1:])
