"""The error tree: everything that the world, not our code, can get wrong.

Floor 0. Each class carries what its row of the error table needs (see `docs/architecture.md`);
`service` holds the one table from class to gRPC status. Texts are written for the client:
they name the field and say what to do next, and never carry internals, prompts or paths.
"""

from __future__ import annotations

import enum


class SageFedError(Exception):
    """Root of the tree. `reason` is a stable UPPER_SNAKE code for programs."""

    reason = "ERROR"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InvalidField(SageFedError):
    """A malformed or out-of-range field of a request."""

    reason = "INVALID_FIELD"

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.description = message


class Unauthenticated(SageFedError):
    """No token, or an unknown one."""

    reason = "UNAUTHENTICATED"


class Forbidden(SageFedError):
    """A known account that may not do this."""

    reason = "FORBIDDEN"


class NoSuchAccount(SageFedError):
    """An account without a budget."""

    reason = "NO_SUCH_ACCOUNT"


class NotFound(SageFedError):
    """A named thing that does not exist."""

    reason = "NOT_FOUND"


class Retryable(SageFedError):
    """An error that passes; `retry_after_s` None means that waiting does not help."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CannotAfford(Retryable):
    """The balance, the strategic floor or max_cost does not cover the worst case."""

    reason = "CANNOT_AFFORD"

    def __init__(
        self, message: str, *, account: str, detail: str, retry_after_s: float | None
    ) -> None:
        super().__init__(message, retry_after_s)
        self.account = account
        self.detail = detail


class QueueFull(Retryable):
    """The tier's bounded inbox has no place."""

    reason = "QUEUE_FULL"

    @classmethod
    def of_tier(cls, tier: str, waiting: int, retry_after_s: float | None = None) -> QueueFull:
        """Say it of a tier, in the same words wherever it is noticed."""
        wait = "1 job waits" if waiting == 1 else f"{waiting:,} jobs wait"
        message = f"{wait} for the {tier} tier, which is its limit; ask again soon"
        return cls(message, retry_after_s)


class RateLimited(Retryable):
    """An account that calls more often, or runs more jobs at once, than it may.

    `limit` is the setting that says so, `allowed` its value.
    """

    reason = "RATE_LIMITED"

    def __init__(
        self, message: str, *, account: str, limit: str, allowed: int, retry_after_s: float | None
    ) -> None:
        super().__init__(message, retry_after_s)
        self.account = account
        self.limit = limit
        self.allowed = allowed


class TierUnavailable(Retryable):
    """Draining, or the tier is loading or down."""

    reason = "TIER_UNAVAILABLE"


class DeviceBusy(Retryable):
    """A measurement found no idle moment on the device: live jobs go first."""

    reason = "DEVICE_BUSY"


class CalibrationRunning(SageFedError):
    """A calibration runs already; two would measure each other."""

    reason = "CALIBRATION_RUNNING"


class DeadlineInfeasible(SageFedError):
    """The worst case takes longer than the deadline; nothing was held."""

    reason = "DEADLINE_INFEASIBLE"

    def __init__(self, message: str, *, estimate_s: float) -> None:
        super().__init__(message)
        self.estimate_s = estimate_s


class RequestIdConflict(SageFedError):
    """The client request id was used with another payload, or its job still runs."""

    reason = "REQUEST_ID_CONFLICT"


class HoldClosed(SageFedError):
    """A hold that ended another way; `how` is settled, voided or expired. Nothing was moved."""

    reason = "HOLD_CLOSED"

    def __init__(self, message: str, *, how: str) -> None:
        super().__init__(message)
        self.how = how


class LedgerDown(Retryable):
    """The ledger is closed, died on a failed commit, or did not answer in time."""

    reason = "LEDGER_DOWN"


class LedgerBlocked(LedgerDown):
    """The ledger's disk takes nothing now, full or read-only; it goes on when it does again."""

    reason = "LEDGER_BLOCKED"


class DeviceOutOfMemory(SageFedError):
    """The device had no memory for this job; the daemon goes on."""

    reason = "DEVICE_OUT_OF_MEMORY"


class NotFinite(SageFedError):
    """The model's numbers broke down (NaN or infinite) for this job; the daemon goes on."""

    reason = "NOT_FINITE"


class DeviceLost(SageFedError):
    """The device answers this process no more; only a new process can use it again."""

    reason = "DEVICE_LOST"


class CallEnded(SageFedError):
    """A call that was ended because its peer did not do its part, or an operator wished it.

    `why` is receive, write, pressure, unread or operator.
    """

    reason = "CALL_ENDED"

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


class NotOneRequest(SageFedError):
    """A client that sent none or several requests to a method that takes one."""

    reason = "NOT_ONE_REQUEST"


class Internal(SageFedError):
    """Our bug: the client gets an id, the log gets the story."""

    reason = "INTERNAL"

    def __init__(self, error_id: str) -> None:
        super().__init__(f"internal error {error_id}; the daemon's log has the details")
        self.error_id = error_id


class ConfigError(SageFedError):
    """A setting that cannot work; the text names it. The daemon does not start."""

    reason = "CONFIG"


class Occupied(ConfigError):
    """What a setting names is another process's: a port, a ledger. That may pass."""

    reason = "OCCUPIED"


class MachineFault(SageFedError):
    """What the machine did not give: space, an inode, a disk that may be written. That may pass."""

    reason = "MACHINE_FAULT"


class ModelLoadError(SageFedError):
    """A checkpoint that cannot be served; the text names what and why."""

    reason = "MODEL_LOAD"


class LedgerCorrupt(SageFedError):
    """The books do not balance; the daemon does not start on them."""

    reason = "LEDGER_CORRUPT"


class LedgerUnusable(SageFedError):
    """The ledger's files cannot be used: no space, no permission, or lost while they were open."""

    reason = "LEDGER_UNUSABLE"


class CannotWrite(SageFedError):
    """Command line: files cannot be put where they were asked for; nothing was changed."""

    reason = "CANNOT_WRITE"


class NoConnection(enum.Enum):
    """Why there is no connection, as far as the client's end of it can tell."""

    REFUSED = "refused"
    """No process listens there."""
    HUNG_UP = "hung_up"
    """Closed before a word was said; who has TLS does so to plain text."""
    PLAIN_TEXT = "plain_text"
    """TLS was spoken to who has none."""
    UNTRUSTED = "untrusted"
    """Its certificate is not signed by whom this client trusts, or no longer good."""
    OTHER_NAME = "other_name"
    """Its certificate is another name's."""
    CERTIFICATE_WANTED = "certificate_wanted"
    """It hung up on a TLS client that showed no certificate."""
    CERTIFICATE_REFUSED = "certificate_refused"
    """It hung up on a TLS client that showed one."""
    UNKNOWN = "unknown"


class CannotConnect(SageFedError):
    """Client side: no daemon answers at the address, or the connection broke; `cause` is why."""

    reason = "CANNOT_CONNECT"

    def __init__(
        self,
        address: str,
        message: str | None = None,
        *,
        cause: NoConnection = NoConnection.UNKNOWN,
    ) -> None:
        super().__init__(message or f"cannot connect to {address}")
        self.address = address
        self.cause = cause


class CallFailed(SageFedError):
    """Client side: a gRPC status that is none of the above; `status` is its name."""

    reason = "CALL_FAILED"

    def __init__(self, message: str, *, status: str) -> None:
        super().__init__(message)
        self.status = status
