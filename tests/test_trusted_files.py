"""What is read or written with trust: whose it has to be, and that nothing planted is followed."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from certificates import authority, issue
from daemon_process import TROUBLE, serve_arguments
from forked_daemon import ForkedProcess
from small_disks import small_tmpfs
from waiting import WAIT_S

from sage_fed.auth import digest_of, new_token
from sage_fed.auth.tokens_file import read_register
from sage_fed.cards.rate_card import BUNDLED_CARDS, RateCard
from sage_fed.cli.options import admin_token
from sage_fed.errors import ConfigError, MachineFault
from sage_fed.ledger import AccountTerms, Ledger, backup
from sage_fed.settings import load_settings
from sage_fed.trusted_files import (
    make_directory,
    open_trusted,
    os_error,
    owners_beside,
    replace_file,
    require_trusted_directory,
)

MALLORY = 54321
"""A user of this machine who is nobody of ours."""

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "file"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o400])
def test_what_nobody_else_may_write_is_trusted(place: Path, mode: int) -> None:
    """Who may read it is another matter."""
    place.write_text("ours")
    place.chmod(mode)
    with open_trusted("it", place) as file:
        assert b"ours" == file.read()


@pytest.mark.parametrize(("mode", "warned"), [(0o755, False), (0o1777, False), (0o777, True)])
def test_a_file_that_anyone_may_replace_is_warned_of(
    place: Path, mode: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Its directory decides; where only owners may rename, as in /tmp, it is safe."""
    place.write_text("ours")
    place.parent.chmod(mode)
    with open_trusted("it", place):
        pass
    assert warned == (
        f"it: anyone may write {place.parent}, and so put another file" in caplog.text
    )


@pytest.mark.parametrize("mode", [0o602, 0o666, 0o777])
def test_what_anyone_may_write_is_not(place: Path, mode: int) -> None:
    """The error names the path, its mode and the command that mends it."""
    place.write_text("anybody's")
    place.chmod(mode)
    with pytest.raises(ConfigError, match=rf"^it {place}: anyone may write it \(mode {mode:04o}\)"):
        open_trusted("it", place)


@as_root
def test_what_belongs_to_another_user_is_not(place: Path) -> None:
    """Who owns a file may write it whatever its mode says; so may who owns a directory."""
    place.write_text("mallory's")
    os.chown(place, MALLORY, 0)
    with pytest.raises(ConfigError, match=f"^it {place}: it belongs to user {MALLORY}"):
        open_trusted("it", place)
    os.chown(place.parent, MALLORY, 0)
    with pytest.raises(ConfigError, match=f"state_dir {place.parent}: it belongs to user"):
        require_trusted_directory("state_dir", place.parent)
    assert MALLORY in owners_beside(place), "root looks after the service of another user"


@as_root
def test_a_group_may_write_where_nobody_else_is_in_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the group of a user's own that many systems give to every new file."""
    place.write_text("ours")
    place.chmod(0o660)
    open_trusted("it", place).close()
    root = grp.getgrgid(0)
    crowded = grp.struct_group(("root", "x", 0, ["root", "mallory"]))
    monkeypatch.setattr(grp, "getgrgid", lambda _: crowded)
    with pytest.raises(ConfigError, match="its group may write it"):
        open_trusted("it", place)
    monkeypatch.setattr(grp, "getgrgid", lambda _: root)
    everybody = [*pwd.getpwall(), pwd.struct_passwd(("mallory", "x", MALLORY, 0, "", "/", ""))]
    monkeypatch.setattr(pwd, "getpwall", lambda: everybody)
    with pytest.raises(ConfigError, match="its group may write it"):
        open_trusted("it", place)
    os.chown(place, 0, MALLORY)
    with pytest.raises(ConfigError, match="its group may write it"):
        open_trusted("it", place)


