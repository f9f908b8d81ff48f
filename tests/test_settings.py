"""Settings: layers and origins, strictness at every level, and errors that say what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr, ValidationError

import sage_fed
from sage_fed.core import Address, Role, Tier, UnixSocket, parse_listen
from sage_fed.errors import ConfigError
from sage_fed.ledger.books import MAX_TTL_S
from sage_fed.ledger.entries import MAX_TEXT
from sage_fed.model_files import resolve_model
from sage_fed.settings import (
    Effective,
    Settings,
    atp_from_uatp,
    load_settings,
    profile_names,
    uatp_from_atp,
)
from sage_fed.settings.loading import leaves, plain_leaves, section_of, validation_problems
from sage_fed.settings.values import format_size, parse_size

DEMO = {"profile": "demo"}


def load(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config: Path | None = None,
) -> Effective:
    """Load on top of the demo profile, away from this process's own environment."""
    return load_settings({**DEMO, **(flags or {})}, {"HOME": "/home/x", **(environ or {})}, config)


def refusal(
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config: Path | None = None,
) -> str:
    """The text of the ConfigError that loading raises."""
    with pytest.raises(ConfigError) as caught:
        load(flags, environ, config)
    return caught.value.message


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_each_layer_wins_over_the_ones_below_and_says_so(toml: Path) -> None:
    """Flags beat the environment, that the file, that the profile, that the default."""
    toml.write_text(
        '[tactical]\nmax_batch = 3\nmax_waiting = 4\nkv_cache_bytes = "1GiB"\n[ledger]\n'
    )
    environ = {"SAGE_FED_TACTICAL__MAX_BATCH": "5", "SAGE_FED_TACTICAL__MAX_WAITING": "6"}
    effective = load({"tactical.max_batch": 7}, environ, toml)
    rows = {key: (value, origin) for key, value, origin in effective.rows()}
    assert ("7", "flag") == rows["tactical.max_batch"]
    assert ("6", "environment SAGE_FED_TACTICAL__MAX_WAITING") == rows["tactical.max_waiting"]
    assert ("1GiB", f"file {toml}") == rows["tactical.kv_cache_bytes"]
    assert ("fp32", "profile demo") == rows["tactical.precision"]
    assert ("7200.0", "default") == rows["ledger.hold_ttl_s"]
    assert 7 == effective.settings.tiers[Tier.TACTICAL].max_batch


def test_an_empty_table_takes_nothing_away(toml: Path) -> None:
    """A heading without keys leaves the profile's values in place."""
    toml.write_text("[routing]\n")
    assert load().rows() == load(config=toml).rows()


@pytest.mark.parametrize(
    ("flags", "environ", "origin"),
    [
        ({"state_dir": ""}, {}, "flag"),
        ({}, {"SAGE_FED_STATE_DIR": ""}, "environment SAGE_FED_STATE_DIR"),
    ],
)
def test_an_empty_state_dir_is_not_the_current_one(
    flags: Mapping[str, Any], environ: Mapping[str, str], origin: str
) -> None:
    """A variable that nobody has set must not choose where the books are."""
    assert f"state_dir ({origin}): expected a path, not ''" in refusal(flags, environ)


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_is_no_state_dir(tmp_path: Path, below: str) -> None:
    """It is named as such, not as the tokens or the books that would be below it."""
    (tmp_path / "file").touch()
    place = tmp_path / "file" / below if below else tmp_path / "file"
    said = refusal({"state_dir": str(place)})
    assert f"state_dir (flag): expected a directory, there or yet to be made; {place} is" in said


@pytest.mark.parametrize("below", ["", "new", "new/one"])
def test_a_state_dir_need_not_be_there(tmp_path: Path, below: str) -> None:
    """The daemon makes it."""
    assert tmp_path / below == load({"state_dir": str(tmp_path / below)}).settings.state_dir


def test_a_flag_that_was_not_given_changes_nothing() -> None:
    """None is how the command line says "not given"."""
    assert "default" == load({"listen": None}).origins["listen"]


def test_the_file_may_come_from_the_environment(toml: Path) -> None:
    """SAGE_FED_CONFIG names the file where no flag does."""
    toml.write_text('log_level = "DEBUG"\n')
    effective = load(environ={"SAGE_FED_CONFIG": str(toml)})
    assert "debug" == effective.settings.log_level
    assert f"file {toml}" == effective.origins["log_level"]


