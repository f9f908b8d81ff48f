"""The machine's service manager: what the daemon says to it, and how it is told to run the daemon.

Floor 1. `notify` is sd_notify(3), `plan` is what an installation consists of, `files` compares it
with a machine and carries it out, `units/` holds the unit and its drop-ins, which `deploy/systemd`
shows to whoever installs by hand.
Knows no other part: neither the daemon nor its settings.
"""

from sage_fed.systemd.files import Change, carry_out, place_for, to_install, to_uninstall
from sage_fed.systemd.notify import ServiceManager
from sage_fed.systemd.plan import (
    Action,
    Installation,
    Machine,
    PlannedFile,
    installation,
    unreachable,
)

__all__ = [
    "Action",
    "Change",
    "Installation",
    "Machine",
    "PlannedFile",
    "ServiceManager",
    "carry_out",
    "installation",
    "place_for",
    "to_install",
    "to_uninstall",
    "unreachable",
]