@as_root
def test_another_users_terminal_is_not(tmp_path: Path) -> None:
    """Who owns a device says what is read there; /dev/null says nothing, whoever writes it."""
    ours, theirs = os.openpty()
    try:
        place = Path(os.ttyname(theirs))
        os.fchmod(theirs, 0o600)
        os.chown(place, MALLORY, 0)
        link = tmp_path / "tokens.toml"
        link.symlink_to(place)
        with pytest.raises(ConfigError, match=f"it belongs to user {MALLORY}"):
            open_trusted("it", link)
    finally:
        os.close(ours)
        os.close(theirs)
    with open_trusted("it", Path("/dev/null")) as file:
        assert b"" == file.read()


@as_root
def test_what_a_list_lets_others_write_is_not(place: Path) -> None:
    """`setfacl -m u:mallory:rw`: the mode alone looks like that of a file of root's group."""
    place.write_text("mallory's")
    read_write, read = 6, 4
    entries = [
        (0x01, read_write, 2**32 - 1),
        (0x02, read_write, MALLORY),
        (0x04, read, 2**32 - 1),
        (0x10, read_write, 2**32 - 1),
        (0x20, 0, 2**32 - 1),
    ]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(place, "system.posix_acl_access", packed)
    except OSError as error:
        pytest.skip(f"a file system without lists: {error.strerror}")
    assert 0o660 == stat.S_IMODE(place.stat().st_mode)
    with pytest.raises(ConfigError, match="access control list"):
        open_trusted("it", place)


