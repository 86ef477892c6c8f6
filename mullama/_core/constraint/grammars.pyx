"""What constrains texts: grammars that llguidance compiles, for the vocabulary of a model.

    grammar = compile_for(model, constraint)    any thread; the GIL is released, nobody waits longer than MOST_MS
    slot.matching = grammar.begin()             a matcher of one text (matching.h)

A vocabulary is read once for all models that have it, and what was compiled last is kept with it, so that a schema that
comes again costs a copy.
"""

from cython.operator cimport dereference
from libcpp.memory cimport make_shared

import importlib.util
import threading
import time
from collections import OrderedDict
from importlib import metadata
from pathlib import Path

from mullama._core.constraint.translation import source_of
from mullama.errors import InvalidRequest, QueueFull

cdef enum:
    QUICK_MS = 30            # of compiling at the priority of all others
    MOST_MS = 900
    MOST_COMPILING = 8       # threads, also of those that nobody waits for any more
    MAX_VOCABULARIES = 4
    MAX_KEPT = 128           # grammars of a vocabulary
    MAX_KEPT_BYTES = 1 << 20  # of their texts; what is made of them is some dozens of times that
    KEPT_S = 1800

#: Versions of llguidance whose C functions were tried.
TRIED = ((1, 9), (1, 10))

_opening = threading.Lock()
_lock = threading.Lock()
_vocabularies = OrderedDict()  # by digest
_library = None
cdef Llg _llg


def library():
    """What constrains texts here: ``version`` (None: llguidance is missing), ``problem`` (None: it can be used)."""
    global _library
    if _library is None:
        with _opening:
            if _library is None:
                _library = _open_library()
    return dict(_library)


def _open_library():
    try:
        version = metadata.version("llguidance")
    except metadata.PackageNotFoundError:
        return {"version": None, "problem": "llguidance is not installed"}
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not TRIED[0] <= numbers < TRIED[1]:
        return {"version": version, "problem": f"llguidance {version} was not tried; 1.9 is known to work"}
    spec = importlib.util.find_spec("llguidance")
    paths = sorted(path for folder in (spec.submodule_search_locations if spec else ()) or ()
                   for path in Path(folder).glob("_lib*.so"))
    if not paths:
        return {"version": version, "problem": "llguidance has no shared library"}
    cdef bytes path = str(paths[0]).encode()
    problem = _llg.open(path).decode("utf-8", "replace")
    return {"version": version, "problem": problem or None}


cdef class Grammar:
    """A compiled constraint. Any number of texts may begin with it."""

    cdef MatchingPtr begin(self) except *:
        return dereference(self.native).begin()


cdef class Vocabulary:
    """A vocabulary as llguidance has it, and what was compiled for it."""

    def __cinit__(self):
        self.lock = threading.Lock()
        self.known = OrderedDict()

    cdef Grammar find(self, tuple key):
        """The grammar that is known by ``key``, which is the latest now; None."""
        with self.lock:
            found = self.known.pop(key, None)
            if found is None:
                return None
            self.known[key] = (found[0], time.monotonic())
            return found[0]

    cdef int keep(self, tuple key, Grammar grammar) except -1:
        """Know a grammar, and forget those that are too old or too many."""
        with self.lock:
            if key not in self.known:
                self.n_bytes += len(key[1])
            self.known[key] = (grammar, time.monotonic())
            while self.known:
                oldest, (_, since) = next(iter(self.known.items()))
                if len(self.known) <= MAX_KEPT and self.n_bytes <= MAX_KEPT_BYTES \
                        and time.monotonic() - since < KEPT_S:
                    break
                del self.known[oldest]
                self.n_bytes -= len(oldest[1])
        return 0


cdef Vocabulary _vocabulary_of(Model model):
    cdef Vocabulary found
    cdef string error
    digest = model.vocab_digest()
    with _lock:
        found = _vocabularies.pop(digest, None)
        if found is None:
            found = Vocabulary()
            found.native = make_shared[CVocabulary](_llg)
            model.enter()
            try:
                with nogil:
                    error = dereference(found.native).read(model.vocab)
            finally:
                model.leave()
            if not error.empty():
                raise InvalidRequest("this model's vocabulary cannot be constrained: "
                                     + error.decode("utf-8", "replace"), param="constraint")
        _vocabularies[digest] = found
        while len(_vocabularies) > MAX_VOCABULARIES:
            _vocabularies.popitem(last=False)
    return found


cdef Grammar compile_for(Model model, object constraint):
    """The grammar of a constraint. Raises InvalidRequest, with the library's reason, and QueueFull."""
    cdef Vocabulary vocabulary
    cdef Grammar grammar
    cdef Beginning beginning
    cdef string kind, text, error
    cdef LlgLimits limits
    cdef GrammarPtr native
    found = library()
    if found["problem"] is not None:
        raise InvalidRequest(f"this server cannot constrain texts: {found['problem']}", param="constraint")
    key = (constraint.kind, constraint.text, constraint.after, constraint.triggers)
    vocabulary = _vocabulary_of(model)
    grammar = vocabulary.find(key)
    if grammar is not None:
        return grammar
    source_kind, source = source_of(constraint)
    kind, text = source_kind.encode(), source.encode("utf-8")
    for one in constraint.after:
        beginning.after.push_back(one.encode("utf-8"))
    for one in constraint.triggers:
        beginning.triggers.push_back(one.encode("utf-8"))
    limits = _llg.init(NULL).limits
    limits.lexer_states = 25_000
    limits.grammar_size = 200_000
    with nogil:
        native = compile_grammar(vocabulary.native, kind, text, limits, beginning, QUICK_MS, MOST_MS, MOST_COMPILING,
                                 error)
    if native.get() is NULL:
        raise _refusal(constraint, error.decode("utf-8", "replace"))
    grammar = Grammar()
    grammar.native = native
    vocabulary.keep(key, grammar)
    return grammar


def _refusal(constraint, reason):
    if reason == "busy":
        return QueueFull("too many constraints are being compiled", retry_after=1)
    if reason == "slow":
        reason = "it takes too long to compile; make it simpler"
    words = {"json_object": "JSON object", "json_schema": "JSON schema", "regex": "regular expression",
             "choice": "list of choices", "lark": "grammar", "gbnf": "grammar"}
    reason = " ".join(reason.replace("<non-verbose/>", "").split())[:400]
    if reason == "NoExtensionBias":
        reason = "this model has no tokens that it could begin with"
    return InvalidRequest(f"the {words[constraint.kind]} cannot be enforced: {reason}", param="constraint")
