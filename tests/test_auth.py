"""Tokens: who calls, and files that cannot be used."""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import logging
import math
import pickle
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from sage_fed.auth import (
    ADMIN_TOKEN_FILE,
    Authenticator,
    Certificate,
    Identity,
    Register,
    Token,
    mint_admin_token,
    parse_identity,
    read_register,
    require_role,
)
from sage_fed.core import Caller, Role
from sage_fed.errors import ConfigError, Forbidden, Unauthenticated
from sage_fed.service.tls import names_in
from sage_fed.settings import AccountSettings, Settings, load_settings

ROBOT = Caller("robot", Role.USER)
BOSS = Caller("boss", Role.ADMIN)
LOCAL = Caller("local", Role.USER)
EYE = Caller("eye", Role.MONITOR)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def known(text: str, caller: Caller) -> Token:
    return Token(bytes.fromhex(digest(text)), caller)


def authenticator(anonymous: Caller | None = None) -> Authenticator:
    return Authenticator([known("robot-1", ROBOT), known("boss-1", BOSS)], anonymous)


@pytest.mark.parametrize(
    ("header", "caller"),
    [
        ("Bearer robot-1", ROBOT),
        ("bearer robot-1", ROBOT),
        ("Bearer  robot-1 ", ROBOT),
        (b"Bearer boss-1", BOSS),
    ],
)
def test_a_token_says_who_calls(header: str | bytes, caller: Caller) -> None:
    """The scheme is case-insensitive, the token is not."""
    assert caller == authenticator().caller([header])


@pytest.mark.parametrize(
    "headers",
    [
        ["Bearer nobody"],
        ["Bearer ROBOT-1"],
        ["Bearer "],
        ["Bearer"],
        [""],
        ["robot-1"],
        ["Basic robot-1"],
        ["Bearer robot-1", "Bearer robot-1"],
        ["Bearer " + "x" * 1025],
        [f"Bearer {digest('robot-1')}"],
        ["Bearer \udcff".encode("utf-8", "surrogateescape")],
    ],
)
@pytest.mark.parametrize("anonymous", [None, LOCAL])
def test_a_bad_token_is_refused_even_where_none_is_needed(
    headers: list[str | bytes], anonymous: Caller | None
) -> None:
    """A caller who says who they are, wrongly, is never quietly somebody else."""
    with pytest.raises(Unauthenticated):
        authenticator(anonymous).caller(headers)


def test_without_a_token_the_anonymous_account_calls() -> None:
    """Where one is configured; otherwise a token is needed."""
    assert LOCAL == authenticator(LOCAL).caller([])
    with pytest.raises(Unauthenticated):
        authenticator(None).caller([])


@pytest.mark.parametrize(
    ("caller", "role", "allowed"),
    [(ROBOT, Role.USER, True), (BOSS, Role.USER, True), (BOSS, Role.ADMIN, True),
     (ROBOT, Role.ADMIN, False), (EYE, Role.MONITOR, True), (BOSS, Role.MONITOR, True),
     (EYE, Role.USER, False), (EYE, Role.ADMIN, False), (ROBOT, Role.MONITOR, False)],
)  # fmt: skip
def test_a_role_opens_its_own_doors_only(caller: Caller, role: Role, allowed: bool) -> None:
    """An admin may do all that others may; not the other way round."""
    if allowed:
        require_role(caller, role)
        return
    with pytest.raises(Forbidden):
        require_role(caller, role)


def settings(tmp_path: Path, **flags: object) -> Settings:
    return load_settings(
        {"profile": "demo", "state_dir": str(tmp_path), **flags}, {}, None
    ).settings


def test_loopback_lets_the_anonymous_account_in_never_as_admin(tmp_path: Path) -> None:
    """Even an anonymous account that the settings call admin is a user without its token."""
    on_loopback = settings(tmp_path, **{"accounts.local.role": "admin"})
    admin = mint_admin_token(tmp_path, "local")
    assert LOCAL == Authenticator.from_settings(on_loopback, admin, Register()).caller([])


