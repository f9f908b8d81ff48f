"""`sage-fed token`: the file, what is shown, and what is refused."""

from __future__ import annotations

import hashlib
import json
import stat
import threading
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sage_fed.auth import Authenticator, read_register
from sage_fed.cli.app import build_app
from sage_fed.core import Caller, Role
from sage_fed.errors import ConfigError


def token(tmp_path: Path, *arguments: str) -> Result:
    """`sage-fed token ...` on a file of its own."""
    file = ("--tokens-file", str(tmp_path / "tokens.toml"))
    environ = {"SAGE_FED_PROFILE": "demo", "SAGE_FED_STATE_DIR": str(tmp_path)}
    return CliRunner(env=environ).invoke(build_app(), ["token", *arguments, *file])


def made(tmp_path: Path, *arguments: str) -> dict[str, str]:
    """What `token create --json` says."""
    done = token(tmp_path, "create", "--account", "arm", *arguments, "--json")
    assert 0 == done.exit_code, done.output
    said: dict[str, str] = json.loads(done.stdout)
    return said


def test_a_token_is_shown_once_and_kept_as_a_digest(tmp_path: Path) -> None:
    """Stdout is the token alone; the file is private and has its SHA-256."""
    done = token(tmp_path, "create", "--account", "arm", "--role", "admin", "--name", "left")
    assert 0 == done.exit_code, done.output
    secret = done.stdout.strip()
    assert (secret.startswith("sagefed_"), 51) == (True, len(secret))
    assert secret not in done.stderr
    path = tmp_path / "tokens.toml"
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    (entry,) = tomllib.loads(path.read_text())["token"]
    assert hashlib.sha256(secret.encode()).hexdigest() == entry["sha256"]
    door = Authenticator([], None, read_register(path, {}))
    assert Caller("arm", Role.ADMIN) == door.caller([f"Bearer {secret}"])
    assert secret not in token(tmp_path, "list").output
    assert ["tokens.toml"] == [file.name for file in tmp_path.iterdir()]


def test_what_is_there_stays_as_it_was(tmp_path: Path) -> None:
    """Comments, order and the file's mode; only others' access is taken away."""
    path = tmp_path / "tokens.toml"
    first = f'# the fleet\n[[token]]\nsha256 = "{"0" * 64}" # the left arm\naccount = "left"\n'
    path.write_text(first)
    path.chmod(0o644)
    second = made(tmp_path)
    assert path.read_text().startswith(first)
    assert 0o640 == stat.S_IMODE(path.stat().st_mode)
    assert 0 == token(tmp_path, "revoke", second["id"]).exit_code
    assert first.strip() == path.read_text().strip()
    assert 0 == token(tmp_path, "revoke", "00000000").exit_code
    assert "no entries" in token(tmp_path, "list").stdout
    assert "# the fleet" in path.read_text() or not tomllib.loads(path.read_text())