@as_root
def test_a_group_of_another_name_may_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `domain users`: a directory service need not tell who is in it."""
    place.write_text("ours")
    place.chmod(0o660)
    os.chown(place, 0, MALLORY)
    monkeypatch.setattr(os, "getegid", lambda: MALLORY)
    for name, trusted in (("domain users", False), ("root", True)):
        group = grp.struct_group((name, "x", MALLORY, []))
        monkeypatch.setattr(grp, "getgrgid", lambda _, group=group: group)
        if trusted:
            open_trusted("it", place).close()
            continue
        with pytest.raises(ConfigError, match="its group may write it"):
            open_trusted("it", place)


def test_a_pipe_keeps_no_start_waiting(place: Path) -> None:
    """Nobody writes it; opened in the plain way, it would be waited for."""
    os.mkfifo(place, 0o600)
    with open_trusted("it", place) as file:
        assert b"" == file.read()


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, MachineFault), (errno.EDQUOT, MachineFault), (errno.EROFS, MachineFault),
        (errno.EIO, MachineFault), (errno.EMFILE, MachineFault), (errno.ENOMEM, MachineFault),
        (errno.EACCES, ConfigError), (errno.ENOTDIR, ConfigError), (errno.ELOOP, ConfigError),
    ],
)  # fmt: skip
def test_a_machine_without_room_is_no_setting(number: int, kind: type[Exception]) -> None:
    """What may pass is worth another start; a wrong path is not."""
    assert kind is type(os_error("it", OSError(number, os.strerror(number))))


def test_a_link_that_is_planted_again_meanwhile_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the removal of what stood there and the making of the file: a race that loses."""
    treasure, place = tmp_path / "treasure", tmp_path / "file"
    treasure.write_text("treasure")
    unlink = Path.unlink

    def race(path: Path, *, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        path.symlink_to(treasure)

    monkeypatch.setattr(Path, "unlink", race)
    with pytest.raises(FileExistsError):
        replace_file(place, "secret")
    assert "treasure" == treasure.read_text()
    assert not place.exists()


@pytest.mark.parametrize("name", ["file", ".file.new"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    """Planted at the file's name or where it is made: replaced; what it leads to is untouched."""
    treasure, place = tmp_path / "treasure", tmp_path / "file"
    treasure.write_text("treasure")
    (tmp_path / name).symlink_to(treasure)
    replace_file(place, "ours")
    assert ("ours", "treasure") == (place.read_text(), treasure.read_text())
    assert not place.is_symlink()
    assert 0o600 == stat.S_IMODE(place.stat().st_mode)
    assert {place, treasure} == set(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    """A disk that fills up in the middle leaves the old one, and no half beside it."""
    with small_tmpfs(tmp_path / "disk", "64k") as disk:
        place = disk.path / "file"
        replace_file(place, "old")
        with pytest.raises(OSError, match="No space left"):
            replace_file(place, b"x" * 2**20)
        assert "old" == place.read_text()
        assert [place] == list(disk.path.iterdir())


def test_a_private_directory_is_made_and_a_public_one_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And where others may move it away, the log says so: that is not for a daemon to decide."""
    make_directory("state_dir", tmp_path / "one" / "two")
    assert 0o700 == stat.S_IMODE((tmp_path / "one" / "two").stat().st_mode)
    assert "" == caplog.text
    (tmp_path / "one").chmod(0o777)
    make_directory("state_dir", tmp_path / "one" / "two")
    assert f"anyone may write {tmp_path / 'one'}" in caplog.text
    with pytest.raises(ConfigError, match="look at what they may have put there"):
        make_directory("state_dir", tmp_path / "one")


# Every path that is read with trust, one that somebody else may change


def tokens(place: Path) -> None:
    read_register(place, {})


def config(place: Path) -> None:
    load_settings({"profile": "demo"}, {"HOME": "/"}, place)


def card(place: Path) -> None:
    named = place.with_name("mine.toml")
    place.rename(named)
    named.write_text(
        (BUNDLED_CARDS / "thor-fp16-2025-11-05.toml")
        .read_text()
        .replace('"thor-fp16-2025-11-05"', '"mine"')
    )
    RateCard.load("mine", named.parent)


def operator(place: Path) -> None:
    admin_token(place.rename(place.with_name("admin.token")).parent)


@pytest.mark.parametrize("read", [tokens, config, card, operator])
def test_what_is_believed_is_ours(place: Path, read: Callable[[Path], None]) -> None:
    """Tokens, settings, prices, and the token that the command line shows."""
    place.write_text("")
    place.chmod(0o666)
    with pytest.raises(ConfigError, match="anyone may write it"):
        read(place)


@pytest.mark.parametrize("suffix", ["", "-wal", ".lock"])
async def test_books_that_others_may_write_are_not_opened(tmp_path: Path, suffix: str) -> None:
    """Whoever can change them has any balance."""
    path = tmp_path / "ledger.db"
    ledger = await Ledger(path).open()
    await ledger.ensure_account("ann", AccountTerms(10, initial_uatp=10))
    await ledger.close()
    file = path.with_name(path.name + suffix)
    file.touch()
    file.chmod(0o666)
    with pytest.raises(ConfigError, match=rf"{file.name}: anyone may write it"):
        await Ledger(path).open()


async def test_no_lock_is_made_through_a_link(tmp_path: Path) -> None:
    """The lock is written, and kept open, for as long as the daemon lives."""
    treasure = tmp_path / "treasure"
    treasure.write_text("")
    (tmp_path / "ledger.db.lock").symlink_to(treasure)
    with pytest.raises(ConfigError, match=rf"ledger.db.lock: .* link to {treasure}, which"):
        await Ledger(tmp_path / "ledger.db").open()
    assert "" == treasure.read_text()
    assert not (tmp_path / "ledger.db").exists()


@pytest.mark.parametrize("there", [True, False])
async def test_books_behind_a_link_are_not_opened(tmp_path: Path, there: bool) -> None:
    """Wherever it leads; the link is named, and no lock is left that tells of books."""
    treasure, path = tmp_path / "treasure", tmp_path / "ledger.db"
    if there:
        ledger = await Ledger(treasure).open()
        await ledger.close()
    path.symlink_to(treasure)
    with pytest.raises(ConfigError, match=rf"ledger.db: it is a symbolic link to {treasure}"):
        await Ledger(path).open()
    assert not path.with_name("ledger.db.lock").exists()


@as_root
@pytest.mark.parametrize("name", ["ledger.db", "ledger.db.lock"])
async def test_a_strangers_books_are_named(tmp_path: Path, name: str) -> None:
    """The file that is theirs, and whose it is; nothing is made beside it."""
    (tmp_path / name).write_text("mallory's")
    os.chown(tmp_path / name, MALLORY, MALLORY)
    with pytest.raises(ConfigError, match=rf"{tmp_path / name}: it belongs to user {MALLORY}"):
        await Ledger(tmp_path / "ledger.db").open()
    assert [name] == [path.name for path in tmp_path.iterdir()]  # noqa: ASYNC240


async def test_a_backup_is_written_through_no_link(tmp_path: Path) -> None:
    """A directory for backups may be everybody's."""
    path, treasure = tmp_path / "ledger.db", tmp_path / "treasure"
    treasure.write_text("treasure")
    ledger = await Ledger(path).open()
    (tmp_path / "copy.db.new").symlink_to(treasure)
    backup(path, tmp_path / "copy.db")
    await ledger.close()
    assert "treasure" == treasure.read_text()


# A real daemon


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """Where a daemon is to have its state; its parents may be passed by anybody."""
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    opened = [above for above in state.parents if above.stat().st_mode & 0o005 != 0o005]
    modes = [stat.S_IMODE(above.stat().st_mode) for above in opened]
    for above, mode in zip(opened, modes, strict=True):
        above.chmod(mode | 0o055)
    yield state
    for above, mode in zip(opened, modes, strict=True):
        above.chmod(mode)


def as_mallory(script: str, *arguments: object) -> None:
    """Run a shell as another user of the machine."""
    subprocess.run(
        ["/bin/sh", "-euc", script, "mallory", *map(str, arguments)],
        check=True, user=MALLORY, group=MALLORY, extra_groups=(), cwd="/",
    )  # fmt: skip


def refused(state: Path, *more: str) -> str:
    """The log of a daemon that does not start, for a setting's sake."""
    log = state.parent / "daemon.log"
    process = ForkedProcess(serve_arguments(state, *more), log)
    assert 78 == process.wait(WAIT_S), log.read_text()
    said = log.read_text()
    assert not TROUBLE.search(said)
    return said


PLANT = r"""
cd "$1"
printf '[[token]]\nsha256 = "%s"\naccount = "mallory"\nrole = "admin"\n' "$2" > tokens.toml
for name in endpoint.json.new .endpoint.json.new admin.token .admin.token.new; do
    ln -s "$3" $name
done
"""


@as_root
def test_a_planted_tokens_file_makes_nobody_an_admin(state: Path) -> None:
    """Neither while the directory is open, nor when it was closed with the file in it."""
    treasure = state.parent / "treasure"
    treasure.write_text("root's own")
    state.chmod(0o777)
    as_mallory(PLANT, state, digest_of(new_token()).hex(), treasure)
    assert "anyone may write it (mode 0777)" in refused(state)
    state.chmod(0o700)
    assert f"tokens.toml: it belongs to user {MALLORY}" in refused(state)
    assert "root's own" == treasure.read_text()
    assert not (state / "ledger.db").exists()


def test_a_directory_of_cards_that_others_may_write_is_refused(state: Path) -> None:
    """Whoever can add a card says what everything costs; whether it is read at once or later."""
    cards = state.parent / "cards"
    cards.mkdir()
    cards.chmod(0o777)
    assert f"cards_dir {cards}: anyone may write it" in refused(
        state, "--set", f"cards_dir={cards}"
    )
    if os.geteuid() == 0:
        cards.chmod(0o755)
        os.chown(cards, MALLORY, MALLORY)
        said = refused(state, "--set", f"cards_dir={cards}", "--set", "rate_card=auto")
        assert f"cards_dir {cards}: it belongs to user {MALLORY}" in said


@as_root
def test_a_key_that_others_may_write_serves_nobody(state: Path) -> None:
    """Nor does an authority that others may write let anybody in."""
    files = issue(state.parent / "tls", authority(), "127.0.0.1")
    files.key.chmod(0o666)
    assert "tls.key" in refused(state, *files.flags())
    files.key.chmod(0o600)
    os.chown(files.ca, MALLORY, MALLORY)
    said = refused(state, *files.flags(), "--set", f"tls.client_ca={files.ca}")
    assert f"ca.crt: it belongs to user {MALLORY}" in said