def test_an_empty_anonymous_account_refuses_everyone_without_a_token(tmp_path: Path) -> None:
    """On loopback too, where the operator says so."""
    closed = settings(tmp_path, **{"auth.anonymous_account": ""})
    with pytest.raises(Unauthenticated):
        Authenticator.from_settings(closed, mint_admin_token(tmp_path, ""), Register()).caller([])


def test_beyond_loopback_a_token_is_needed(tmp_path: Path) -> None:
    """The tokens of the file are let in, nobody else."""
    file = tokens_file(tmp_path, f'[[token]]\nsha256 = "{digest("robot-1")}"\naccount = "robot"\n')
    public = settings(
        tmp_path,
        **{
            "listen": "0.0.0.0:6590",
            "auth.tokens_file": str(file),
            "tls.allow_plaintext": True,
        },
    )
    register = read_register(public.tokens_file, {})
    door = Authenticator.from_settings(public, mint_admin_token(tmp_path, "local"), register)
    assert ROBOT == door.caller(["Bearer robot-1"])
    with pytest.raises(Unauthenticated):
        door.caller([])


def test_the_admin_token_is_fresh_private_and_works(tmp_path: Path) -> None:
    """Every start writes another one, readable by its owner only."""
    old = mint_admin_token(tmp_path, "local")
    first = (tmp_path / ADMIN_TOKEN_FILE).read_text().strip()
    new = mint_admin_token(tmp_path, "local")
    second = (tmp_path / ADMIN_TOKEN_FILE).read_text().strip()
    assert 0o600 == stat.S_IMODE((tmp_path / ADMIN_TOKEN_FILE).stat().st_mode)
    assert [ADMIN_TOKEN_FILE] == [path.name for path in tmp_path.iterdir()]
    assert old.digest != new.digest
    door = Authenticator([new], None)
    assert Caller("local", Role.ADMIN) == door.caller([f"Bearer {second}"])
    with pytest.raises(Unauthenticated):
        door.caller([f"Bearer {first}"])


def test_a_state_directory_that_cannot_be_written_fails_the_start(tmp_path: Path) -> None:
    """The error names the setting."""
    with pytest.raises(ConfigError, match=r"^state_dir: cannot write"):
        mint_admin_token(tmp_path / "missing", "local")


