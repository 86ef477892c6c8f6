"""Where a LoRA adapter's file is: a path for the admin, or a reference that is pulled like a model's."""

from __future__ import annotations

from pathlib import Path

from mullama.errors import BadModelFile, InvalidRequest, ModelLoadError, PermissionDenied
from mullama.models.parse import parse_spec
from mullama.models.resolve import resolve_model
from mullama.models.store.store import Store


def find_adapter(path: str | None, reference: str | None, *, may_read_files: bool, store: Store | None = None) -> Path:
    """The file that one of the two stands for, fetched where it has to be. Blocks.

    A file of this machine takes ``may_read_files``. Raises InvalidRequest, PermissionDenied, ReferenceNotFound,
    StoreError, BadModelFile.
    """
    if (path is None) == (reference is None):
        raise InvalidRequest("path: give either the path of a file or a reference", param="path")
    if path is not None:
        _check_leave(may_read_files, "path")
        if not Path(path).is_absolute() or "\0" in path:
            raise InvalidRequest("path: it must be an absolute path of the server", param="path")
        return Path(path)
    assert reference is not None
    store = store or Store()
    if parse_spec(reference, store.lookup).reference.is_local:
        _check_leave(may_read_files, "reference")
    try:
        return resolve_model(reference, store=store).path
    except ModelLoadError as error:
        raise (BadModelFile(error.message, param="reference") if type(error) is ModelLoadError else error) from None


def _check_leave(may_read_files: bool, field: str) -> None:
    if not may_read_files:
        raise PermissionDenied(
            f"{field}: a file of the server can only be named when --admin-key is set; --lora names one at the start",
            param=field,
        )
