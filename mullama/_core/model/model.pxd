"""A model and its vocabulary. Any thread may use it.

nogil code in its own methods runs between ``enter`` and ``leave``: ``ptr`` and ``vocab`` are written once, and what
they point to is freed only when nobody is inside and no context or adapter is on it. Others have the addresses from a
Context or an Adapter, which counts as a user. The numbers of users and of those inside are changed with the GIL alone.
"""

from libcpp.map cimport map
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector
from libcpp cimport bool as cbool

from mullama._core.llama cimport llama_model, llama_token, llama_vocab
from mullama._core.chat.parsing cimport Format


ctypedef shared_ptr[llama_model] Handle


cdef extern from "chat_shim.h" namespace "mullama" nogil:
    vector[string] c_chat_template_names "mullama::chat_template_names"() except +
    cppclass ChatAsk:
        string messages, tools, parameters, arguments
        cbool add_generation_prompt, thinks, splits, may_call, must_call, parallel, is_generic
    cppclass ChatOpened:
        string prompt, facts
        shared_ptr[Format] format
    cppclass ChatTemplate:
        ChatTemplate(const llama_model * model, const string & override_source) except +
        cbool apply(const string & messages_json, cbool add_generation_prompt, string & prompt, string & error)
        cbool open(const ChatAsk & ask, ChatOpened & opened, string & error)
        map[string, cbool] caps() except +
        string source() except +
        cbool is_explicit() except +


cdef extern from "handle.h" namespace "mullama" nogil:
    Handle own(llama_model * model)


cdef class Model:
    cdef object __weakref__
    cdef llama_model * ptr
    cdef Handle handle  # of the same
    cdef const llama_vocab * vocab
    cdef unique_ptr[ChatTemplate] chat
    cdef readonly str path
    cdef readonly int n_vocab
    cdef readonly bint vocab_only
    cdef object breakers  # what chain.pyx knows of this vocabulary; None: nobody has asked yet
    cdef str digest   # of the vocabulary; None: nobody has asked yet
    cdef int n_users  # contexts and adapters on it: it cannot be closed before them
    cdef int n_inside  # threads in a method without the GIL: it is not freed before they have left
    cdef bint closing

    cdef int check(self) except -1
    cdef int enter(self) except -1
    cdef void leave(self) noexcept
    cdef void free_unused(self) noexcept
    cdef int take_template(self, str source) except -1
    cdef vector[llama_token] controls_of(self, texts) except *
