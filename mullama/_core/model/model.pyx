"""Weights and vocabulary: load, tokenise, detokenise, chat template.

A Model is immutable once loaded; its methods may be called from any thread. Long work releases the GIL.
"""

from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int32_t
from libcpp.string cimport string
from libcpp.vector cimport vector

import hashlib
import os
import threading
from pathlib import Path

from mullama._core.llama cimport *
from mullama._core.chat.parsing cimport make_format
from mullama.errors import InvalidRequest, LoadCancelled, ModelLoadError


cdef extern from "log_sink.h" namespace "mullama" nogil:
    cppclass LogSink:
        void set_print_level "print_level.store" (int level)
        string take_errors() except +
        @staticmethod
        LogSink & instance()
        @staticmethod
        void install()


#: By llama.cpp's number: which rotation a model gives its keys.
ROPE_TYPES = {-1: "none", 0: "norm", 2: "neox", 8: "mrope", 24: "vision", 40: "imrope"}

_backend_lock = threading.Lock()
_backend_ready = False


def init_backend():
    """Start llama.cpp's backends once a process. Called by everything here that needs them."""
    global _backend_ready
    cdef bytes path
    cdef const char * c_path
    with _backend_lock:
        if _backend_ready:
            return
        LogSink.install()
        # Backends built as plugins (portable wheels) lie beside the libraries, not beside the executable.
        folder = Path(__file__).absolute().parents[2] / "lib"
        path = os.fsencode(folder)
        c_path = path
        if ggml_backend_dev_count() == 0 and folder.is_dir():
            ggml_backend_load_all_from_path(c_path)
        with nogil:
            llama_backend_init()
        _backend_ready = True


def set_log_level(level):
    """Print llama.cpp's own lines of this level and above to stderr: 'debug', 'info', 'warning', 'error' or 'none'."""
    levels = {"none": 0, "debug": 1, "info": 2, "warning": 3, "error": 4}
    LogSink.instance().set_print_level(levels[level])


def chat_template_names():
    """The chat templates that llama.cpp has by name, in order."""
    return sorted(name.decode() for name in c_chat_template_names())


def devices():
    """Compute devices llama.cpp knows: dicts of name, description, type, memory_free and memory_total in bytes."""
    init_backend()
    kinds = {
        <int> GGML_BACKEND_DEVICE_TYPE_CPU: "cpu",
        <int> GGML_BACKEND_DEVICE_TYPE_GPU: "gpu",
        <int> GGML_BACKEND_DEVICE_TYPE_IGPU: "igpu",
        <int> GGML_BACKEND_DEVICE_TYPE_ACCEL: "accel",
    }
    cdef ggml_backend_dev_t device
    cdef size_t free_bytes, total_bytes
    found = []
    for i in range(ggml_backend_dev_count()):
        device = ggml_backend_dev_get(i)
        free_bytes = total_bytes = 0
        ggml_backend_dev_memory(device, &free_bytes, &total_bytes)
        found.append({
            "name": ggml_backend_dev_name(device).decode(),
            "description": ggml_backend_dev_description(device).decode("utf-8", "replace"),
            "type": kinds.get(<int> ggml_backend_dev_get_type(device), "other"),
            "memory_free": free_bytes,
            "memory_total": total_bytes,
        })
    return found


def system_info():
    """llama.cpp's line about compiled features."""
    init_backend()
    return llama_print_system_info().decode("utf-8", "replace").strip()


def llama_cpp_version():
    return llama_version().decode()


cdef cbool _on_progress(float progress, void * user_data) noexcept with gil:
    """Forward to Python; an exception or a False cancels the load."""
    state = <object> user_data
    try:
        if state["callback"](progress) is False:
            state["cancelled"] = True
            return False
        return True
    except BaseException as error:
        state["error"] = error
        return False


