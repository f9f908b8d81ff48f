"""The variables that begin with SAGE_FED_: which are a client's, and which are no settings.

Owns their names. Every other one is a key of the settings, which are read, and complained of, by
`settings`. Knows no key, and imports nothing that a command would have to wait for.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

ENV_PREFIX = "SAGE_FED_"

CLIENT_VARIABLES = frozenset(
    {
        "SAGE_FED_ADDRESS",
        "SAGE_FED_CONFIG",
        "SAGE_FED_TOKEN",
        "SAGE_FED_TOKEN_FILE",
        "SAGE_FED_TLS_CA",
        "SAGE_FED_TLS_CERT",
        "SAGE_FED_TLS_KEY",
        "SAGE_FED_TLS_NAME",
    }
)
"""Those that are no keys: where the configuration file is, and what a client uses."""

_ALIKE = 0.8
"""How near a mistyped name is to a client's, of 1; no key of the settings is as near to one."""

# A Service called sage-fed, or sage-fed-and-more, gives every pod of its namespace these, in the
# form that Docker's links once had.
_KUBERNETES = (
    (re.compile(r"SAGE_FED(_[A-Z0-9]+)*_SERVICE_HOST"), re.compile(r"[0-9A-Fa-f.:]+")),
    (re.compile(r"SAGE_FED(_[A-Z0-9]+)*_SERVICE_PORT(_[A-Z0-9]+)*"), re.compile(r"\d+")),
    (re.compile(r"SAGE_FED(_[A-Z0-9]+)*_PORT"), re.compile(r"(tcp|udp|sctp)://\S+")),
    (re.compile(r"SAGE_FED(_[A-Z0-9]+)*_PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?"), None),
)


def of_kubernetes(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the variables that Kubernetes sets for a Service, by their names and their form."""
    return tuple(
        sorted(
            name
            for name, value in environ.items()
            if name.startswith(ENV_PREFIX)
            and any(
                names.fullmatch(name) and (values is None or values.fullmatch(value))
                for names, values in _KUBERNETES
            )
        )
    )


def client_variable_like(name: str) -> str:
    """Return the client's variable that is meant by a name that is nearly it; "" for none."""
    known = {variable.removeprefix(ENV_PREFIX): variable for variable in CLIENT_VARIABLES}
    word = name.removeprefix(ENV_PREFIX)
    near = difflib.get_close_matches(word, known, n=1, cutoff=_ALIKE)
    return known[near[0]] if near else ""


def mistyped(environ: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return each name that is none of a client's but nearly one, and the one that it is like."""
    others = (
        name for name in environ if name.startswith(ENV_PREFIX) and name not in CLIENT_VARIABLES
    )
    return tuple((name, like) for name in sorted(others) if (like := client_variable_like(name)))