def tokens_file(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_tokens_file_names_accounts_and_roles(tmp_path: Path) -> None:
    """The role is the entry's, or else its account's in the settings, or else a user's."""
    path = tokens_file(
        tmp_path,
        f"""
        [[token]]
        sha256 = "{digest("a").upper()}"
        account = "robot"
        [[token]]
        sha256 = "{digest("b")}"
        account = "robot"
        role = "admin"
        [[token]]
        sha256 = "{digest("c")}"
        account = "boss"
        """,
    )
    accounts = {"boss": AccountSettings(role=Role.ADMIN)}
    expected = (
        known("a", ROBOT),
        known("b", Caller("robot", Role.ADMIN)),
        known("c", BOSS),
    )
    assert Register(expected) == read_register(path, accounts)


def test_what_a_file_says_of_an_end_counts(tmp_path: Path) -> None:
    """For tokens and for certificates; without one there is none."""
    ends = "expires = 2027-01-31T00:00:00Z\n"
    someone = 'account = "robot"\n'
    text = "".join(
        f"[[{kind}]]\n{proof}\n{someone}{more}"
        for kind, proof, more in (
            ("token", f'sha256 = "{digest("a")}"', ends),
            ("token", f'sha256 = "{digest("b")}"', ""),
            ("certificate", 'identity = "dns:arm.fleet"', ends),
            ("certificate", 'identity = "dns:leg.fleet"', ""),
        )
    )
    register = read_register(tokens_file(tmp_path, text), {})
    end_s = dt.datetime(2027, 1, 31, tzinfo=dt.UTC).timestamp()
    assert [end_s, math.inf] == [token.expires_s for token in register.tokens]
    assert [end_s, math.inf] == [shown.expires_s for shown in register.certificates]


GOOD = f'sha256 = "{digest("a")}"\naccount = "robot"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[token]]\n" + GOOD + 'rol = "user"\n', "token 1: unknown key rol"),
        ("[[token]]\n" + GOOD + 'role = "root"\n', "token 1: role must be user, admin or monitor"),
        ("[[token]]\n" + GOOD + "role = 1\n", "token 1: role must be user, admin or monitor"),
        ("[[token]]\n" + GOOD + "role = []\n", "token 1: role must be user, admin or monitor"),
        ('[[token]]\naccount = "robot"\n', "token 1: sha256 must be"),
        ('[[token]]\nsha256 = "plain-token"\naccount = "robot"\n', "token 1: sha256 must be"),
        (f'[[token]]\nsha256 = "{digest("a")}"\n', "token 1: account must be"),
        ("[[token]]\n" + GOOD + "[[token]]\n" + GOOD, "token 2: sha256 appears twice"),
        ("[[token]]\n" + GOOD + "created = 1\n", "token 1: created must be a text or a time"),
        ("[[token]]\n" + GOOD + "name = 1\n", "token 1: name must be a text or a time"),
        ("[tokens]\n" + GOOD, "unknown key tokens"),
        ("[token]\n" + GOOD, "must be a list of [[token]] tables"),
        ("token = [1]\n", "must be a list of [[token]] tables"),
        ("[[token]\n", "line 1"),
    ],
)
def test_a_tokens_file_that_cannot_be_used_fails_the_start(
    tmp_path: Path, text: str, problem: str
) -> None:
    """The error names the file and the entry, and never shows a secret."""
    path = tokens_file(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        read_register(path, {})
    assert f"auth.tokens_file {path}: " in raised.value.message
    assert problem in raised.value.message
    assert "plain-token" not in raised.value.message


def test_a_missing_tokens_file_fails_the_start(tmp_path: Path) -> None:
    """A typo in its path must not open the door, nor lock it silently."""
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_register(tmp_path / "nowhere.toml", {})


def test_a_tokens_file_that_anyone_may_write_fails_the_start(tmp_path: Path) -> None:
    """Whoever can add a digest is everybody's admin."""
    with pytest.raises(ConfigError, match="anyone may write it"):
        read_register(tokens_file(tmp_path, "[[token]]\n" + GOOD, 0o606), {})


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o640, 0), (0o644, 1)])
def test_a_tokens_file_that_anyone_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warnings: int
) -> None:
    """Digests of weak tokens can be guessed from; long random ones cannot, so it still starts."""
    caplog.set_level(logging.WARNING, "sage_fed.auth")
    assert 1 == len(read_register(tokens_file(tmp_path, "[[token]]\n" + GOOD, mode), {}).tokens)
    assert warnings == len(caplog.records)


def test_a_certificate_says_who_calls() -> None:
    """One of its names is known; a token, where one is sent, goes first."""
    door = Authenticator(
        [known("boss-1", BOSS)], None, Register(certificates=(Certificate("arm.fleet", ROBOT),))
    )
    assert ROBOT == door.caller([], dns("other.fleet", "arm.fleet"))
    assert BOSS == door.caller(["Bearer boss-1"], dns("arm.fleet"))


def dns(*names: str) -> frozenset[Identity]:
    """The names of a certificate that has these DNS names."""
    return names_in(
        {
            "x509_subject_alternative_name": [name.encode() for name in names],
            "peer_dns": [name.encode() for name in names],
        }
    )


ADDRESS, CN = "peer_ip", "x509_common_name"
SHOWN: dict[str, dict[str, list[bytes]]] = {
    # The kind that it is meant as -> a certificate that has the text of the rule as that kind.
    "dns": {"peer_dns": [b"boss.fleet"]},
    "uri": {"peer_uri": [b"spiffe://fleet/boss"]},
    "email": {"peer_email": [b"boss@fleet.example", b"boss.fleet", b"spiffe://fleet/boss"]},
    "ip": {ADDRESS: [b"10.0.0.7", b"fd00::7"]},
    "cn": {CN: [b"boss.fleet", b"boss@fleet.example", b"spiffe://fleet/boss", b"10.0.0.7"]},
}


