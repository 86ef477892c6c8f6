"""``hf:OWNER/REPO[:FILE-OR-QUANT][@REVISION]``: a GGUF of the Hugging Face Hub, by its own client.

``huggingface_hub`` does the talking, so its settings hold: ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HOME``, the proxy,
``HF_HUB_OFFLINE``. Files stay in its cache, where the store refers to them; there is no second copy.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mullama.errors import ReferenceNotFound, StoreError
from mullama.faults import crash_point
from mullama.models.files.gguf import SPLIT_NAME
from mullama.models.reference import Reference, name_of_file
from mullama.models.sources.base import Fetched, FetchedFile, Job
from mullama.models.sources.private_addresses import quiet_logs
from mullama.models.sources.selection import Candidate, choose, quant_of
from mullama.models.store.digests import hash_file
from mullama.models.store.entry import is_digest

log = logging.getLogger(__name__)

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_LOCATION = re.compile(
    rf"(?P<repository>{_PART}/{_PART})"
    r"(?::(?P<wish>[A-Za-z0-9_][^:@\x00-\x1f\\]{0,254}))?"
    r"(?:@(?P<revision>[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}))?"
)


@dataclass(frozen=True, slots=True)
class Location:
    repository: str
    wish: str | None  # a file, or a quantisation in upper case
    revision: str | None

    @property
    def filename(self) -> str | None:
        return self.wish if self.wish is not None and self.wish.lower().endswith(".gguf") else None

    @property
    def quant(self) -> str | None:
        return None if self.filename is not None else self.wish

    def __str__(self) -> str:
        wish = f":{self.wish}" if self.wish is not None else ""
        return f"{self.repository}{wish}{f'@{self.revision}' if self.revision is not None else ''}"


def parse_location(text: str) -> Location:
    """Raises ReferenceNotFound when it is not ``OWNER/REPO[:FILE-OR-QUANT][@REVISION]``."""
    # OWNER/REPO/FILE.gguf, as the hub's pages show it, means the same as OWNER/REPO:FILE.gguf.
    text = re.sub(rf"^({_PART}/{_PART})/(.+\.gguf(?:@.*)?)$", r"\1:\2", text.strip(), flags=re.IGNORECASE)
    match = _LOCATION.fullmatch(text)
    if match is None or ".." in text:
        raise ReferenceNotFound(f"'hf:{text[:120]}' is not of the form hf:OWNER/REPO[:FILE-OR-QUANT][@REVISION]")
    wish: str | None = match["wish"]
    if wish is not None and not wish.lower().endswith(".gguf"):
        wish = wish.upper()
    return Location(match["repository"], wish, match["revision"])


class HubSource:
    def normalise(self, location: str) -> str:
        return str(parse_location(location))

    def with_quant(self, location: str, quant: str) -> str:
        """The location that asks for this quantisation; the same where it names a file."""
        found = parse_location(location)
        return location if found.filename else str(Location(found.repository, quant, found.revision))

    def served_name(self, location: str, filename: str) -> str:
        """The repository's name without ``-GGUF``; of a file that was named, its stem."""
        found = parse_location(location)
        if found.filename is not None:
            return name_of_file(found.filename)
        name = found.repository.partition("/")[2]
        return name_of_file(re.sub(r"[-_.]gguf$", "", name, flags=re.IGNORECASE))

    def locate(self, reference: Reference) -> None:
        """None: it has to be fetched, if only into the hub's cache."""

    def obtain(self, reference: Reference, job: Job) -> Fetched:
        """Raises ReferenceNotFound, StoreError."""
        location = parse_location(reference.locations[0])
        quiet_logs()
        with _clear_errors(location):
            files, commit = _list(location, job)
            chosen = choose(
                files, where=f"the repository {location.repository}", quant=location.quant, filename=location.filename
            )
            steps = [f" part {n} of {len(chosen)}" if len(chosen) > 1 else "" for n in range(1, len(chosen) + 1)]
            paths = [
                _download(location, commit, file, job, f"downloading{of}")
                for file, of in zip(chosen, steps, strict=True)
            ]
        borrowed = [path for path, was_there in paths if was_there]
        fetched = [
            FetchedFile(path, path.name, _verified(path, file, f"verifying{of}", location, job))
            for (path, _), file, of in zip(paths, chosen, steps, strict=True)
        ]
        return Fetched(
            tuple(fetched),
            is_in_place=True,
            is_borrowed=bool(borrowed),
            revision=commit,
            quant=location.quant or quant_of(SPLIT_NAME.sub(r"\g<stem>", chosen[0].path)),
        )