@pytest.mark.parametrize(
    ("flags", "environ", "text", "expected", "origin"),
    [
        ({}, {}, "", "qwen2.5", "default"),
        ({}, {}, 'profile = "demo"', "demo", "file"),
        ({}, {"SAGE_FED_PROFILE": "qwen2.5"}, 'profile = "demo"', "qwen2.5", "environment"),
        ({"profile": "demo"}, {"SAGE_FED_PROFILE": "qwen2.5"}, "", "demo", "flag"),
    ],
)
def test_the_profile_follows_the_same_order(
    toml: Path,
    flags: dict[str, str],
    environ: dict[str, str],
    text: str,
    expected: str,
    origin: str,
) -> None:
    """The highest layer that names a profile chooses it."""
    toml.write_text(text)
    effective = load_settings(flags, environ, toml)
    assert expected == effective.settings.profile
    assert origin == effective.origins["profile"].split()[0]
    assert f"profile {expected}" == effective.origins["tactical.model"]


@pytest.mark.parametrize("name", ["demo", "jetson-thor", "qwen2.5"])
def test_each_packaged_profile_loads(name: str) -> None:
    """A profile alone is a complete set of settings, and is among those that are offered."""
    settings = load_settings({"profile": name}, {}, None).settings
    assert name == settings.profile
    assert name in profile_names()


def test_the_demo_pair_has_room_for_64_clients() -> None:
    """64 jobs of a full context fit each tier's KV cache in fp32."""
    settings = load().settings
    for tier, layers, kv_heads in ((Tier.TACTICAL, 4, 1), (Tier.STRATEGIC, 8, 2)):
        token_bytes = 2 * layers * kv_heads * 32 * 4
        needed = 64 * settings.tiers[tier].max_context_tokens * token_bytes
        assert needed <= settings.tiers[tier].kv_cache_bytes


@pytest.mark.parametrize(
    ("environ", "expected", "origin"),
    [
        ({}, "/home/x/.local/state/sage-fed", "default"),
        ({"XDG_STATE_HOME": "/xdg"}, "/xdg/sage-fed", "environment XDG_STATE_HOME"),
        ({"XDG_STATE_HOME": "relative"}, "/home/x/.local/state/sage-fed", "default"),
        (
            {"XDG_STATE_HOME": "/xdg", "STATE_DIRECTORY": "/var/lib/a:/var/lib/b"},
            "/var/lib/a",
            "environment STATE_DIRECTORY",
        ),
        (
            {"STATE_DIRECTORY": "/var/lib/a", "SAGE_FED_STATE_DIR": "/mine"},
            "/mine",
            "environment SAGE_FED_STATE_DIR",
        ),
    ],
)
def test_the_state_directory_is_where_the_system_puts_state(
    environ: dict[str, str], expected: str, origin: str
) -> None:
    """The one of systemd, else of XDG, else of the home; a setting of ours beats them all."""
    effective = load(environ=environ)
    assert Path(expected) == effective.settings.state_dir
    assert origin == effective.origins["state_dir"]


def test_credentials_that_cannot_be_looked_at_are_an_error() -> None:
    """Without its tokens the daemon would be open to more callers than it should."""
    environ = {"HOME": "/home/x", "CREDENTIALS_DIRECTORY": f"/{'x' * 300}"}
    with pytest.raises(ConfigError, match=r"auth\.tokens_file .environment CREDENTIALS_DIRECTORY."):
        load(environ=environ)


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ('devise = "cpu"', "devise", "did you mean device?"),
        ("[tactical]\nmax_bach = 1", "tactical.max_bach", "did you mean tactical.max_batch?"),
        ("[budgets]\n", "budgets", "did you mean budget?"),
        ('[tactical]\nkernels = "torch"', "tactical.kernels", "kernels is a top-level key"),
        (
            "max_batch = 8",
            "max_batch",
            "max_batch is a key of a table: tactical.max_batch",
        ),
        (
            '[accounts.robot]\nrolle = "user"',
            "accounts.robot.rolle",
            "did you mean accounts.robot.role?",
        ),
        # Not a page of all keys, which hides what is wrong.
        ("[zzz]\na = 1", "zzz", "see `sage-fed config` for those that there are"),
        ("[rate_limits]\nzzz = 1", "rate_limits.zzz", "known: rate_limits.concurrent_jobs, "),
    ],
)
def test_an_unknown_key_in_the_file_is_refused(toml: Path, text: str, key: str, hint: str) -> None:
    """At every level, with the file's name and the nearest key."""
    toml.write_text(text)
    message = refusal(config=toml)
    assert f"{key} (file {toml}): unknown key; {hint}" in message


