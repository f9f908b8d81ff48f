"""The types of the settings' fields: text in, checked value out, with errors in plain words.

Owns how one value is read from a string of the environment or a value of a TOML file.
`conflict` is the error of a rule across several keys; it names them all.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from sage_fed.core import resolve_model
from sage_fed.settings.addresses import Address, UnixSocket, parse_listen
from sage_fed.settings.values import parse_account, parse_size, uatp_from_atp


class Section(BaseModel):
    """A frozen table of settings in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """The error of a rule across `keys`, each relative to the model that raises it."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": keys})


def _number(value: object) -> object:
    # Otherwise `true` would quietly count as 1.
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004 - pydantic collects ValueError only
    return value


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _address(value: object) -> object:
    if isinstance(value, Address):
        return value
    return Address.parse(value if isinstance(value, str) else "")


def _listen(value: object) -> object:
    if isinstance(value, (Address, UnixSocket)):
        return value
    return parse_listen(value if isinstance(value, str) else "")


def _amount(value: Decimal) -> Decimal:
    uatp_from_atp(value)
    return value


def _model(value: str) -> str:
    resolve_model(value)
    return value


def _revision(value: str) -> str:
    if re.fullmatch("[0-9a-f]{40}", value) is None:
        raise ValueError("expected a commit of the hub repository: 40 hexadecimal digits")
    return value


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value) is None:
        raise ValueError("expected cpu, auto or cuda:N, for example cuda:0")
    return "cuda:0" if value == "cuda" else value


def _account_or_nobody(value: str) -> str:
    return parse_account(value) if value else value


def _path(value: object) -> object:
    if value == "":
        raise ValueError("expected a path")
    return value


def _cache_place(value: str) -> str:
    if value not in {"auto", "off"} and not Path(value).expanduser().is_absolute():
        raise ValueError("expected auto, off or an absolute directory")
    return value


def _url(value: str) -> str:
    if re.fullmatch(r"https?://[^\s/]+(/\S*)?", value) is None:
        raise ValueError("expected a URL, for example http://127.0.0.1:4318/v1/traces")
    return value


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _empty_is_none(value: object) -> object:
    return None if value == "" else value


Whole = Annotated[int, BeforeValidator(_number)]
"""A whole number; its range is the field's."""

Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
"""A finite number, for durations in seconds and shares."""

Size = Annotated[int, BeforeValidator(_number), BeforeValidator(_size)]
"""Bytes, written `512MiB` or as a number."""

Amount = Annotated[Decimal, BeforeValidator(_number), AfterValidator(_amount)]
"""ATP, not negative and exact to one uATP."""

Endpoint = Annotated[Address, BeforeValidator(_address)]
"""`HOST:PORT`, or `[IPV6]:PORT`."""

ListenPoint = Annotated[Address | UnixSocket, BeforeValidator(_listen)]
"""The same, or `unix:/PATH`."""

UserPath = Annotated[Path, BeforeValidator(_path), AfterValidator(Path.expanduser)]
"""A path in which a leading `~` is the home directory."""

EmptyIsNone = BeforeValidator(_empty_is_none)
"""An empty text unsets an optional value: the environment has no other way to say it."""

ModelName = Annotated[str, AfterValidator(_model)]
Revision = Annotated[str, AfterValidator(_revision)]
Device = Annotated[str, AfterValidator(_device)]
CachePlace = Annotated[str, AfterValidator(_cache_place)]
Url = Annotated[str, AfterValidator(_url)]
AccountName = Annotated[str, AfterValidator(parse_account)]
AccountOrNobody = Annotated[str, AfterValidator(_account_or_nobody)]
Lowered = BeforeValidator(_lower)
