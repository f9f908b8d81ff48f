"""Files that are read or written with trust: who may change them, and how they are replaced.

Owns the one rule of whose paths are trusted: they belong to this process's user or to root, and no
other user may write them. A group may where no other user is in it, as the group of a user's own
that many systems give to every new file; never where an access control list allows others.
Owns also what an error of the kernel means to a start: a path
that is wrong is a setting (`ConfigError`), a machine that has no room or no working disk is not
(`MachineFault`), and may pass.
Knows no setting: callers say what a path is.
"""

from __future__ import annotations

import contextlib
import errno
import grp
import logging
import os
import pwd
import stat
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from sage_fed.errors import ConfigError, MachineFault

_WRONG_PATH = frozenset(
    {
        errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
        errno.ENODEV, errno.ENOENT, errno.ENOTDIR, errno.ENXIO, errno.EPERM,
    }
)  # fmt: skip
"""What another path, another owner or another mode would mend."""

_NOTHING = os.makedev(1, 3)
"""`/dev/null`: what is written there is not what is read."""

_log = logging.getLogger(__name__)


def os_error(what: str, error: OSError) -> ConfigError | MachineFault:
    """Return the error to raise for what the kernel said while `what` was done."""
    kind = ConfigError if error.errno in _WRONG_PATH else MachineFault
    return kind(f"{what}: {error.strerror or error}")


def owners_beside(path: Path) -> frozenset[int]:
    """Return whose files a command may trust there: its user's and root's.

    Root, who looks after a service, also trusts the service's own in the service's directory.
    """
    trusted = {os.geteuid(), 0}
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):  # opening the path says why
            trusted.add(path.parent.stat().st_uid)
    return frozenset(trusted)


def require_trusted(
    what: str,
    path: Path,
    status: os.stat_result,
    owners: Collection[int] | None = None,
    *,
    opened: int | None = None,
) -> None:
    """Refuse a file or directory that another user may change.

    Args:
        what: the setting that it is, as the error begins.
        path: as the error names it.
        status: of what was opened, so that it is not exchanged meanwhile.
        owners: whose it may be; None is this process's user's or root's.
        opened: its descriptor, where it was opened.

    Raises:
        ConfigError: it is not to be trusted; says why and what to do.
    """
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == _NOTHING:
        return
    if owners is None:
        owners = (os.geteuid(), 0)
    if status.st_uid not in owners:
        raise ConfigError(
            f"{what} {path}: it belongs to {_user(status.st_uid)}, who can change it, and has to "
            f"belong to {_user(os.geteuid())}{' or root' * bool(os.geteuid())}"
        )
    others = bool(status.st_mode & stat.S_IWOTH)
    if others or (status.st_mode & stat.S_IWGRP and not _own_group(status)):
        look = "look at what they may have put there, then " * stat.S_ISDIR(status.st_mode)
        raise ConfigError(
            f"{what} {path}: {'anyone' if others else 'its group'} may write it "
            f"(mode {stat.S_IMODE(status.st_mode):04o}); {look}chmod go-w {path}"
        )
    # With a list the group's bits are its mask: they are set where it lets anybody write.
    if status.st_mode & stat.S_IWGRP and _has_list(path if opened is None else opened):
        raise ConfigError(
            f"{what} {path}: its access control list may let others write it (see getfacl); "
            f"setfacl -b {path} takes it away"
        )


def refuse_link(what: str, path: Path) -> None:
    """Refuse a symbolic link where a file of ours is to be, or to be made.

    Raises:
        ConfigError: it is one; names it and where it leads.
    """
    if path.is_symlink():
        raise ConfigError(
            f"{what} {path}: it is a symbolic link to {path.readlink()}, which is not followed; "
            "put the file itself there"
        )


def require_trusted_directory(what: str, directory: Path) -> None:
    """Refuse a directory that another user may change; one that is not there yet passes.

    Raises:
        ConfigError: it is not to be trusted, or is no directory.
        MachineFault: the kernel cannot say now.
    """
    try:
        # Links are followed: systemd makes a dynamic user's state directory one.
        status = directory.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise os_error(f"{what} {directory}", error) from None
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{what} {directory}: it is no directory")
    require_trusted(what, directory, status)


