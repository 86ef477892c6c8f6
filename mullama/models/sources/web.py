"""``https://HOST/….gguf[#sha256=HEX]``: a file from anywhere, resumed where the server allows it."""

from __future__ import annotations

import re
import urllib.parse
from functools import partial

from mullama.errors import ReferenceNotFound
from mullama.models.files.gguf import SPLIT_NAME
from mullama.models.reference import Reference, name_of_file
from mullama.models.sources.base import Fetched, FetchedFile, Job

_PIN = re.compile(r"sha256[=:]([0-9a-fA-F]{64})")


class WebSource:
    """A location is the address without its scheme. Of a split model it is the first part's."""

    scheme = "https"

    def normalise(self, location: str) -> str:
        """Raises ReferenceNotFound: no address of a .gguf file, or a fragment that is no ``sha256=HEX``."""
        text = f"{self.scheme}:{location}"
        try:
            url = urllib.parse.urlsplit(text)
            is_address = location.startswith("//") and bool(url.hostname) and (url.port or 1) > 0
        except ValueError:
            is_address = False
        if not is_address or not text.isprintable() or " " in text:
            raise ReferenceNotFound(f"'{text[:120]}' is not of the form {self.scheme}://HOST/FILE.gguf")
        if not file_of(text).lower().endswith(".gguf"):
            raise ReferenceNotFound(f"'{text[:120]}' is not the address of a .gguf file")
        pin = _PIN.fullmatch(url.fragment)
        if url.fragment and pin is None:
            raise ReferenceNotFound("what follows # in an address must be sha256= and 64 hexadecimal digits")
        if pin is not None and len(_parts(text)) > 1:
            raise ReferenceNotFound("a model in several files cannot be pinned by one sha256")
        fragment = f"#sha256={pin[1].lower()}" if pin else ""
        return urllib.parse.urldefrag(text).url.removeprefix(f"{self.scheme}:") + fragment

    def served_name(self, location: str, filename: str) -> str:
        """The stem of the file that the address names."""
        return name_of_file(file_of(f"{self.scheme}:{location}"))

    def locate(self, reference: Reference) -> None:
        """None: always fetched into the store."""

    def obtain(self, reference: Reference, job: Job) -> Fetched:
        """Raises ReferenceNotFound, StoreError."""
        # PERF: a start that only needs the name does not load an HTTP library.
        from mullama.models.sources.download import Fetcher
        from mullama.models.sources.net import make_client

        url, fragment = urllib.parse.urldefrag(f"{self.scheme}:{reference.locations[0]}")
        pin = _PIN.fullmatch(fragment)
        urls = _parts(url)
        with make_client(allow_private=job.allow_private) as client:
            fetcher = Fetcher(client, allow_private=job.allow_private)
            files, etag = [], None
            for number, part in enumerate(urls, 1):
                of = f" part {number} of {len(urls)}" if len(urls) > 1 else ""
                got = fetcher.download(
                    part,
                    job.folder / f"{number:05}.gguf",
                    what=file_of(part),
                    progress=partial(job.progress, f"downloading{of}"),
                    check_space=job.check_space,
                    sha256=pin[1] if pin and len(urls) == 1 else None,
                )
                files.append(FetchedFile(got.path, file_of(part), got.sha256))
                etag = etag or got.etag or got.last_modified
        return Fetched(tuple(files), revision=etag)


class PlainWebSource(WebSource):
    """The same without encryption, which is only used with ``allow_private_sources``."""

    scheme = "http"


def file_of(url: str) -> str:
    """The name of the file that an address names."""
    return urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])


def _parts(url: str) -> list[str]:
    """The addresses of all parts where this is the first of a split model, else itself."""
    split = urllib.parse.urlsplit(url)
    match = SPLIT_NAME.fullmatch(split.path)
    if match is None or int(match["number"]) != 1 or int(match["count"]) < 2:
        return [url]
    ending = split.path[-len(".gguf") :]
    paths = (f"{match['stem']}-{n:05}-of-{match['count']}{ending}" for n in range(1, int(match["count"]) + 1))
    return [split._replace(path=path).geturl() for path in paths]