@pytest.mark.parametrize(
    ("rule", "kinds"),
    [
        ("boss.fleet", {"dns"}),
        ("dns:boss.fleet", {"dns"}),
        ("dns:Boss.Fleet", {"dns"}),
        ("Boss.Fleet", {"dns"}),
        ("spiffe://fleet/boss", {"uri"}),
        ("uri:spiffe://fleet/boss", {"uri"}),
        ("uri:spiffe://FLEET/boss", set()),
        ("email:boss@fleet.example", {"email"}),
        ("ip:10.0.0.7", {"ip"}),
        ("ip:fd00:0::7", {"ip"}),
        ("cn:boss.fleet", {"cn"}),
        ("cn:boss@fleet.example", {"cn"}),
        ("cn:10.0.0.7", {"cn"}),
    ],
)
def test_a_rule_is_met_by_its_kind_of_name_only(rule: str, kinds: set[str]) -> None:
    """An e-mail address that reads like a DNS name, or any other, makes nobody an admin."""
    register = Register(certificates=(Certificate(rule, BOSS),))
    door = Authenticator([], LOCAL, register)
    met = set()
    for kind, context in SHOWN.items():
        others = [name for names in context.values() for name in names]
        shown = names_in({**context, "x509_subject_alternative_name": [*others, b"other.fleet"]})
        try:
            assert BOSS == door.caller([], shown)
        except Unauthenticated:
            continue
        met.add(kind)
    assert kinds == met


@pytest.mark.parametrize(
    ("rule", "advice"),
    [
        ("dn:robot", "did you mean dns:robot?"),
        ("DNS:robot", "did you mean dns:robot?"),
        ("mail:a@b.c", "did you mean email:a@b.c?"),
        ("urn:uuid:7", "URI is uri:urn:uuid:7"),
        ("dns:*.fleet", "without *"),
        ("*.fleet", "without *"),
        ("dns:boss@fleet.example", "a host name"),
        ("dns:spiffe://fleet/boss", "a host name"),
        ("Left Arm", "a common name is cn:Left Arm"),
        ("uri:boss.fleet", "a URI with its scheme"),
        ("uri:spiffe://", "a URI with its scheme"),
        ("spiffe://", "a URI with its scheme"),
        ("email:boss", "an e-mail address"),
        ("email:@fleet", "an e-mail address"),
    ],
)
def test_a_rule_that_no_certificate_can_meet_is_refused(rule: str, advice: str) -> None:
    """It would lock out, silently, whom it is to let in; the error says what is meant."""
    with pytest.raises(ValueError, match=re.escape(advice)):
        parse_identity(rule)


def test_a_common_name_counts_without_its_kind_only_where_it_is_alone() -> None:
    """As it was used before there were alternative names; beside one it is an ornament."""
    door = Authenticator([], None, Register(certificates=(Certificate("boss.fleet", BOSS),)))
    assert BOSS == door.caller([], names_in({CN: [b"boss.fleet"]}))
    beside = {CN: [b"boss.fleet"], ADDRESS: [b"10.0.0.7"]}
    with pytest.raises(Unauthenticated):
        door.caller([], names_in({**beside, "x509_subject_alternative_name": [b"10.0.0.7"]}))


def test_what_is_no_name_is_nobodys() -> None:
    """A certificate can carry any bytes."""
    assert frozenset() == names_in({"peer_dns": [b"\xff"], ADDRESS: [b"nowhere", b""]})


@pytest.mark.parametrize("names", [dns(), dns("nobody.fleet"), dns("arm.fleet", "boss")])
def test_a_certificate_of_nobody_or_of_several_is_refused(names: frozenset[Identity]) -> None:
    """Where clients show certificates, an unknown one is never the anonymous account."""
    both = (Certificate("arm.fleet", ROBOT), Certificate("boss", BOSS))
    with pytest.raises(Unauthenticated):
        Authenticator([], LOCAL, Register(certificates=both)).caller([], names)