def make_directory(what: str, directory: Path) -> None:
    """Make a directory that is private (0700), or refuse what is there, as above.

    Says in the log where others may move it away: what is above it is not ours to judge.

    Raises:
        ConfigError: it cannot be made, or is not to be trusted.
        MachineFault: the disk takes no directory now.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise os_error(f"{what}: cannot create {directory}", error) from None
    require_trusted_directory(what, directory)
    _warn_of_open_parents(what, directory)


def _warn_of_open_parents(what: str, path: Path) -> None:
    """Log each directory above `path` in which anyone may put another thing in its place.

    Not refused: a read-only mount, as of a container's configuration, may have such a mode.
    """
    for above in path.resolve().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            _log.warning(
                "%s: anyone may write %s, and so put another %s in the place of %s",
                what, above, "directory" if path.is_dir() else "file", path,
            )  # fmt: skip


def open_trusted(what: str, path: Path, owners: Collection[int] | None = None) -> BinaryIO:
    """Open a file to read that no other user may change; see `require_trusted`.

    Raises:
        OSError: it cannot be opened.
        ConfigError: it is not to be trusted.
    """
    # Not blocking: a pipe without a writer would keep a start waiting for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    try:
        require_trusted(what, path, os.fstat(descriptor), owners, opened=descriptor)
        _warn_of_open_parents(what, path)
        os.set_blocking(descriptor, True)
    except BaseException:
        file.close()
        raise
    return file


def read_trusted(what: str, path: Path, owners: Collection[int] | None = None) -> bytes:
    """Return what `open_trusted` opens; fails as it does."""
    with open_trusted(what, path, owners) as file:
        return file.read()


def replace_file(
    path: Path, content: str | bytes, *, mode: int = 0o600, owner: tuple[int, int] | None = None
) -> None:
    """Write a file whole or not at all, and durably: beside its name, then renamed.

    It is private from its first byte, and what stands at either name, a link too, is replaced and
    never written into.

    Args:
        path: where it is to be.
        content: all of it.
        mode: of the file, once it is written.
        owner: user and group, where root writes it for another user.

    Raises:
        OSError: nothing has changed.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(fresh, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if owner is not None:
                os.fchown(descriptor, *owner)
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def create_file(path: Path, text: str) -> bool:
    """Create a private file with its whole text, durably; False where there is one already.

    Raises:
        OSError: there is no new file.
    """
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.stem[:32]}-"
    ) as fresh:
        fresh.write(text)
        fresh.flush()
        os.fsync(fresh.fileno())
        try:
            # A link, not a rename: that would replace what another process just wrote.
            os.link(fresh.name, path)
        except FileExistsError:
            return False
    return True


def make_folder_of(folder: Path, above: Path) -> None:
    """Make a private folder, and what is missing above it, for whose `above` is.

    Raises:
        ConfigError: it cannot be made.
        MachineFault: the disk takes no directory now.
    """
    try:
        for part in (*reversed(folder.parents), folder):
            if not part.exists():
                part.mkdir(mode=0o700)
                if above.is_dir():
                    give_to_owner_of(above, part)
    except OSError as error:
        raise os_error(f"cannot create {folder}", error) from None


def give_to_owner_of(directory: Path, path: Path) -> None:
    """Give what root made in a service's directory to the service, which has to read it.

    Any other user keeps what it made. Fails with `OSError`.
    """
    if os.geteuid() == 0:
        owner = directory.stat()
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _has_list(file: Path | int) -> bool:
    try:
        os.getxattr(file, "system.posix_acl_access")
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _own_group(status: os.stat_result) -> bool:
    """Whether the file's group has no member but this process's user, and root.

    The group has to have the user's name, or be root's: who is in another one a directory service
    need not tell. Where neither has a name, as in a container, their numbers are the same.
    """
    if status.st_gid not in (os.getegid(), 0):
        return False
    try:
        me = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        me = ""
    try:
        group = grp.getgrgid(status.st_gid)
        name, members = group.gr_name, set(group.gr_mem)
    except KeyError:
        name, members = "", set()
    if status.st_gid and (name != me or (not name and status.st_gid != os.geteuid())):
        return False
    primary = {user.pw_name for user in pwd.getpwall() if user.pw_gid == status.st_gid}
    return not (members | primary) - {me, "root"}


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name} ({uid})" if uid else "root"
    except KeyError:
        return f"user {uid}"
