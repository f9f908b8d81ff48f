import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sage_fed.v1 import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EntryKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENTRY_KIND_UNSPECIFIED: _ClassVar[EntryKind]
    ENTRY_KIND_GRANT: _ClassVar[EntryKind]
    ENTRY_KIND_REFILL: _ClassVar[EntryKind]
    ENTRY_KIND_HOLD: _ClassVar[EntryKind]
    ENTRY_KIND_SETTLE: _ClassVar[EntryKind]
    ENTRY_KIND_RELEASE: _ClassVar[EntryKind]
    ENTRY_KIND_VOID: _ClassVar[EntryKind]
    ENTRY_KIND_EXPIRE: _ClassVar[EntryKind]
    ENTRY_KIND_REVOKE: _ClassVar[EntryKind]
ENTRY_KIND_UNSPECIFIED: EntryKind
ENTRY_KIND_GRANT: EntryKind
ENTRY_KIND_REFILL: EntryKind
ENTRY_KIND_HOLD: EntryKind
ENTRY_KIND_SETTLE: EntryKind
ENTRY_KIND_RELEASE: EntryKind
ENTRY_KIND_VOID: EntryKind
ENTRY_KIND_EXPIRE: EntryKind
ENTRY_KIND_REVOKE: EntryKind

class GetBudgetRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetBudgetResponse(_message.Message):
    __slots__ = ("budget", "rate_card")
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    RATE_CARD_FIELD_NUMBER: _ClassVar[int]
    budget: _types_pb2.Budget
    rate_card: str
    def __init__(self, budget: _Optional[_Union[_types_pb2.Budget, _Mapping]] = ..., rate_card: _Optional[str] = ...) -> None: ...

class ListEntriesRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListEntriesResponse(_message.Message):
    __slots__ = ("entries", "next_page_token", "days")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DAYS_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    next_page_token: str
    days: _containers.RepeatedCompositeFieldContainer[Day]
    def __init__(self, entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., days: _Optional[_Iterable[_Union[Day, _Mapping]]] = ...) -> None: ...

class Day(_message.Message):
    __slots__ = ("date", "entries", "minted_uatp", "spent_uatp", "settled_jobs", "voided_jobs", "expired_jobs")
    DATE_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MINTED_UATP_FIELD_NUMBER: _ClassVar[int]
    SPENT_UATP_FIELD_NUMBER: _ClassVar[int]
    SETTLED_JOBS_FIELD_NUMBER: _ClassVar[int]
    VOIDED_JOBS_FIELD_NUMBER: _ClassVar[int]
    EXPIRED_JOBS_FIELD_NUMBER: _ClassVar[int]
    date: str
    entries: int
    minted_uatp: int
    spent_uatp: int
    settled_jobs: int
    voided_jobs: int
    expired_jobs: int
    def __init__(self, date: _Optional[str] = ..., entries: _Optional[int] = ..., minted_uatp: _Optional[int] = ..., spent_uatp: _Optional[int] = ..., settled_jobs: _Optional[int] = ..., voided_jobs: _Optional[int] = ..., expired_jobs: _Optional[int] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("entry_id", "time", "kind", "job_id", "amount_uatp", "debit", "credit", "rate_card", "usage")
    ENTRY_ID_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_UATP_FIELD_NUMBER: _ClassVar[int]
    DEBIT_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    RATE_CARD_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    entry_id: int
    time: _timestamp_pb2.Timestamp
    kind: EntryKind
    job_id: str
    amount_uatp: int
    debit: str
    credit: str
    rate_card: str
    usage: _containers.RepeatedCompositeFieldContainer[_types_pb2.PhaseTokens]
    def __init__(self, entry_id: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[_Union[EntryKind, str]] = ..., job_id: _Optional[str] = ..., amount_uatp: _Optional[int] = ..., debit: _Optional[str] = ..., credit: _Optional[str] = ..., rate_card: _Optional[str] = ..., usage: _Optional[_Iterable[_Union[_types_pb2.PhaseTokens, _Mapping]]] = ...) -> None: ...
