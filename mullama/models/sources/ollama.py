"""``ollama:NAME[:TAG]``: a model of an Ollama registry, by its HTTP protocol (a manifest, then blobs by digest).

``NAME``, ``NAMESPACE/NAME`` and ``HOST/NAMESPACE/NAME`` are understood. The registry is ``registry.ollama.ai``, or
``$OLLAMA_REGISTRY``, or the reference's own host. Besides the weights, the template, system message, parameters and
licence are kept in the entry.
"""

from __future__ import annotations

from mullama.models.reference import Reference
from mullama.models.sources.base import Fetched, Job
from mullama.models.sources.ollama_location import parse_location


class OllamaSource:
    def normalise(self, location: str) -> str:
        return str(parse_location(location))

    def served_name(self, location: str, filename: str) -> str:
        """``llama3.2:3b``, as Ollama calls it."""
        return parse_location(location).short.removesuffix(":latest").lower()

    def locate(self, reference: Reference) -> None:
        """None: always fetched into the store."""

    def obtain(self, reference: Reference, job: Job) -> Fetched:
        """Raises ReferenceNotFound, StoreError."""
        # PERF: a start that only needs the name does not load an HTTP library.
        from mullama.models.sources.ollama_registry import obtain

        return obtain(parse_location(reference.locations[0]), job)
