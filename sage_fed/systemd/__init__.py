"""The machine's service manager: what the daemon says to it, and how it is told to run the daemon.

Floor 1. `notify` is sd_notify(3), `unit` is what an installation consists of, `units/` holds the
unit and its drop-ins, which `deploy/systemd` shows for an installation by hand.
Knows no other part: neither the daemon nor its settings.
"""
