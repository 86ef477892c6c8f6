"""Whether a server can start with a configuration: what ``mullama doctor`` tells, and ``mullama serve`` asks first.

    require(config)    # returns, or raises MachineUnfit with a line for each fault

Both see the same faults in the same words. Nothing is loaded or fetched for it but mullama's own libraries.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mullama.config import DEFAULT_MODEL, ServeConfig
from mullama.errors import ConfigError, MachineUnfit, MullamaError
from mullama.home import NOWHERE, default_root, expand, need_home
from mullama.installation import instructions, libraries
from mullama.machine.folders import Folder, look, page_folder
from mullama.machine.report import machine_report
from mullama.models.store.store import Store


@dataclass(slots=True)
class Findings:
    """``faults`` keep a server from starting, ``notes`` do not. Each is a line that says what to do as well."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look_around(config: ServeConfig) -> tuple[Findings, dict[str, Any]]:
    """What was found, and the whole report with it."""
    folders = folders_of(config)
    found = examine(config, folders)
    report = machine_report(config.threads, folders)
    return found, {**report, "faults": found.faults, "notes": found.notes}


def require(config: ServeConfig) -> Findings:
    """Raise MachineUnfit unless a server can start with this configuration; the notes are the caller's to tell."""
    found = examine(config, folders_of(config))
    if found.faults:
        raise MachineUnfit(found.faults)
    return found


def folders_of(config: ServeConfig) -> dict[str, Folder]:
    """The folders that a server writes to, each tried."""
    folders = {"store": look(default_root()), "pages": page_folder(config.page_dir)}
    if config.kv_disk_dir:
        folders["kv_disk"] = look(expand(config.kv_disk_dir))
    return folders


def examine(config: ServeConfig, folders: dict[str, Folder]) -> Findings:
    """Everything that can be known before a model is loaded."""
    found = Findings()
    try:
        instructions.check()
        libraries.check()
    except MachineUnfit as error:
        found.faults += error.faults
    folder_findings(config, folders, found)
    for text in config.model or [DEFAULT_MODEL]:
        _model(text, config, folders["store"], found)
    return found


def folder_findings(config: ServeConfig, folders: dict[str, Folder], found: Findings) -> None:
    """Note what cannot be written to, as faults where that keeps a server from starting."""
    store, pages = folders["store"], folders["pages"]
    is_homeless = store.path == NOWHERE  # nothing is broken then: a server of a file needs no store
    nowhere = store.problem is not None and pages.problem is not None and not is_homeless
    if pages.problem is not None:
        line = f"nothing can be written to the page folder {pages.path}: {pages.problem}; name another with --page-dir"
        # By default a page that nobody else can see will do.
        (found.faults if config.page_dir or nowhere else found.notes).append(line)
    if store.problem is not None and not is_homeless:
        line = f"nothing can be written to the store {store.path}: {store.problem}; name another with MULLAMA_HOME"
        (found.faults if nowhere else found.notes).append(line)
    disk = folders.get("kv_disk")
    if disk is not None and disk.problem is not None:
        found.faults.append(
            f"nothing can be written to the folder of cached KV {disk.path}: {disk.problem}; "
            "name another with --kv-disk-dir"
        )


def _model(text: str, config: ServeConfig, folder: Folder, found: Findings) -> None:
    """Whether a model is here, or there is room to fetch it; and whether memory holds it."""
    from mullama.models.parse import parse_spec
    from mullama.models.resolve import in_quant
    from mullama.models.store.pulling import check_space

    store = Store()
    try:
        spec = parse_spec(text, store.lookup)
        if config.quant:
            spec = in_quant(text, spec, config.quant, store)
        reference = spec.reference
        entry = None if reference.is_local else store.find(reference.key)
        if entry is None and not reference.is_local:
            need_home(folder.path)
            if folder.problem is not None:
                found.faults.append(f"{text} is not here, and the store {folder.path} cannot be written to fetch it")
            elif reference.size is not None:
                check_space(store, reference, reference.size)
            return
        if entry is not None and store.is_damaged(entry):
            store.checked_path(entry)  # says what became of it
        # Whether a file is the one that was verified is found out when it is loaded: hashing takes seconds.
        path = store.path_of(entry) if entry is not None else store.resolve(reference)
        _fits(path, config, spec.served_name(entry.filename if entry is not None else path.name))
    except ConfigError:  # no fault of the machine
        raise
    except MullamaError as error:
        found.faults.append(error.message)
    except OSError as error:
        found.faults.append(f"{error.filename or store.root}: {error.strerror or error}")


def _fits(path: Path, config: ServeConfig, name: str) -> None:
    """Raises MemoryTooSmall, and ModelLoadError for what is no model."""
    from mullama.engine.memory import fits

    fits.header_of(path)
    with contextlib.suppress(MachineUnfit):  # of the libraries; told already
        fits.sizes_for(path, config, name, tell=False)