@pytest.mark.parametrize(
    ("name", "key", "hint"),
    [
        ("SAGE_FED_DEVISE", "devise", "did you mean device?"),
        ("SAGE_FED_LIMITS__MAX_JOB", "limits.max_job", "did you mean limits.max_jobs?"),
        ("SAGE_FED_DEVICE__X", "device.x", "nothing can be set here"),
    ],
)
def test_an_unknown_variable_is_refused(name: str, key: str, hint: str) -> None:
    """A mistyped variable would otherwise have no effect, silently."""
    expected = f"{key} (environment {name}): unknown key; {hint}"
    assert expected == refusal(environ={name: "1"})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("tactical_max_batch", "tactical.max_batch"),
        ("metrics.listen", "metrics_listen"),
        ("metrics_port", "metrics_listen"),
        ("metrics.port", "metrics_listen"),
        ("port", "listen"),
    ],
)
def test_a_key_that_is_nearly_spelt_right_is_named(toml: Path, given: str, meant: str) -> None:
    """A dot for an underscore, the reverse, and what others call it; a variable as a variable."""
    toml.write_text(f"{given} = 1\n")
    assert f"{given} (flag): unknown key; did you mean {meant}?" == refusal({given: "1"})
    assert f"{given} (file {toml}): unknown key; did you mean {meant}?" in refusal(config=toml)
    name, right = (f"SAGE_FED_{key.upper().replace('.', '__')}" for key in (given, meant))
    expected = f"{given} (environment {name}): unknown key; did you mean {right}?"
    assert expected == refusal(environ={name: "1"})


@pytest.mark.parametrize("hostile", ["\x1b[2J", "\u202e", "\r", "\n", "\u2028", "\udcff"])
def test_what_a_terminal_would_obey_is_shown_escaped(toml: Path, hostile: str) -> None:
    """A key, a variable, an account or a value of somebody else's file paints no terminal."""
    written = hostile.encode("unicode_escape").decode("ascii")
    in_toml = f'"\\u{ord(hostile[0]):04x}{hostile[1:]}"'
    messages = [
        refusal({f"tactical.{hostile}": "x"}),
        refusal({f"accounts.{hostile}.role": "user"}),
        refusal({"profile": hostile}),
        refusal({"device": hostile}),
        refusal(environ={f"SAGE_FED_{hostile}": "x"}),
    ]
    if hostile != "\udcff":  # TOML cannot hold half a surrogate pair.
        toml.write_text(f"{in_toml} = 1\n[budget.{in_toml}]\na = 1\n")
        messages.append(refusal(config=toml))
    for message in messages:
        assert written in message
        assert message.replace("\n  ", "").isprintable()


def test_the_ledger_takes_every_setting() -> None:
    """What the settings allow at most is what the books can hold."""
    bounds = {
        "ledger.hold_ttl_s": MAX_TTL_S,
        "limits.max_deadline_s": MAX_TTL_S,
        "limits.max_request_id_chars": MAX_TEXT,
        "ledger.result_retention_s": 3660 * 86400.0,
        "ledger.entry_retention_s": 3660 * 86400.0,
    }
    for key, bound in bounds.items():
        section, name = key.split(".")
        own = {**bounds, key: bound}
        assert bound == getattr(getattr(load(own).settings, section), name)
        assert key in refusal({**bounds, key: bound * 2})


def test_variables_that_are_not_settings_pass() -> None:
    """A client's variables and other programs' are not ours to refuse."""
    load(environ={"SAGE_FED_ADDRESS": "a:1", "SAGE_FED_TOKEN": "t", "SAGE_FEDERATION": "x"})


