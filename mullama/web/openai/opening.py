"""Opening a request, whatever its API: what it asks of the model that answers, and the group of its generations."""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from mullama.engine.client import AnswerForm, EngineClient
from mullama.errors import InvalidRequest
from mullama.serving.states import Lease
from mullama.web.chat.answer import Answer
from mullama.web.http.request import PERMIT, Request
from mullama.web.internal.lora_routes import SEPARATOR, check_named, uses_of
from mullama.web.keys.rate_limits import Permit
from mullama.web.openai.context_policy import USUAL_COMPLETION, ContextPolicy, Dropped, PromptLimits, policy_for
from mullama.web.openai.schemas import ChatCall, CompletionCall, Options, keep_alive_of, options_of
from mullama.web.services import FEW_BIASES, Services
from mullama.web.stream.generations import Group
from mullama.web.structured import constrains
from mullama.web.work import Errand

T = TypeVar("T")


@dataclass(slots=True)
class Opened:
    """A request that engines work on. ``dropped`` and ``echoes`` are those of its prompts."""

    group: Group
    options: Options
    dropped: Sequence[Dropped | None]
    echoes: list[str] | None = None
    load_ns: int = 0  # from the request's arrival until it had its model


@contextlib.contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors about a field in the words of an API that calls it otherwise. ``names``: ours, and theirs."""
    try:
        yield
    except InvalidRequest as error:
        ours = re.split(r"[.\[]", error.param or "", maxsplit=1)[0]
        if ours in names and error.param is not None:
            error.param = names[ours] + error.param.removeprefix(ours)
            if error.message.startswith(ours):
                error.message = names[ours] + error.message.removeprefix(ours)
        raise


async def with_lease(services: Services, req: Request, model: str, begin: Callable[[Lease], Awaitable[T]]) -> T:
    """``begin`` with a lease on the model, which it takes over; an error gives it back."""
    lease = await services.lease(req, model)
    try:
        return await begin(lease)
    except BaseException:
        lease.release()
        raise


def new_id(prefix: str) -> str:
    """``chatcmpl-…``; a prefix that ends with an underscore has its own separator."""
    return f"{prefix}{'' if prefix.endswith('_') else '-'}{secrets.token_hex(16)}"


class Opening:
    """What a request asks of its model, checked; ``submit`` makes its generations. Made by ``of``."""

    def __init__(
        self,
        services: Services,
        req: Request,
        call: ChatCall | CompletionCall,
        lease: Lease,
        errand: Errand,
        named: tuple[str, ...],
        options: Options,
        prepared: Any,
        load_ns: int,
    ) -> None:
        info = lease.engine.info
        self.load_ns = load_ns
        self.errand = errand
        self.options = options
        self.policy = policy_for(options.context_policy, services.config.context_policy, can_shift=info.can_shift)
        self.limits = PromptLimits(info.n_ctx, options.sampling.max_tokens)
        self._services = services
        self._req = req
        self._call = call
        self._lease = lease
        self._named = named
        self._prepared = prepared
        self._keep_alive_s = keep_alive_of(call.body)

    @classmethod
    async def of(cls, services: Services, req: Request, call: ChatCall | CompletionCall, lease: Lease) -> Opening:
        """Raises InvalidRequest, AdapterNotFound."""
        load_ns = time.monotonic_ns() - req.arrival_ns
        engine, errand = lease.engine, services.errand(req)
        named = check_named(call.model, call.named, engine)
        is_dear = len(call.body.logit_bias or ()) > FEW_BIASES or constrains(call.body)
        options = await errand.run(
            is_dear, partial(options_of, call.body, engine.info, services.defaults.of(call.model))
        )
        with in_words_of({"constraint": options.constrained_by}):
            prepared = await services.prepared(errand, engine, options.sampling)
        return cls(services, req, call, lease, errand, named, options, prepared, load_ns)

    @property
    def engine(self) -> EngineClient:
        return self._lease.engine

    async def submit(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        id_prefix: str,
        endpoint: str,
        translate: Callable[[Any], list[int]] | None = None,
        form: AnswerForm | None = None,
    ) -> Group:
        """The generations, submitted; their answers are of ``form``. The group takes over the lease. Raises what
        ``Group.submit`` raises."""
        options = self.options.of_client(self._req.tenant, self._req.key)
        if form is not None:
            stops = tuple(dict.fromkeys((*options.sampling.stop, *form.stops)))
            options = replace(options, sampling=replace(options.sampling, stop=stops, shown=form.shown))
        most = min(self.options.sampling.max_tokens or USUAL_COMPLETION, self.limits.n_ctx)
        n_prompt = sum(map(len, prompts))
        permit: Permit | None = self._req.scope.get(PERMIT)
        most *= self.options.n * len(prompts)
        reservation = None if permit is None else permit.reserve(n_prompt, most)
        group = Group(
            self._services,
            self._lease,
            request_id=new_id(id_prefix),
            model=SEPARATOR.join((self._call.model, *self._named)),
            endpoint=endpoint,
            prompts=prompts,
            options=options,
            prepared=self._prepared,
            arrival_ns=self._req.arrival_ns,
            context_shift=self.policy is ContextPolicy.SHIFT,
            lora=uses_of(self._named, self._call.body.lora),
            translate=translate,
            reservation=reservation,
        )
        if form is not None:
            shows = getattr(self._call.body, "include_reasoning", None) is not False
            group.answers = [Answer(form.new_parser(), shows) for _ in range(options.n * len(prompts))]
        await group.submit()
        self._services.keep_alive(self._call.model, self._keep_alive_s)  # of a request that was not refused
        return group
