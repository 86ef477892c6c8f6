"""Every error mullama raises on purpose, with its HTTP status and its OpenAI error object.

The web layer turns any :class:`MullamaError` into ``{"error": {"message", "type", "param", "code"}}``;
the CLI prints ``str(error)`` as one line. Nothing else may reach a user as a traceback.

Each class spells its status, type and code out, also where another's are the same: read together they are the table of
what a client may be told.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class MullamaError(Exception):
    """Base of all errors that are reported to a user.

    ``param`` names the request field at fault (or ``None``), ``retry_after`` is in seconds.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    #: What a client is told instead, where the message is an operator's: it names files or quotes code of the server.
    for_clients: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def to_openai(self) -> dict[str, dict[str, str | None]]:
        """The error object as OpenAI's clients parse it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(MullamaError):
    """A field has a wrong type, range or value."""

    status = 400
    type = "invalid_request_error"


class NeedsAnotherEngine(InvalidRequest):
    """The new model differs so much that it needs slots of another shape: an engine of its own takes over."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt does not fit the context one request may use.

    ``n_tokens``: how many it has, or at least has; None where that was not counted.
    """

    code = "context_length_exceeded"

    def __init__(self, message: str, *, param: str | None = None, n_tokens: int | None = None) -> None:
        super().__init__(message, param=param)
        self.n_tokens = n_tokens

    def about(self, param: str, name: str) -> ContextLengthExceeded:
        """The same in the words of a request that has no ``prompt``: the field, and what it is called."""
        if self.param == param:
            return self
        words = self.message.replace("the prompt", name)
        return ContextLengthExceeded(f"{param}: {words}", param=param, n_tokens=self.n_tokens)


class AuthenticationError(MullamaError):
    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class PermissionDenied(MullamaError):
    """A host that is not allowed, or a write without the admin key."""

    status = 403
    type = "permission_error"


class NotFound(MullamaError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class ModelNotLoaded(MullamaError):
    """The model is served, but not in memory now."""

    status = 409
    type = "invalid_request_error"
    code = "model_not_loaded"


class ModelBusy(MullamaError):
    """The model cannot be loaded or unloaded because of what runs or is pinned."""

    status = 409
    type = "invalid_request_error"
    code = "model_busy"


def adapters_loaded(names: Iterable[str], *, param: str) -> ModelBusy:
    """What forbids that another engine takes over from one whose weights LoRA adapters lie on."""
    told = ", ".join(names)
    return ModelBusy(f"LoRA adapters are loaded ({told}): unload them before another model takes over", param=param)


class ResponseNotFound(NotFound):
    """No response of this id is stored for who asks."""

    code = "response_not_found"


class AdapterNotFound(NotFound):
    """No LoRA adapter of this id is loaded onto the model."""

    code = "adapter_not_found"


def no_adapter(name: str, loaded: Iterable[str]) -> str:
    """What is told of an adapter that is not there."""
    return f"no adapter '{name[:80]}' is loaded; loaded adapters: {', '.join(loaded) or 'none'}"


class AdapterBusy(ModelBusy):
    """A request uses the LoRA adapter that is to be unloaded."""

    code = "adapter_busy"


class PayloadTooLarge(MullamaError):
    status = 413
    type = "invalid_request_error"
    code = "request_too_large"


class UnsupportedMediaType(MullamaError):
    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"


class RateLimited(MullamaError):
    """A key has used what it may, or has as many requests as it may; ``retry_after`` says when to come back."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class QueueFull(MullamaError):
    """The admission queue is at its limit; ``retry_after`` says when to come back."""

    status = 503
    type = "overloaded_error"
    code = "queue_full"


class ShuttingDown(MullamaError):
    status = 503
    type = "overloaded_error"
    code = "shutting_down"


class ClientLeft(MullamaError):
    """Nobody is there any more to be answered."""

    status = 499
    code = "client_left"


class EngineDead(MullamaError):
    """The engine thread stopped; the log has the reason. The next request loads the model anew."""

    status = 503
    type = "server_error"
    code = "engine_dead"


class ComputeFailed(MullamaError):
    """llama.cpp could not compute this request (for example logits that are not finite)."""

    status = 500
    code = "compute_failed"


class ModelLoadError(MullamaError):
    """A model file is missing, damaged, or does not fit."""

    status = 500
    code = "model_load_failed"
    for_clients: ClassVar[str | None] = "the model could not be loaded; the server's log says why"


class BadModelFile(ModelLoadError):
    """A client named a file that cannot be loaded; what runs goes on without it."""

    status = 400
    type = "invalid_request_error"


class AdapterMismatch(BadModelFile):
    """A LoRA adapter is of another model than the one that it is to be loaded onto."""

    code = "adapter_mismatch"


class AdapterLost(ModelLoadError):
    """The file of a LoRA adapter has gone or changed, and the adapter is to be loaded again."""

    status = 409
    type = "invalid_request_error"
    code = "adapter_lost"


class MemoryTooSmall(ModelLoadError):
    """There is not enough memory, or the budget leaves too little; nothing was allocated.

    ``missing``: bytes that are too few; 0 where that was not counted.
    """

    status = 409
    type = "invalid_request_error"
    code = "memory_too_small"
    for_clients: ClassVar[str | None] = None  # sizes and the model's name

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: int | None = None, missing: int = 0
    ) -> None:
        super().__init__(message, param=param, retry_after=retry_after)
        self.missing = missing


class LoadCancelled(ModelLoadError):
    code = "model_load_cancelled"


class ReferenceNotFound(ModelLoadError):
    """A model reference names nothing that can be found."""

    status = 404
    code = "model_not_found"


class MachineUnfit(MullamaError):
    """This machine or this installation cannot run mullama as it is: a library or an instruction is missing, …

    ``faults``: a line each, which says what to do as well. ``message`` is all of them.
    """

    status = 503
    code = "machine_unfit"

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class StoreError(MullamaError):
    """The model store could not keep its promises: disk full, wrong checksum, interrupted download."""

    code = "store_error"
    for_clients = "the model's files could not be had; the server's log says why"


class FilesError(MullamaError):
    """An uploaded file, or what a batch writes, cannot be kept or read."""

    code = "files_error"
    for_clients: ClassVar[str | None] = "files cannot be kept just now; the server's log says why"


class FilesFull(FilesError):
    """The disk, or what files may take of it, is full; nothing that was there is lost."""

    status = 507
    code = "disk_full"
    for_clients = None


class DiskFull(StoreError):
    """The disk, or what this user may have of it, is full; nothing that was there is lost."""

    status = 507
    code = "disk_full"


class PrivateAddress(StoreError):
    """A source at an address that is not public, or over plain HTTP, and no leave to use such."""

    status = 403


class PullCancelled(StoreError):
    """Nobody waits for a pull any more; what it has stays for the next attempt."""

    code = "pull_cancelled"


class ConfigError(MullamaError):
    """A flag, an environment variable or a line of the TOML file is wrong."""

    status = 400
    type = "invalid_request_error"
    code = "bad_config"


class PluginError(MullamaError):
    """A registered plugin could not be loaded or broke its contract."""

    code = "plugin_error"
    for_clients = "a plugin of the server failed; the server's log says why"