def test_the_list_shows_who_may_call_and_until_when(tmp_path: Path) -> None:
    """Tokens and certificates; ids and names are what they are revoked by."""
    one = made(tmp_path, "--name", "one", "--expires", "90d")
    made(tmp_path, "--certificate", "arm.fleet", "--role", "monitor")
    listed = json.loads(token(tmp_path, "list", "--json").stdout)["entries"]
    assert [(one["id"], "token", "one", "user"), ("arm.fleet", "certificate", "", "monitor")] == [
        (entry["id"], entry["kind"], entry["name"], entry["role"]) for entry in listed
    ]
    assert one["expires"] == listed[0]["expires"] > one["created"]
    assert 0 == token(tmp_path, "revoke", "arm.fleet").exit_code
    assert 0 == token(tmp_path, "revoke", "one").exit_code
    assert "no entries in" in token(tmp_path, "list").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", "--account", "Arm"), "--account: expected 1 to 64 lower-case"),
        (("create", "--account", "arm", "--role", "root"), "'root' is none of user, admin"),
        (("create", "--account", "arm", "--expires", "soon"), "'soon' is neither 90d"),
        (("create", "--account", "arm", "--expires", "2001-01-01"), "2001-01-01 is over"),
        (("create", "--account", "arm", "--name", "two\nlines"), "printable"),
        (("create", "--account", "arm", "--name", "taken"), "taken is taken"),
        (("create",), "--account"),
        (("revoke", "nobody"), "no entry of the id or name nobody"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    """Exit code 2 and one line; the file is as it was."""
    made(tmp_path, "--name", "taken")
    before = (tmp_path / "tokens.toml").read_bytes()
    done = token(tmp_path, *arguments)
    assert (2, 1) == (done.exit_code, len(done.stderr.splitlines()))
    assert words in done.stderr
    assert before == (tmp_path / "tokens.toml").read_bytes()


def test_a_file_that_cannot_be_used_is_not_written_over(tmp_path: Path) -> None:
    """The operator's typo is named, and stays theirs to mend."""
    path = tmp_path / "tokens.toml"
    path.write_text("[[token]]\nacount = 'arm'\n")
    done = token(tmp_path, "create", "--account", "arm")
    assert 2 == done.exit_code
    assert "token 1: unknown key acount" in done.stderr
    assert "[[token]]\nacount = 'arm'\n" == path.read_text()
    path.unlink()
    path.mkdir()
    assert 2 == token(tmp_path, "create", "--account", "arm").exit_code


@pytest.mark.parametrize(
    ("first", "again"),
    [("x.example", "x.example"), ("x.example", "dns:X.example"), ("ip:fd00::7", "ip:fd00:0::7")],
)
def test_nobody_is_let_in_for_two_accounts(tmp_path: Path, first: str, again: str) -> None:
    """The file would be one that no command can read; it stays, and the error says what to do."""
    made(tmp_path, "--certificate", first)
    before = (tmp_path / "tokens.toml").read_bytes()
    done = token(tmp_path, "create", "--account", "leg", "--certificate", again)
    assert 2 == done.exit_code, done.output
    assert f"has {first} already, for account arm" in done.stderr
    assert f"`sage-fed token revoke {first}`" in done.stderr
    assert before == (tmp_path / "tokens.toml").read_bytes()
    assert 0 == token(tmp_path, "list").exit_code
    assert 0 == token(tmp_path, "revoke", first).exit_code
    made(tmp_path, "--certificate", again)


def test_a_token_is_nobody_elses(tmp_path: Path) -> None:
    """For digests as for names, in whatever case they were written."""
    from sage_fed.auth.tokens_file import add  # noqa: PLC0415 - the command's own work

    path = tmp_path / "tokens.toml"
    proof = {"sha256": "AB" * 32}
    add(path, {}, proof, account="arm", role=None, name="", expires=None)
    with pytest.raises(ConfigError, match="token revoke abababab"):
        add(path, {}, {"sha256": "ab" * 32}, account="leg", role=None, name="", expires=None)
    assert 1 == len(read_register(path, {}).tokens)


@pytest.mark.parametrize("command", [("list",), ("revoke", "x.example")])
def test_a_file_that_has_somebody_twice_says_how_it_is_mended(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """As an editor leaves it."""
    one = '[[certificate]]\nidentity = "x.example"\naccount = '
    (tmp_path / "tokens.toml").write_text(f'{one}"arm"\n{one}"leg"\n')
    done = token(tmp_path, *command)
    assert 2 == done.exit_code
    assert "certificate 2: identity appears twice, first for account arm" in done.stderr
    assert "delete one of the two [[certificate]] tables" in done.stderr


def test_two_at_once_lose_nothing(tmp_path: Path) -> None:
    """Each change waits for the one before it."""
    from sage_fed.auth.tokens_file import add  # noqa: PLC0415 - the command's own work

    path = tmp_path / "tokens.toml"

    def work(number: int) -> None:
        digest = hashlib.sha256(str(number).encode()).hexdigest()
        add(path, {}, {"sha256": digest}, account="arm", role=None, name="", expires=None)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 16 == len(read_register(path, {}).tokens)