def _list(location: Location, job: Job) -> tuple[list[Candidate], str]:
    """The files of the repository and the commit they are of; offline, those that the cache has."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    job.progress(f"asking for {location.repository}", 0, None)
    if not constants.HF_HUB_OFFLINE:
        info = hub.HfApi().model_info(location.repository, revision=location.revision, files_metadata=True)
        candidates = [
            Candidate(sibling.rfilename, sibling.size, sibling.lfs.sha256 if sibling.lfs else None)
            for sibling in info.siblings or ()
        ]
        if info.sha is None:
            raise StoreError(f"the hub does not say which commit of {location.repository} it has")
        return candidates, info.sha
    snapshot = _cached(location)
    found = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf")]
    return [Candidate(path) for path in found], snapshot.name


def _cached(location: Location) -> Path:
    """The folder of the repository's files in the hub's cache: of the revision, else of the newest commit there.

    Raises LocalEntryNotFoundError of the client.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants, errors

    try:
        return Path(
            hub.snapshot_download(
                location.repository, revision=location.revision, local_files_only=True, allow_patterns=["*.gguf"]
            )
        )
    except errors.LocalEntryNotFoundError:
        # What this program fetched is there by its commit alone, and no branch of the cache names it.
        folder = Path(constants.HF_HUB_CACHE) / f"models--{location.repository.replace('/', '--')}" / "snapshots"
        commits = [path for path in folder.glob("*") if path.is_dir()]
        if location.revision is not None or not commits:
            raise
        return max(commits, key=lambda path: path.stat().st_mtime)


def _download(location: Location, commit: str, file: Candidate, job: Job, step: str) -> tuple[Path, bool]:
    """The file in the hub's cache, and whether it was there."""
    import huggingface_hub as hub

    cached = hub.try_to_load_from_cache(location.repository, file.path, revision=commit)
    was_there = isinstance(cached, str)
    options: dict[str, Any] = {}
    # Older clients have one bar of their own and take none from outside.
    if "tqdm_class" in inspect.signature(hub.hf_hub_download).parameters:
        options["tqdm_class"] = _bar_class(step, file, job)
    path = hub.hf_hub_download(
        location.repository, file.path, revision=commit, force_download=job.is_forced and was_there, **options
    )
    return Path(str(path)), was_there and not job.is_forced


def _verified(path: Path, file: Candidate, step: str, location: Location, job: Job) -> str:
    """The file's sha256. A file that is not the hub's goes out of the cache. Raises StoreError."""
    size = path.stat().st_size
    digest = hash_file(path, lambda done: job.progress(step, done, size))
    if file.sha256 is not None and is_digest(file.sha256) and digest != file.sha256:
        # The client believes what lies in its cache; another attempt must not find it there.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise StoreError(
            f"{file.path} of {location.repository} is not the file that the hub lists "
            f"(sha256 {digest}, expected {file.sha256}); it was removed from the cache"
        )
    return digest


def _bar_class(step: str, file: Candidate, job: Job) -> type[Any]:
    """The progress bar that the hub's client makes for a file; it draws nothing and reports to the job."""
    import importlib

    base: Any = importlib.import_module("tqdm").tqdm

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("name", None)  # of the client's own bars
        base.__init__(self, *args, **{**kwargs, "disable": True})
        self.n_done = int(kwargs.get("initial") or 0)
        self.n_all = kwargs.get("total") or file.size
        job.progress(step, self.n_done, self.n_all)

    def update(self: Any, n: float | None = 1) -> None:
        self.n_done += int(n or 0)
        job.progress(step, self.n_done, self.n_all)
        crash_point("pull:in-download")

    return type("Bar", (base,), {"__init__": __init__, "update": update})


@contextlib.contextmanager
def _clear_errors(location: Location) -> Iterator[None]:
    """What the hub's client raises, in one line that says what to do."""
    from huggingface_hub import errors

    repository = location.repository
    try:
        yield
    except errors.GatedRepoError:
        raise StoreError(
            f"{repository} is gated: accept its terms on its page, and set HF_TOKEN to a token of yours"
        ) from None
    except errors.RevisionNotFoundError:
        raise ReferenceNotFound(f"{repository} has no revision '{location.revision}'") from None
    except errors.RepositoryNotFoundError as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "; is HF_TOKEN right?" if status == 401 else ""
        raise ReferenceNotFound(
            f"the hub has no repository {repository}, or it is private and needs HF_TOKEN{hint}"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise StoreError(
            f"cannot fetch {repository}: the hub cannot be reached, and it is not cached ({_line(error)})"
        ) from None
    except errors.EntryNotFoundError:
        raise ReferenceNotFound(f"{repository} has no such file: {location.wish}") from None
    except errors.OfflineModeIsEnabled:
        raise StoreError(f"cannot fetch {repository}: HF_HUB_OFFLINE is set, and it is not cached") from None
    except errors.HfHubHTTPError as error:
        raise _http_error(repository, error) from None
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk
        raise StoreError(f"cannot fetch {repository}: {_line(error)}") from None
    except Exception as error:
        # The client's HTTP library is its own business, and so are that library's exceptions.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "requests", "urllib3", "hf_xet"):
            raise
        raise StoreError(f"cannot fetch {repository}: the hub cannot be reached ({_line(error)})") from None


def _http_error(repository: str, error: Any) -> StoreError:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403):
        return StoreError(
            f"the hub does not give {repository} to you (HTTP {status}); set HF_TOKEN to a token of yours"
        )
    if status == 429:
        wait = response.headers.get("retry-after") if response is not None else None
        after = f"; it asks to come back in {wait} seconds" if wait and wait.isdigit() else "; try again later"
        return StoreError(f"cannot fetch {repository}: the hub limits how much you may fetch (HTTP 429){after}")
    return StoreError(f"cannot fetch {repository}: the hub answers HTTP {status or '?'} ({_line(error)})")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