def test_only_the_environment_passed_in_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loads with the same arguments are the same, wherever they run."""
    expected = load().rows()
    monkeypatch.setenv("SAGE_FED_LOG_LEVEL", "debug")
    monkeypatch.setenv("STATE_DIRECTORY", "/elsewhere")
    assert expected == load().rows()


def test_the_default_rate_card_is_in_the_package() -> None:
    """The daemon starts without a setting for its prices."""
    cards = Path(sage_fed.__file__).parent / "cards"
    assert (cards / f"{load().settings.rate_card}.toml").is_file()


def test_a_table_is_not_set_by_one_variable() -> None:
    """Text where a table belongs is refused, also beside variables for single keys."""
    alone = refusal(environ={"SAGE_FED_TACTICAL": "{}"})
    assert "tactical (environment SAGE_FED_TACTICAL): expected a table" in alone
    both = refusal(environ={"SAGE_FED_TACTICAL": "{}", "SAGE_FED_TACTICAL__MAX_BATCH": "1"})
    assert "tactical.max_batch (environment SAGE_FED_TACTICAL__MAX_BATCH): a variable" in both


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"device": "gpu"}, "device (flag): expected cpu, auto or cuda:N, for example cuda:0, not"),
        ({"listen": "::1:6590"}, "listen (flag): expected HOST:PORT, for example"),
        ({"tactical.kv_cache_bytes": "1XB"}, "tactical.kv_cache_bytes (flag): expected a size"),
        ({"tactical.max_context_tokens": 0}, "should be greater than 0, not 0"),
        ({"tactical.kv_overcommit": 0.5}, "should be greater than or equal to 1, not 0.5"),
        ({"tactical.prefix_cache": "perhaps"}, "tactical.prefix_cache (flag): should be"),
        ({"scheduling.tactical_share": 1}, "scheduling.tactical_share (flag): should be less"),
        ({"tactical.max_batch": True}, "tactical.max_batch (flag): expected a number, not True"),
        ({"strategic.prefill_chunk_tokens": "x"}, "strategic.prefill_chunk_tokens (flag): should"),
        ({"strategic.precision": "int3"},
         "should be 'fp32', 'bf16', 'fp16', 'int8', 'int4' or 'fp8', not 'int3'"),
        ({"strategic.model": "a b"}, "strategic.model (flag): expected a hub id"),
        ({"weights_cache": "some/dir"}, "weights_cache (flag): expected auto, off or an absolute"),
        ({"weights_cache_bytes": "0"}, "weights_cache_bytes (flag): should be greater than 0"),
        ({"kernels": "fast"}, "should be 'auto', 'native' or 'torch', not 'fast'"),
        ({"strategic.revision": "main"}, "strategic.revision (flag): expected a commit"),
        ({"budget.initial_atp": "0.0000001"}, "budget.initial_atp (flag): expected at most 6"),
        ({"budget.initial_atp": "-1"}, "budget.initial_atp (flag): expected an amount from 0"),
        ({"drain_grace_s": "inf"}, "drain_grace_s (flag): should be a finite number"),
        ({"auth.anonymous_account": "A B"}, "auth.anonymous_account (flag): expected 1 to 64"),
        ({"accounts.Robot.role": "user"}, "accounts.Robot (flag): expected 1 to 64 lower-case"),
        ({"accounts.robot.role": "root"}, "should be 'user', 'admin' or 'monitor', not 'root'"),
        ({"state_dir": ""}, "state_dir (flag): expected a path, not ''"),
        ({"profile": "dem"}, "profile (flag): no profile 'dem'; did you mean demo?"),
        ({"ledger.result_retention_s": 1e11}, "ledger.result_retention_s (flag): should be less"),
        ({"ledger.hold_ttl_s": 1e9}, "ledger.hold_ttl_s (flag): should be less than or equal to"),
        ({"limits.max_request_id_chars": 10_000}, "should be less than or equal to 256, not 10000"),
        ({"limits.max_deadline_s": 1e9}, "limits.max_deadline_s (flag): should be less than"),
        ({"listen": 5}, "listen (flag): expected HOST:PORT, for example 127.0.0.1:6590"),
        ({"listen": "127.0.0.1:70000"},
         "listen (flag): expected a port from 0 to 65535, not '127.0.0.1:70000' ["),
        ({"listen": "1.2.3:1"}, "listen (flag): expected an IPv4 address of four numbers, not '1."),
        ({"listen": "[::g]:1"}, "listen (flag): expected an IPv6 address in brackets, not '[::g"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_its_origin_and_what_is_right(
    flags: dict[str, Any], expected: str
) -> None:
    """An operator can act on the text alone."""
    assert expected in refusal(flags)


@pytest.mark.parametrize(
    ("flags", "first", "second"),
    [
        (
            {"budget.initial_atp": "6000"},
            "budget.initial_atp (flag)",
            "budget.capacity_atp (profile demo)",
        ),
        (
            {"budget.strategic_floor_atp": 9999},
            "budget.strategic_floor_atp (flag)",
            "budget.capacity_atp (profile demo)",
        ),
        (
            {"limits.max_new_tokens": 9},
            "limits.default_new_tokens (profile demo)",
            "limits.max_new_tokens (flag)",
        ),
        (
            {"tactical.max_context_tokens": 64},
            "limits.default_new_tokens (profile demo)",
            "tactical.max_context_tokens (flag)",
        ),
        ({"listen": "0.0.0.0:6590"}, "listen (flag)", "auth.tokens_file (not set anywhere)"),
        ({"listen": "127.0.0.1:9659"}, "listen (flag)", "metrics_listen (not set anywhere)"),
        (
            {"ledger.hold_ttl_s": 0.3},
            "ledger.hold_ttl_s (flag)",
            "limits.max_deadline_s (not set anywhere)",
        ),
        (
            {"strategic.model": "Qwen/Qwen3-8B"},
            "strategic.revision (not set anywhere)",
            "strategic.model (flag)",
        ),
    ],
)
def test_a_combination_that_cannot_work_names_every_key(
    flags: dict[str, Any], first: str, second: str
) -> None:
    """Each of the keys is a place to mend it, so each comes with its origin."""
    assert refusal(flags).startswith(f"{first}, {second}: ")


def test_all_mistakes_are_reported_at_once() -> None:
    """One start shows every problem of the values."""
    message = refusal({"device": "gpu", "log_level": "loud"})
    assert message.startswith("2 settings cannot be used:\n")
    assert "device (flag)" in message
    assert "log_level (flag)" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"a = = 1", "not valid TOML"), (b'a = "\xff"', "not UTF-8 text"), (None, "No such file")],
)
def test_a_file_that_cannot_be_used_is_named(
    toml: Path, content: bytes | None, expected: str
) -> None:
    """A file that was asked for and cannot be read never counts as empty."""
    if content is not None:
        toml.write_bytes(content)
    message = refusal(config=toml)
    assert message.startswith(f"configuration file {toml}: ")
    assert expected in message


def test_another_model_does_not_inherit_the_revision() -> None:
    """A revision belongs to its model; the same model keeps it."""
    local = load_settings({"tactical.model": "/models/small"}, {}, None).settings
    assert (None, "Qwen/Qwen2.5-7B-Instruct") == (local.tactical.revision, local.strategic.model)
    same = load_settings({"tactical.model": "Qwen/Qwen2.5-0.5B-Instruct"}, {}, None).settings
    assert same.tactical.revision is not None
    pinned = load_settings({"tactical.model": "a/b", "tactical.revision": "0" * 40}, {}, None)
    assert "0" * 40 == pinned.settings.tactical.revision


def test_beyond_loopback_with_a_tokens_file_is_fine(tmp_path: Path) -> None:
    """The guard is about strangers, not about networks."""
    flags = {"listen": "[::]:6590", "auth.tokens_file": str(tmp_path / "tokens.toml")}
    encrypted = {"tls.certificate": "/tls.crt", "tls.key": "/tls.key"}
    for how in ({"tls.allow_plaintext": True}, encrypted, {**encrypted, "tls.client_ca": "/ca"}):
        assert Address("::", 6590) == load({**flags, **how}).settings.listen
    by_certificate = {**encrypted, "tls.client_ca": "/ca", "listen": "[::]:6590"}
    assert load(by_certificate).settings.tls.client_ca == Path("/ca")


def test_a_tokens_file_in_the_state_directory_counts(tmp_path: Path) -> None:
    """Where there is one and no other is named, it says who may call; the origin says so."""
    open_doors = {
        "listen": "[::]:6590", "metrics_listen": "[::]:9659", "tls.allow_plaintext": True,
        "state_dir": str(tmp_path),
    }  # fmt: skip
    tokens = tmp_path / "tokens.toml"
    assert f"`sage-fed token create` writes {tokens}" in refusal(open_doors)
    tokens.touch()
    effective = load(open_doors)
    assert (tokens, "found in state_dir") == (
        effective.settings.auth.tokens_file, effective.origins["auth.tokens_file"],
    )  # fmt: skip
    assert tokens == load({**open_doors, "auth.tokens_file": ""}).settings.auth.tokens_file
    named = load({**open_doors, "auth.tokens_file": "/own.toml"})
    assert (Path("/own.toml"), "flag") == (
        named.settings.auth.tokens_file, named.origins["auth.tokens_file"],
    )  # fmt: skip


@pytest.mark.parametrize("written", ["$CREDENTIALS_DIRECTORY", "${CREDENTIALS_DIRECTORY}"])
def test_secrets_may_be_where_systemd_puts_them(written: str) -> None:
    """A leading $CREDENTIALS_DIRECTORY of tokens and TLS files is that of the service."""
    flags = {
        "auth.tokens_file": f"{written}/tokens.toml",
        "tls.certificate": f"{written}/tls.crt",
        "tls.key": f"{written}/tls.key",
        "tls.client_ca": f"{written}/client-ca.crt",
    }
    environ = {"CREDENTIALS_DIRECTORY": "/run/credentials/sage-fed.service"}
    settings = load(flags, environ).settings
    assert [
        Path(environ["CREDENTIALS_DIRECTORY"]) / name
        for name in ("tokens.toml", "tls.crt", "tls.key", "client-ca.crt")
    ] == [
        settings.auth.tokens_file, settings.tls.certificate, settings.tls.key,
        settings.tls.client_ca,
    ]  # fmt: skip
    assert "$CREDENTIALS_DIRECTORY is not set; systemd sets it" in refusal(flags)


def test_credentials_of_the_units_names_need_no_setting(tmp_path: Path) -> None:
    """What LoadCredential has put there is used, what it has not is left out, a flag wins."""
    (tmp_path / "tokens.toml").touch()
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    settings = load({}, environ).settings
    assert (tmp_path / "tokens.toml", None) == (settings.auth.tokens_file, settings.tls.key)
    for name in ("tls.crt", "tls.key", "client-ca.crt"):
        (tmp_path / name).touch()
    given = load({"auth.tokens_file": "/own"}, environ)
    tls = given.settings.tls
    assert (Path("/own"), "environment CREDENTIALS_DIRECTORY") == (
        given.settings.auth.tokens_file, given.origins["tls.client_ca"],
    )  # fmt: skip
    assert [tmp_path / name for name in ("tls.crt", "tls.key", "client-ca.crt")] == [
        tls.certificate, tls.key, tls.client_ca,
    ]  # fmt: skip


def test_rate_limits_are_the_accounts_own_or_the_common_ones() -> None:
    """Key by key: one that an account does not set is the common one; 0 is no limit."""
    flags = {
        "rate_limits.requests_per_minute": 60,
        "rate_limits.concurrent_jobs": 4,
        "accounts.robot.rate_limits.requests_per_minute": 9,
        "accounts.free.rate_limits.concurrent_jobs": 0,
        "accounts.named.role": "user",
    }
    settings = load(flags).settings
    assert [(60, 4), (9, 4), (60, 0), (60, 4)] == [
        (rates.requests_per_minute, rates.concurrent_jobs)
        for rates in map(settings.account_rates, ("guest", "robot", "free", "named"))
    ]
    assert "-1" in refusal({"accounts.robot.rate_limits.concurrent_jobs": -1})


def test_accounts_have_budgets_of_their_own_or_the_common_one(toml: Path) -> None:
    """Amounts stay exact from the file to uATP."""
    toml.write_text(
        '[accounts.robot]\nrole = "admin"\n[accounts.robot.budget]\ninitial_atp = 0.1\n'
        "capacity_atp = 6.59\nrefill_atp_per_s = 0.000001\nstrategic_floor_atp = 0\n"
    )
    effective = load(environ={"SAGE_FED_ACCOUNTS__GUEST__ROLE": "user"}, config=toml)
    settings = effective.settings
    robot = settings.account_budget("robot")
    assert Role.ADMIN == settings.accounts["robot"].role
    assert (100_000, 6_590_000, 1, 0) == (
        uatp_from_atp(robot.initial_atp),
        uatp_from_atp(robot.capacity_atp),
        uatp_from_atp(robot.refill_atp_per_s),
        uatp_from_atp(robot.strategic_floor_atp),
    )
    assert settings.budget == settings.account_budget("guest")
    assert settings.budget == settings.account_budget("nobody-we-know")
    origin = "environment SAGE_FED_ACCOUNTS__GUEST__ROLE"
    assert origin == effective.origins["accounts.guest.role"]
    assert f"file {toml}" == effective.origins["accounts.robot.budget.initial_atp"]


def test_an_amount_finer_than_one_uatp_in_a_file_is_refused(toml: Path) -> None:
    """Also where a binary float would have hidden the difference."""
    toml.write_text("[budget]\ninitial_atp = 1.00000000000000000001\n")
    assert "budget.initial_atp" in refusal(config=toml)


def test_two_free_ports_are_not_the_same_port() -> None:
    """Port 0 asks the kernel, which gives each listener its own."""
    settings = load({"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}).settings
    assert (0, 0) == (settings.listen.port, settings.metrics_listen.port)


def test_an_incomplete_account_budget_is_refused(toml: Path) -> None:
    """Half a budget would leave the other half to a guess."""
    toml.write_text("[accounts.robot.budget]\ninitial_atp = 1\n")
    message = refusal(config=toml)
    assert "accounts.robot.budget.capacity_atp (not set anywhere): missing" in message


def test_an_empty_text_unsets_an_optional_value() -> None:
    """The environment has no other way to say "none"."""
    environ = {"SAGE_FED_CARDS_DIR": "", "SAGE_FED_AUTH__TOKENS_FILE": ""}
    settings = load(environ=environ).settings
    assert (None, None) == (settings.cards_dir, settings.auth.tokens_file)


def test_settings_do_not_change() -> None:
    """What was parsed once is trusted for the life of the daemon."""
    settings = load().settings
    with pytest.raises(ValidationError):
        settings.device = "cuda:0"
    with pytest.raises(ValidationError):
        settings.tactical.max_batch = 1


def descriptions(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    """Every key with its meaning; `accounts.NAME` stands for any account."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is None:
            yield f"{prefix}{name}", field.description or ""
        else:
            of_any_name = "NAME." * (get_origin(field.annotation) is dict)
            yield from descriptions(section, f"{prefix}{name}.{of_any_name}")