cdef inline cbool is_letter(char byte) noexcept nogil:
    """An ASCII letter, or a byte of a character beyond ASCII, which may be one."""
    cdef unsigned char c = <unsigned char> byte
    return c >= 0x80 or 0x61 <= (c | 0x20) <= 0x7A


cdef class Model:
    """A GGUF model. ``vocab_only`` loads no weights: enough to tokenise and to read metadata."""

    def __cinit__(self):
        self.ptr = NULL
        self.vocab = NULL
        self.n_users = 0
        self.n_inside = 0
        self.closing = False

    def __init__(self, path, *, gpu_layers=-1, devices=(), split_mode="layer", tensor_split=(), mmap=True,
                 repack=True, vocab_only=False, chat_template="", progress=None):
        """Load. ``progress(fraction)`` is called as it goes; returning False cancels (LoadCancelled).

        ``chat_template`` is Jinja or one of ``chat_template_names()``; empty: the model's own, else ChatML.
        ``gpu_layers`` -1 puts all layers on the GPU, if there is one. ``repack``: weights may be copied into a form
        that this processor computes faster with. Raises ModelLoadError with llama.cpp's reason.
        """
        init_backend()
        self.path = os.fspath(path)
        self.vocab_only = vocab_only
        if not os.path.isfile(self.path):
            raise ModelLoadError(f"{self.path}: no such file")
        cdef llama_model_params params = llama_model_default_params()
        cdef vector[ggml_backend_dev_t] device_list
        cdef vector[float] split
        cdef bytes encoded
        cdef const char * c_name
        params.n_gpu_layers = gpu_layers
        params.vocab_only = vocab_only
        params.use_extra_bufts = repack
        params.load_mode = LLAMA_LOAD_MODE_MMAP if mmap else LLAMA_LOAD_MODE_NONE
        params.split_mode = {"none": LLAMA_SPLIT_MODE_NONE, "layer": LLAMA_SPLIT_MODE_LAYER,
                             "row": LLAMA_SPLIT_MODE_ROW}[split_mode]
        if devices:
            for name in devices:
                encoded = name.encode()
                c_name = encoded
                if ggml_backend_dev_by_name(c_name) is NULL:
                    known = ", ".join(d["name"] for d in globals()["devices"]())
                    raise ModelLoadError(f"no device named '{name}'; there are: {known}", param="device")
                device_list.push_back(ggml_backend_dev_by_name(c_name))
            device_list.push_back(NULL)
            params.devices = device_list.data()
        if tensor_split:
            if len(tensor_split) > llama_max_devices():
                raise ModelLoadError(f"tensor_split names more than {llama_max_devices()} devices",
                                     param="tensor_split")
            split.resize(llama_max_devices(), 0.0)
            for i, share in enumerate(tensor_split):
                split[i] = share
            params.tensor_split = split.data()
        state = {"callback": progress, "cancelled": False, "error": None}
        if progress is not None:
            params.progress_callback = _on_progress
            params.progress_callback_user_data = <void *> state
        encoded = os.fsencode(self.path)
        cdef const char * c_path = encoded
        _forget_errors()
        with nogil:
            self.ptr = llama_model_load_from_file(c_path, params)
        if self.ptr is NULL:
            if state["error"] is not None:
                raise state["error"]
            if state["cancelled"]:
                raise LoadCancelled(f"{self.path}: loading was cancelled")
            raise ModelLoadError(f"{self.path}: {_last_error('llama.cpp could not load it')}")
        self.handle = own(self.ptr)
        for key, value in self.metadata().items():
            # ggml asserts on these in the first decode.
            if key.endswith(("norm_epsilon", "norm_rms_epsilon")) and not 0 <= float(value) < 1:
                raise ModelLoadError(f"{self.path}: {key} is {value}; it must be a small positive number")
        self.vocab = llama_model_get_vocab(self.ptr)
        if llama_vocab_type(self.vocab) == LLAMA_VOCAB_TYPE_NONE:
            raise ModelLoadError(f"{self.path}: it has no vocabulary, so that no text can be made into tokens for it")
        self.n_vocab = llama_vocab_n_tokens(self.vocab)
        self.take_template(chat_template)

    cdef int take_template(self, str source) except -1:
        cdef string text = source.encode("utf-8")
        try:
            self.chat.reset(new ChatTemplate(self.ptr, text))
        except RuntimeError as error:
            if source:
                raise ModelLoadError(f"the chat template does not parse: {error}", param="chat_template") from None
            # The model's own template is broken: completions still work, chats get ChatML.
            text = b"chatml"
            self.chat.reset(new ChatTemplate(self.ptr, text))
        return 0

    def twin(self, *, chat_template=""):
        """Another Model on the same weights, with a life of its own; the weights are freed with the last one.

        Raises ModelLoadError for a template that does not parse, and when this one was closed.
        """
        self.check()
        cdef Model other = Model.__new__(Model)
        other.path = self.path
        other.vocab_only = self.vocab_only
        other.handle = self.handle
        other.ptr = self.ptr
        other.vocab = self.vocab
        other.n_vocab = self.n_vocab
        other.digest = self.digest
        other.take_template(chat_template)
        return other

    @property
    def n_twins(self):
        """Models on these weights, this one included; 0 when it was closed."""
        return self.handle.use_count()

    @property
    def is_open(self):
        """Whether it was not closed."""
        return self.ptr is not NULL and not self.closing

    def __dealloc__(self):
        self.chat.reset()
        self.ptr = NULL
        self.handle.reset()

    cdef int check(self) except -1:
        if self.ptr is NULL or self.closing:
            raise ModelLoadError("this model was closed")
        return 0

    def close(self):
        """Free the weights, unless a twin has them, as soon as no thread is inside a method. Contexts on it must be
        closed before."""
        if self.n_users:
            raise RuntimeError("a context or an adapter still uses this model")
        self.closing = True
        self.free_unused()

    cdef int enter(self) except -1:
        """A method that releases the GIL is about to use the model: it cannot be freed under it."""
        self.check()
        self.n_inside += 1
        return 0

    cdef void leave(self) noexcept:
        """The other end of ``enter``; the last one out frees a model that was closed meanwhile."""
        self.n_inside -= 1
        self.free_unused()

    cdef void free_unused(self) noexcept:
        cdef Handle handle
        if self.closing and self.n_inside == 0 and self.ptr is not NULL:
            self.chat.reset()
            handle = self.handle
            self.ptr = NULL
            self.handle.reset()
            with nogil:
                handle.reset()

    # -- facts ------------------------------------------------------------------------------------

    def facts(self):
        """What llama.cpp knows of the model, as a dict."""
        self.check()
        cdef char buf[256]
        llama_model_desc(self.ptr, buf, sizeof(buf))
        meta = self.metadata()
        return {
            "description": buf.decode("utf-8", "replace"),
            "architecture": meta.get("general.architecture", ""),
            "n_params": llama_model_n_params(self.ptr),
            "size_bytes": llama_model_size(self.ptr),
            "n_vocab": self.n_vocab,
            "n_ctx_train": llama_model_n_ctx_train(self.ptr),
            "n_layer": llama_model_n_layer(self.ptr),
            "n_embd": llama_model_n_embd(self.ptr),
            "n_swa": llama_model_n_swa(self.ptr),
            "rope": ROPE_TYPES.get(llama_model_rope_type(self.ptr), "other"),
            "has_chat_template": self.chat.get().is_explicit(),
            "has_encoder": llama_model_has_encoder(self.ptr),
            "has_decoder": llama_model_has_decoder(self.ptr),
            "is_recurrent": llama_model_is_recurrent(self.ptr),
            "is_hybrid": llama_model_is_hybrid(self.ptr),
            "is_diffusion": llama_model_is_diffusion(self.ptr),
        }

    def metadata(self):
        """The GGUF's scalar key/value pairs as texts."""
        self.check()
        cdef char key[256]
        cdef vector[char] value
        cdef int32_t i, n
        found = {}
        value.resize(1024)
        for i in range(llama_model_meta_count(self.ptr)):
            if llama_model_meta_key_by_index(self.ptr, i, key, sizeof(key)) < 0:
                continue
            n = llama_model_meta_val_str_by_index(self.ptr, i, value.data(), value.size())
            if n >= <int32_t> value.size():
                value.resize(n + 1)
                n = llama_model_meta_val_str_by_index(self.ptr, i, value.data(), value.size())
            if n >= 0:
                found[key.decode("utf-8", "replace")] = value.data()[:n].decode("utf-8", "replace")
        return found

    def vocab_digest(self):
        """SHA-256 of the texts of all tokens, in order: equal for models whose token ids mean the same.

        Worked out once, without the GIL: a vocabulary may have a quarter of a million tokens.
        """
        cdef llama_token token
        cdef string texts
        self.check()
        if self.digest is None:
            self.enter()
            try:
                with nogil:
                    for token in range(self.n_vocab):
                        texts.append(llama_vocab_get_text(self.vocab, token))
                        texts.push_back(0)
            finally:
                self.leave()
            self.digest = hashlib.sha256(<bytes> texts).hexdigest()
        return self.digest

    def vocab_facts(self):
        """What tokenising in pieces rests on, of all tokens; the GIL is released.

        ``longest``: bytes of the longest one; ``byte_tokens``: the token of each byte alone, or -1; ``joins``: whether
        one holds a letter with a space behind it, or may swallow the space between two words; ``specials``: the bytes
        of those that are looked for in a text before its words are.
        """
        self.check()
        cdef vector[char] buf
        cdef vector[int32_t] lone
        cdef vector[string] specials
        cdef int32_t token, n, i
        cdef int32_t longest = 0
        cdef int attr
        cdef cbool joins = False
        buf.resize(256)
        lone.resize(256, -1)
        self.enter()
        try:
            with nogil:
                for token in range(self.n_vocab):
                    n = llama_token_to_piece(self.vocab, token, buf.data(), <int32_t> buf.size(), 0, True)
                    if n < 0:
                        buf.resize(-n)
                        n = llama_token_to_piece(self.vocab, token, buf.data(), <int32_t> buf.size(), 0, True)
                    longest = max(longest, n)
                    for i in range(n - 1):
                        if buf[i + 1] == 0x20 and is_letter(buf[i]):
                            joins = True
                    attr = llama_vocab_get_attr(self.vocab, token)
                    if n == 1 and lone[<unsigned char> buf[0]] < 0 and not attr & LLAMA_TOKEN_ATTR_CONTROL:
                        lone[<unsigned char> buf[0]] = token
                    if attr & (LLAMA_TOKEN_ATTR_LSTRIP | LLAMA_TOKEN_ATTR_RSTRIP):
                        joins = True
                    # These are looked for in the text before words are: one may take the space before a word.
                    if attr & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_USER_DEFINED) and n > 0:
                        specials.push_back(string(buf.data(), n))
                        if buf[0] == 0x20 and (n == 1 or is_letter(buf[1])):
                            joins = True
        finally:
            self.leave()
        return {"longest": longest, "byte_tokens": [lone[i] for i in range(256)], "joins": joins,
                "specials": specials}

    def control_tokens(self):
        """What ``tokenize`` takes for a token with ``parse_special`` and for text without, in the order in which it is
        looked for: (text, whether the whitespace before it goes, whether that behind it does)."""
        self.check()
        cdef vector[int32_t] ids
        cdef int32_t token
        cdef int attr
        self.enter()
        try:
            with nogil:
                for token in range(self.n_vocab):
                    if llama_vocab_get_attr(self.vocab, token) & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN):
                        ids.push_back(token)
        finally:
            self.leave()
        found = []
        for token in ids:
            data = llama_vocab_get_text(self.vocab, token)
            attr = llama_vocab_get_attr(self.vocab, token)
            found.append((len(data), data.decode("utf-8", "replace"), bool(attr & LLAMA_TOKEN_ATTR_LSTRIP),
                          bool(attr & LLAMA_TOKEN_ATTR_RSTRIP)))
        found.sort(key=lambda one: -one[0])
        return [(text, left, right) for size, text, left, right in found if size]

    def check_token(self, token, param=None):
        """Raise InvalidRequest unless ``token`` is an id of this vocabulary. Returns it as an int."""
        self.check()
        if isinstance(token, bool) or not isinstance(token, int):
            raise InvalidRequest(f"a token id must be a whole number, got {type(token).__name__}", param=param)
        if not 0 <= token < self.n_vocab:
            raise InvalidRequest(f"token id {token} is outside the vocabulary (0 to {self.n_vocab - 1})", param=param)
        return int(token)

    # -- text -------------------------------------------------------------------------------------

    def tokenize(self, str text, *, bint add_special=True, bint parse_special=True):
        """Token ids of a text; the GIL is released.

        Raises InvalidRequest for lone surrogates, and for what the vocabulary has no tokens for.
        """
        self.check()
        cdef Py_ssize_t size
        cdef const char * data
        try:
            data = PyUnicode_AsUTF8AndSize(text, &size)
        except UnicodeEncodeError:
            raise InvalidRequest("the text holds a lone surrogate, which is not valid Unicode") from None
        if size > 0x7FFFFFF0:
            raise InvalidRequest("the text is longer than 2 GiB")
        cdef vector[llama_token] tokens
        cdef int32_t n = 0
        cdef int32_t i
        self.enter()
        try:
            with nogil:
                tokens.resize(size + 2)
                n = llama_tokenize(self.vocab, data, <int32_t> size, tokens.data(), <int32_t> tokens.size(),
                                   add_special, parse_special)
                if n < 0:
                    tokens.resize(-n)
                    n = llama_tokenize(self.vocab, data, <int32_t> size, tokens.data(), <int32_t> tokens.size(),
                                       add_special, parse_special)
                for i in range(n):
                    if not 0 <= tokens[i] < self.n_vocab:  # a token for what is unknown, which the vocabulary lacks
                        n = -1
                        break
        except (IndexError, RuntimeError) as error:  # of C++: a byte that no token stands for, a BOS that is none
            raise InvalidRequest(f"this model's vocabulary cannot express the text ({error})") from None
        finally:
            self.leave()
        if n < 0:
            raise InvalidRequest("this model's vocabulary cannot express the text")
        return [tokens[i] for i in range(n)]

    def detokenize(self, tokens, *, bint special=False):
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. ``special`` shows control tokens."""
        return self.detokenize_bytes(tokens, special=special).decode("utf-8", "replace")

    def detokenize_bytes(self, tokens, *, bint special=False):
        """The bytes behind ``detokenize``."""
        cdef vector[llama_token] ids
        for token in tokens:
            ids.push_back(self.check_token(token))
        cdef vector[char] text
        cdef int32_t n
        self.enter()
        try:
            with nogil:
                text.resize(ids.size() * 8 + 16)
                n = llama_detokenize(self.vocab, ids.data(), <int32_t> ids.size(), text.data(), <int32_t> text.size(),
                                     False, special)
                if n < 0:
                    text.resize(-n)
                    n = llama_detokenize(self.vocab, ids.data(), <int32_t> ids.size(), text.data(),
                                         <int32_t> text.size(), False, special)
        finally:
            self.leave()
        return text.data()[:max(n, 0)]

    def piece(self, token, *, bint special=False):
        """The bytes one token stands for."""
        cdef llama_token id = self.check_token(token)
        cdef vector[char] buf
        buf.resize(64)
        cdef int32_t n = llama_token_to_piece(self.vocab, id, buf.data(), <int32_t> buf.size(), 0, special)
        if n < 0:
            buf.resize(-n)
            n = llama_token_to_piece(self.vocab, id, buf.data(), <int32_t> buf.size(), 0, special)
        return buf.data()[:max(n, 0)]

    cdef vector[llama_token] controls_of(self, texts) except *:
        """The control tokens that are spelled like one of ``texts``; other texts are none."""
        cdef vector[llama_token] found
        for text in texts:
            tokens = self.tokenize(text, add_special=False)
            if len(tokens) == 1 and not self.piece(tokens[0]):
                found.push_back(tokens[0])
        return found

    # -- chat -------------------------------------------------------------------------------------

    def render_chat(self, bytes messages_json, *, bint add_generation_prompt=True):
        """The prompt of a chat (a JSON array of OpenAI messages); the GIL is released.

        Tokenise the result with ``add_special=True``: a BOS that the vocabulary adds by itself is left out here.
        Raises InvalidRequest when the template refuses the messages.
        """
        self.check()
        cdef string source = messages_json
        cdef string prompt, error
        cdef cbool ok
        self.enter()
        try:
            with nogil:
                ok = self.chat.get().apply(source, add_generation_prompt, prompt, error)
        finally:
            self.leave()
        if not ok:
            raise _refused(error)
        return prompt.decode("utf-8", "replace")

    def open_chat(self, bytes messages_json, *, bytes tools=b"", bytes parameters=b"", bytes arguments=b"",
                  bint add_generation_prompt=True, bint thinks=True, bint splits=True, bint may_call=True,
                  bint must_call=False, bint parallel=True, bint is_generic=False):
        """The prompt of a chat with functions and thoughts, and the AnswerFormat of its answer; the GIL is released.

        The parameters are ChatAsk's (chat_shim.h). Raises InvalidRequest as ``render_chat`` does.
        """
        self.check()
        cdef ChatAsk ask
        cdef ChatOpened opened
        cdef string error
        cdef cbool ok
        ask.messages, ask.tools, ask.parameters, ask.arguments = messages_json, tools, parameters, arguments
        ask.add_generation_prompt, ask.thinks, ask.is_generic = add_generation_prompt, thinks, is_generic
        ask.splits, ask.may_call, ask.must_call, ask.parallel = splits, may_call, must_call, parallel
        self.enter()
        try:
            with nogil:
                ok = self.chat.get().open(ask, opened, error)
        finally:
            self.leave()
        if not ok:
            raise _refused(error)
        return opened.prompt.decode("utf-8", "replace"), make_format(opened.format, opened.facts)

    def chat_caps(self):
        """What the template can do, by llama.cpp's names (``supports_tools`` …)."""
        self.check()
        return {name.decode(): can for name, can in self.chat.get().caps()}

    def chat_template(self):
        """Source of the template in use."""
        self.check()
        return self.chat.get().source().decode("utf-8", "replace")


def _refused(bytes error):
    reason = error.decode("utf-8", "replace")[:300]
    return InvalidRequest(f"the chat template refuses these messages: {reason}", param="messages")


def _forget_errors():
    """See that ``_last_error`` tells of what comes now."""
    LogSink.instance().take_errors()


def _last_error(default):
    """llama.cpp's last error line, tidied to one line."""
    text = LogSink.instance().take_errors().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if "failed to load model" not in line] or lines
    if not lines:
        return default
    line = lines[0]
    # "llama_model_load: error loading model: tensor …" says the same without its head
    for head in (
        "error loading model: ",
        "failed to apply lora adapter: ",
        "gguf_init_from_file_ptr: ",
        "gguf_init_from_reader: ",
    ):
        if head in line:
            line = line.split(head, 1)[1]
    return line
