"""The secrets that systemd hands to a unit, as files that only it may read.

Owns which credential is which setting. Fails with `ConfigError` on one that cannot be had.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sage_fed.settings.layers import Layer, Values, layer_of, put
from sage_fed.settings.problems import config_error, origin_of

CREDENTIALS = "CREDENTIALS_DIRECTORY"
"""Where systemd puts the files of LoadCredential; the paths below may start with it."""

_CREDENTIALS = {
    "tokens.toml": "auth.tokens_file",
    "tls.crt": "tls.certificate",
    "tls.key": "tls.key",
    "client-ca.crt": "tls.client_ca",
}
"""Names of the credentials that the unit asks for, and the keys that take their paths."""


def credentials_layer(environ: Mapping[str, str]) -> Layer:
    """The secrets that systemd hands to this unit alone, those of them that it was given."""
    values: Values = {}
    if directory := environ.get(CREDENTIALS):
        for name, key in _CREDENTIALS.items():
            path = Path(directory) / name
            try:
                given = path.is_file()
            except OSError as error:
                # Without its tokens the daemon would be open to more callers than it should.
                raise config_error(
                    f"{key} (environment {CREDENTIALS}): {path}: {error.strerror}"
                ) from None
            if given:
                put(values, key.split("."), path)
    return layer_of(values, f"environment {CREDENTIALS}")


def expand_credentials(
    merged: Values, origins: Mapping[str, str], environ: Mapping[str, str]
) -> None:
    """Replace a leading `$CREDENTIALS_DIRECTORY` in the paths of secrets; nowhere else."""
    for key in _CREDENTIALS.values():
        section, name = key.split(".")
        table: Any = merged.get(section)
        path = table.get(name) if isinstance(table, dict) else None
        if not isinstance(path, str):
            continue
        for written in (f"${CREDENTIALS}/", f"${{{CREDENTIALS}}}/"):
            if not path.startswith(written):
                continue
            if not environ.get(CREDENTIALS):
                raise config_error(
                    f"{key} ({origin_of(key, origins)}): ${CREDENTIALS} is not set; systemd sets "
                    "it for a unit with LoadCredential=, elsewhere give the whole path"
                )
            table[name] = f"{environ[CREDENTIALS]}/{path.removeprefix(written)}"