def test_every_key_is_described() -> None:
    """`sage-fed config` and the documentation list the same keys, each with its meaning."""
    described = dict(descriptions(Settings, ""))
    printed = {key for key, _, _ in load().rows()}
    assert printed - {"accounts"} == {key for key in described if ".NAME." not in key}
    assert "accounts.NAME.budget.capacity_atp" in described
    assert [] == [key for key, description in described.items() if not description]


class Door(BaseModel):
    """A section with a secret, as a later one may have."""

    code: SecretStr
    spare: SecretStr | None = None
    hinges: int = 2


class House(BaseModel):
    """Settings with that section."""

    door: Door


def test_a_secret_is_masked_where_it_is_printed() -> None:
    """The type alone is enough; no caller has to remember."""
    house = House(door=Door(code=SecretStr("hunter2"), spare=SecretStr("hunter3")))
    rows = dict(leaves(house))
    assert {"door.code": "**********", "door.spare": "**********", "door.hinges": "2"} == rows
    assert {**rows, "door.hinges": 2} == dict(plain_leaves(house))


def test_a_secret_is_not_repeated_in_an_error() -> None:
    """Neither a secret of the wrong type nor the value of an unknown key is shown."""
    with pytest.raises(ValidationError) as caught:
        House.model_validate({"door": {"code": 271828, "spare": 314159, "hinges": "many"}})
    problems = "\n".join(validation_problems(caught.value, House, {}))
    assert "door.code" in problems
    assert "271828" not in problems
    assert "314159" not in problems
    assert "not 'many'" in problems
    assert "hunter2" not in refusal({"auth.token": "hunter2"})


