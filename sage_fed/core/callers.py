"""Who calls, and what they may do."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Role(enum.Enum):
    """What a caller may do: users spend their own budget, admins operate the daemon as well.

    A monitor reads the metrics, and nothing else.
    """

    USER = "user"
    ADMIN = "admin"
    MONITOR = "monitor"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is calling: the account that pays, and the role."""

    account: str
    role: Role
