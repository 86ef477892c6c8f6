"""``file:PATH``, ``./model.gguf``, ``./folder``: models that are used where they lie."""

from __future__ import annotations

from pathlib import Path

from mullama.errors import ReferenceNotFound
from mullama.home import expand
from mullama.models.reference import Reference
from mullama.models.sources.base import Progress, Sink
from mullama.models.sources.selection import Candidate, choose


class LocalSource:
    """A path to a file, or to a folder with a model in it. The file is never copied, moved or removed."""

    def normalise(self, location: str) -> str:
        return str(expand(location).absolute())

    def locate(self, reference: Reference) -> Path:
        """The file; of a folder its only model, or the one that ``reference.quant`` names. Raises ReferenceNotFound."""
        path = Path(reference.locations[0])
        try:
            if path.is_dir():
                return _model_in(path, reference.quant)
            is_file, is_there = path.is_file(), path.exists()
        except OSError as error:
            raise ReferenceNotFound(f"cannot read {path}: {error.strerror}") from None
        if not is_file:
            raise ReferenceNotFound(f"{path} is not a file" if is_there else f"there is no file {path}")
        return path

    def fetch(self, reference: Reference, sink: Sink, folder: Path, progress: Progress) -> str:
        """Copies. The store asks only where ``locate`` gave None, so nothing in mullama calls it."""
        path = self.locate(reference)
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sink.write(block)
                progress("copying", sink.size, reference.size)
        return path.name


def _model_in(folder: Path, quant: str | None) -> Path:
    """The first file of the model that a folder holds. Raises ReferenceNotFound, which lists what is there."""
    files = [Candidate(path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file()]
    chosen = choose(files, quant=quant, where=f"the folder {folder}", needs_quant=True)
    return folder / chosen[0].path