@pytest.mark.parametrize(
    ("text", "expected", "loopback"),
    [
        ("127.0.0.1:6590", Address("127.0.0.1", 6590), True),
        ("127.9.9.9:0", Address("127.9.9.9", 0), True),
        ("localhost:1", Address("localhost", 1), True),
        ("[::1]:6590", Address("::1", 6590), True),
        ("[0:0::1]:6590", Address("::1", 6590), True),
        ("0.0.0.0:65535", Address("0.0.0.0", 65535), False),
        ("[::]:1", Address("::", 1), False),
        ("robot.local:1", Address("robot.local", 1), False),
        ("unix:/run/s.sock", UnixSocket("/run/s.sock"), True),
        ("unix:///run/s.sock", UnixSocket("/run/s.sock"), True),
    ],
)
def test_an_address_is_read_and_written(
    text: str, expected: Address | UnixSocket, loopback: bool
) -> None:
    """IPv4, bracketed IPv6, names and sockets; what is written is read back the same."""
    assert expected == parse_listen(text)
    assert expected == parse_listen(str(expected))
    assert loopback == expected.is_loopback


@pytest.mark.parametrize(
    "text",
    ["", "6590", ":6590", "localhost", "::1:6590", "[::1]", "[x]:1", "1.2.3:1", "1.2.3.4.5:1",
     "a:65536", "a:-1", "a:1:2", "http://a:1", "a b:1", "unix:", "unix:a", "unix:/", "unix:/a\nb",
     "unix:@a", "unix:/" + "a" * 108],
)  # fmt: skip
def test_a_malformed_address_is_refused(text: str) -> None:
    """Nothing is guessed."""
    with pytest.raises(ValueError, match=r".+"):
        parse_listen(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("512MiB", 2**29), ("1.5 GiB", 3 * 2**29), ("2GB", 2_000_000_000), ("7b", 7)],
)
def test_a_size_is_read(text: str, expected: int) -> None:
    """Binary and decimal units, in any case."""
    assert expected == parse_size(text)


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e9", "1.5", "0.3KiB", "1 PiB", "1,5GiB"])
def test_a_malformed_size_is_refused(text: str) -> None:
    """A size is a whole number of bytes in a known unit."""
    with pytest.raises(ValueError, match="expected"):
        parse_size(text)


