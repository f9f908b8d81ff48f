"""Imports go down only: the picture in docs/architecture.md is enforced here."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sage_fed.routing import Reason

PACKAGE = Path(__file__).parent.parent / "sage_fed"

FLOORS: dict[str, int] = {
    "__init__": 0,
    "core": 0,
    "environment": 0,
    "errors": 0,
    "steps": 0,
    "model_files": 0,
    "settings": 0,
    "trusted_files": 0,
    "v1": 0,
    "text": 1,
    "wire": 1,
    "workers": 1,
    "engine": 1,
    "cards": 1,
    "routing": 1,
    "ledger": 1,
    "metrics": 1,
    "tracing": 1,
    "systemd": 1,
    "device": 2,
    "jobs": 2,
    "calibrate": 2,
    "inertia": 2,
    "service": 3,
    "auth": 3,
    "logs": 3,
    "daemon": 3,
    "client": 3,
    "cli": 3,
}

OWNERS: dict[str, set[str]] = {
    # third-party package -> the only parts that may know it
    "torch": {"engine"},
    "transformers": {"text"},
    "safetensors": {"engine"},
    "huggingface_hub": {"engine", "text"},
    "tokenizers": {"text"},
    "jinja2": {"text"},
    "apsw": {"ledger"},
    "pydantic": {"settings", "cards"},
    "prometheus_client": {"metrics", "cli"},
    "uvicorn": {"metrics"},
    "pynvml": {"metrics"},
    "opentelemetry": {"tracing"},
    "uvloop": {"daemon"},
    "grpc": {"service", "client", "v1"},
    "google": {"service", "client", "v1", "wire"},
    "typer": {"cli"},
    "rich": {"cli"},
    "limits": {"auth"},
    "tomlkit": {"auth", "cards"},
    "pythonjsonlogger": {"logs"},
}

GUESTS: set[tuple[str, str]] = {
    # (file, third-party package) where one file may know what its part may not
    # The published method, to be measured beside the engine; only `inertia` imports it.
    ("engine/reference.py", "transformers"),
}

SIDEWAYS: set[tuple[str, str]] = {
    # (importer, imported) on one floor, where one is plainly the other's part
    ("errors", "core"),
    ("settings", "core"),
    ("settings", "model_files"),
    ("settings", "environment"),
    ("settings", "errors"),
    ("steps", "core"),
    ("settings", "trusted_files"),
    ("steps", "errors"),
    ("trusted_files", "errors"),
    ("jobs", "device"),  # jobs run on the device
    ("calibrate", "device"),  # a calibration times steps on it
    ("service", "auth"),
    ("daemon", "auth"),
    ("daemon", "service"),
    ("cli", "auth"),  # `sage-fed token` changes the tokens file
    ("cli", "client"),
    ("cli", "daemon"),
    ("cli", "logs"),  # `sage-fed serve` says where they go
}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, wherever in the file it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            assert node.module is not None
            names.add(node.module)
            if node.module == "sage_fed":
                names |= {f"sage_fed.{alias.name}" for alias in node.names}
    return names


FILES = sorted(path for path in PACKAGE.rglob("*.py") if part_of(path) != "v1")


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_part_stands_on_a_floor() -> None:
    """A new file or package has to be given its floor before it can be imported."""
    assert set() == {part_of(path) for path in FILES} - FLOORS.keys()


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_go_down_only(path: Path) -> None:
    """A file imports its own part, lower floors, and the named neighbours; nothing else of ours."""
    here = part_of(path)
    for name in imports_of(path):
        if not name.startswith("sage_fed."):
            continue
        there = name.split(".")[1]
        if there.startswith("__") or there == here:
            continue
        allowed = FLOORS[there] < FLOORS[here] or (here, there) in SIDEWAYS
        assert allowed, f"{ids(path)} imports {name}: upward or sideways"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_library_stays_with_its_owner(path: Path) -> None:
    """Torch, SQLite, protobuf and the others are known only where the design puts them."""
    here = part_of(path)
    for name in imports_of(path):
        package = name.split(".")[0]
        owners = OWNERS.get(package)
        allowed = owners is None or here in owners or (ids(path), package) in GUESTS
        assert allowed, f"{ids(path)} imports {name}"


@pytest.mark.parametrize(
    "name",
    [
        *("scheduler", "tier_scheduler", "request_queue", "kv_blocks", "sequence"),
        *("drafting", "draft_sources"),
    ],
)
def test_the_scheduler_is_pure(name: str) -> None:
    """No event loop, thread, clock or third-party library: its decisions are tested without any."""
    known = {"__future__", "array", "bisect", "collections", "dataclasses", "enum", "hashlib"}
    known |= {"heapq", "itertools", "math", "sage_fed"}
    imported = imports_of(PACKAGE / "device" / f"{name}.py")
    assert set() == {one.split(".")[0] for one in imported} - known
    impure = {f"sage_fed.device.{other}" for other in ("device_thread", "executor", "messages")}
    assert set() == set(imported) & impure


def test_only_the_inertia_report_imports_the_published_method() -> None:
    """Importing `generate` takes seconds: no daemon and no other command may pay for it."""
    importers = {ids(p) for p in FILES if "sage_fed.engine.reference" in imports_of(p)}
    assert {"inertia/experiment.py"} == importers


REFUSED_ELSEWHERE: dict[str, tuple[int, str]] = {
    # file -> how often it makes an error that could refuse a job, and why that is no second
    # admission
    "auth/authenticator.py": (1, "calls an address may make without a token"),
    "service/calls.py": (1, "calls an account may have open"),
    "workers.py": (1, "what an account has waiting for a thread"),
    "calibrate/calibrator.py": (1, "a calibration"),
    "daemon/operations.py": (2, "a calibration, and a quality card to compare with the models"),
    "cli/bench_commands.py": (1, "the tasks of a quality card, which are asked of both tiers"),
    "ledger/ledger.py": (2, "the books' own inbox"),
    "ledger/books.py": (1, "the balance at the instant of the hold"),
    "jobs/broker.py": (2, "a job that was let in, whose tier or daemon ended"),
    "device/executor.py": (3, "steps of a calibration, and a device that is gone"),
    "device/device_thread.py": (2, "steps of a calibration"),
    "device/tier_loading.py": (1, "a tier that failed since"),
    "device/scheduler.py": (1, "a tier that failed since"),
}

REFUSALS = {"QueueFull", "TierUnavailable", "RateLimited", "CannotAfford", "DeadlineInfeasible"}


def calls_of(path: Path, names: set[str]) -> list[ast.Call]:
    """The calls in a file of functions, classes or methods of these names."""
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in names
    ]


def test_whether_a_job_may_run_is_asked_in_one_place() -> None:
    """Each reason is found once, in the router or admission, which one caller asks."""
    asked = {
        name: [str(path.relative_to(PACKAGE)) for path in FILES for _ in calls_of(path, {name})]
        for name in ("Refusal", "refuse_unread", "route")
    }
    assert {"routing.py", "jobs/admission.py"} == set(asked["Refusal"])
    # Others admit connections; what asks for a job has the admission in hand.
    admits = [ast.unparse(call.func) for path in FILES for call in calls_of(path, {"admit"})]
    assert 1 == sum(call.endswith("_admission.admit") for call in admits)
    assert ["jobs/admission.py"] == asked["refuse_unread"]
    # The router asks itself once more: what would be possible with less, or without a cascade.
    assert ["jobs/admission.py", "routing.py", "routing.py"] == sorted(asked["route"])
    reasons = sorted(
        call.args[0].attr
        for path in FILES
        for call in calls_of(path, {"Refusal"})
        if isinstance(call.args[0], ast.Attribute)
    )
    assert sorted(reason.name for reason in Reason if reason.is_refusal) == reasons


def test_nothing_else_refuses_a_job_for_want_of_room_or_money() -> None:
    """A new place that makes such an error is a second admission, or has its reason above."""
    made = {str(path.relative_to(PACKAGE)): len(calls_of(path, REFUSALS)) for path in FILES}
    told = {file: count for file, (count, _) in REFUSED_ELSEWHERE.items()}
    # The router turns its refusals into errors, each once.
    assert told | {"routing.py": len(REFUSALS)} == {file: n for file, n in made.items() if n}