def test_what_has_expired_is_refused() -> None:
    """From its second on, tokens and certificates alike."""
    now = [99.0]
    register = Register(
        (Token(bytes.fromhex(digest("robot-1")), ROBOT, expires_s=100.0),),
        (Certificate("arm.fleet", ROBOT, expires_s=100.0),),
    )
    door = Authenticator([], None, register, clock=lambda: now[0])
    assert ROBOT == door.caller(["Bearer robot-1"]) == door.caller([], dns("arm.fleet"))
    now[0] = 100.0
    with pytest.raises(Unauthenticated, match="expired"):
        door.caller(["Bearer robot-1"])
    with pytest.raises(Unauthenticated):
        door.caller([], dns("arm.fleet"))


def test_a_new_register_replaces_the_old_one_and_not_our_own_tokens() -> None:
    """A revoked token is nobody's from then on; the admin token of this machine stays."""
    door = Authenticator([known("boss-1", BOSS)], None, Register((known("robot-1", ROBOT),)))
    assert {"robot", "boss"} == door.accounts()
    door.use(Register((known("arm-1", Caller("arm", Role.USER)), known("eye-1", EYE))))
    assert BOSS == door.caller(["Bearer boss-1"])
    assert {"arm", "boss"} == door.accounts()
    with pytest.raises(Unauthenticated):
        door.caller(["Bearer robot-1"])


def test_tokens_are_compared_by_digest_and_in_constant_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Known or not, one comparison of two digests decides; no token is kept to compare with."""
    compared: list[tuple[bytes, bytes]] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append((ours, theirs))
        return hmac.compare_digest(ours, theirs)

    door = authenticator()
    monkeypatch.setattr("sage_fed.auth.authenticator.hmac", SimpleNamespace(compare_digest=compare))
    door.caller(["Bearer robot-1"])
    for wrong in ("robot-2", "r", "x" * 1000):
        with pytest.raises(Unauthenticated):
            door.caller([f"Bearer {wrong}"])
    assert [(32, 32)] * 4 == [(len(ours), len(theirs)) for ours, theirs in compared]
    kept = pickle.dumps((door._tokens, door._own))
    assert b"robot-1" not in kept


def test_a_missing_file_is_an_empty_one_only_where_nobody_named_it(tmp_path: Path) -> None:
    """The default place may be empty; a named one that is not there is a mistake."""
    assert Register() == read_register(tmp_path / "tokens.toml", {}, optional=True)


SPELT_TWICE = "".join(
    f'[[certificate]]\nidentity = "{name}"\naccount = "{account}"\n'
    for name, account in (("A", "b"), ("dns:a", "c"))
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[token]]\n" + GOOD + "expires = 2027-01-31\n", "token 1: expires must be a time with"),
        ("[[token]]\n" + GOOD + "expires = 2027-01-31T00:00:00\n", "token 1: expires must be"),
        ("[[token]]\n" + GOOD + "name = 7\n", "token 1: name must be a text"),
        ('[[certificate]]\naccount = "robot"\n', "certificate 1: identity must be"),
        ('[[certificate]]\nidentity = "a"\n', "certificate 1: account must be"),
        ('[[certificate]]\nidentity = "a"\naccount = "b"\nsha256 = "c"\n', "unknown key sha256"),
        ('[[certificate]]\nidentity = "a"\naccount = "b"\n' * 2, "identity appears twice"),
        ('[[certificate]]\nidentity = "a@b.c"\naccount = "b"\n', "e-mail address: email:a@b.c"),
        ('[[certificate]]\nidentity = "10.0.0.7"\naccount = "b"\n', "address: ip:10.0.0.7"),
        ('[[certificate]]\nidentity = "fd00::7"\naccount = "b"\n', "address: ip:fd00::7"),
        ('[[certificate]]\nidentity = "ip:arm"\naccount = "b"\n', "an IP address behind ip:"),
        ('[[certificate]]\nidentity = "dns:"\naccount = "b"\n', "must have a name behind dns:"),
        (SPELT_TWICE, "certificate 2: identity appears twice, first for account b; delete"),
        ('[[certificate]]\nidentity = 7\naccount = "b"\n', "identity must be a name"),
    ],
)
def test_the_newer_keys_are_checked_as_well(tmp_path: Path, text: str, problem: str) -> None:
    """Names, times and certificates of the tokens file."""
    with pytest.raises(ConfigError) as raised:
        read_register(tokens_file(tmp_path, text), {})
    assert problem in raised.value.message