@given(st.integers(0, 2**50))
def test_a_printed_size_is_read_back(num_bytes: int) -> None:
    """`sage-fed config` prints what a file may hold."""
    assert num_bytes == parse_size(format_size(num_bytes))


@given(st.integers(0, 10**15))
def test_an_amount_is_exact_both_ways(uatp: int) -> None:
    """No budget gains or loses a uATP on its way."""
    assert uatp == uatp_from_atp(atp_from_uatp(uatp))
    assert atp_from_uatp(-uatp) == -atp_from_uatp(uatp)


@pytest.mark.parametrize("amount", ["x", "nan", "inf", "-0.1", "1000000000.000001", "1.0000001"])
def test_an_amount_that_is_not_exact_uatp_is_refused(amount: str) -> None:
    """A budget is never rounded."""
    with pytest.raises(ValueError, match="expected"):
        uatp_from_atp(amount)
    assert 6_590_000 == uatp_from_atp(Decimal("6.59"))


def test_a_model_name_is_a_bundled_model_a_directory_or_a_hub_id() -> None:
    """The form alone decides, so the same settings mean the same on every machine."""
    bundled = resolve_model("bundled:demo-tactical")
    assert isinstance(bundled, Path)
    assert ("sage_fed", "models", "demo-tactical") == bundled.parts[-3:]
    assert Path("/models/x") == resolve_model("/models/x")
    assert Path("models/x") == resolve_model("./models/x")
    assert Path("..") == resolve_model("..")
    assert Path("some/where") == resolve_model(Path("some/where"))
    assert "Qwen/Qwen2.5-7B-Instruct" == resolve_model("Qwen/Qwen2.5-7B-Instruct")


def test_a_hub_id_without_a_commit_says_how_a_directory_is_written() -> None:
    """Whoever meant a folder of that name is told how to say so."""
    with pytest.raises(ConfigError, match=r"if it is a directory, write \./models/mine"):
        load({"tactical.model": "models/mine"})


@pytest.mark.parametrize(
    "name", ["", "qwen", "a/b/c", "a/..", "bundled:", "bundled:../x", "bundled:/etc"]
)
def test_another_model_name_is_refused(name: str) -> None:
    """A bundled name cannot leave the package's folder."""
    with pytest.raises(ValueError, match="expected a hub id"):
        resolve_model(name)


KUBERNETES = {
    # What a pod is given beside a Service sage-fed with two named ports, and a second Service.
    "SAGE_FED_SERVICE_HOST": "10.43.7.9",
    "SAGE_FED_SERVICE_PORT": "6590",
    "SAGE_FED_SERVICE_PORT_GRPC": "6590",
    "SAGE_FED_SERVICE_PORT_HTTP_METRICS": "9659",
    "SAGE_FED_PORT": "tcp://10.43.7.9:6590",
    "SAGE_FED_PORT_6590_TCP": "tcp://10.43.7.9:6590",
    "SAGE_FED_PORT_6590_TCP_ADDR": "10.43.7.9",
    "SAGE_FED_PORT_6590_TCP_PORT": "6590",
    "SAGE_FED_PORT_6590_TCP_PROTO": "tcp",
    "SAGE_FED_PORT_9659_UDP": "udp://[fd00::9]:9659",
    "SAGE_FED_METRICS_SERVICE_HOST": "fd00::9",
    "SAGE_FED_METRICS_PORT": "tcp://[fd00::9]:9659",
}


def test_what_kubernetes_sets_for_a_service_is_no_setting() -> None:
    """A Service that has the program's name would keep it from starting, in every pod."""
    effective = load(environ=KUBERNETES | {"SAGE_FED_LISTEN": "127.0.0.1:7000"})
    assert "127.0.0.1:7000" == str(effective.settings.listen)
    assert tuple(sorted(KUBERNETES)) == effective.ignored
    assert () == load().ignored


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SAGE_FED_PORT", "7000"),
        ("SAGE_FED_SERVICE_PORT", "seven"),
        ("SAGE_FED_SERVICE_HOST", "robot.example"),
        ("SAGE_FED_METRICS__PORT", "tcp://10.43.7.9:9659"),
        ("SAGE_FED_PORT_6590", "tcp://10.43.7.9:6590"),
    ],
)
def test_what_a_person_mistyped_is_none_of_kubernetes(name: str, value: str) -> None:
    """`SAGE_FED_PORT=7000` is somebody's wish, and would have no effect."""
    message = refusal(environ={name: value})
    assert f"(environment {name}): unknown key" in message
    assert "\n" not in message
    assert len(message) < 200


def test_a_mistyped_variable_of_a_client_is_named() -> None:
    """It is a key of nothing, and would be told to be one."""
    assert "tokn (environment SAGE_FED_TOKN): unknown; did you mean SAGE_FED_TOKEN?" == refusal(
        environ={"SAGE_FED_TOKN": "x"}
    )


def test_a_file_of_something_else_is_no_page_of_errors(toml: Path) -> None:
    """Ten lines, and how many more there are."""
    toml.write_text("".join(f"zzz{i} = 1\n" for i in range(50)))
    lines = refusal(config=toml).splitlines()
    assert ("50 settings cannot be used:", 12, "  and 40 more") == (lines[0], len(lines), lines[-1])
