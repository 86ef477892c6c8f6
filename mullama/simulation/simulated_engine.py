"""The engine's twin: what mullama/engine/engine.py does in a step, with a cost model in place of the core.

A policy, its plans and their checks are the engine's own; so are placement and the KV budget. Times are integer
nanoseconds, so that the same workload gives the same result everywhere, and several equal steps at once give exactly
what they give one by one.
"""

from __future__ import annotations

from collections.abc import Mapping

from mullama.errors import ConfigError, PluginError
from mullama.logs import said
from mullama.plugins.groups import is_fault
from mullama.scheduling import Costs, EngineState, Plan, Scheduler, SeqView, check_plan, own_plan
from mullama.scheduling.base import Progress
from mullama.scheduling.kv_budget import Fitted, fit_or_go_on
from mullama.simulation.cost_model.costs import BUCKET, CostModel
from mullama.simulation.cost_model.timing import StepCosts
from mullama.simulation.feed import SECOND, Feed
from mullama.simulation.records import EVER, Override, SimConfig, SimSequence, Simulated
from mullama.simulation.simulated_sequences import Sequences
from mullama.types import SeqState
from mullama.workload.base import Outcome, TraceRequest, Workload

ORIGIN_NS = SECOND  # when the workload starts; a policy never sees the time 0, which means "no limit"
NAP_NS = 1_000_000  # how long the engine sleeps when a plan did nothing and said nothing


def simulate(
    workload: Workload,
    policy: Scheduler,
    costs: CostModel,
    config: SimConfig | None = None,
    overrides: Mapping[int, Override] | None = None,
) -> Simulated:
    """Play ``workload`` with ``policy``, which must be new. ``overrides`` are by index of the request.

    Raises ConfigError for a request that could never run, and PluginError, with the reason, for a policy that raises,
    makes no progress while work waits or returns what the engine could not carry out.
    """
    return Simulator(workload, policy, costs, config or SimConfig(), overrides or {}).run()


class Simulator:
    """One run of one policy."""

    def __init__(
        self,
        workload: Workload,
        policy: Scheduler,
        costs: CostModel,
        config: SimConfig,
        overrides: Mapping[int, Override],
    ) -> None:
        self.config = config
        self.now = ORIGIN_NS
        self.result = Simulated()
        self._policy = policy
        self._model = costs
        self._overrides = overrides
        capacity = config.n_slots * config.n_ctx
        self._kv_tokens = min(config.kv_tokens or capacity, capacity)
        self._is_tight = self._kv_tokens < capacity
        self._limit = min(config.n_ctx, self._kv_tokens)
        self._check_fit(workload)
        self._feed = Feed(workload)
        self._timing = StepCosts(costs, self.result.counters, sampled=config.sampled)
        self._seqs = Sequences(config, costs, self._timing, self.result.counters)
        self._plan_ns, self._wake_ns = round(costs.plan_ns), round(costs.wake_ns)
        self._admit_ns, self._deliver_ns = round(costs.admit_ns), round(costs.deliver_ns)
        self._policy_costs: dict[tuple[int, int], Costs] = {}
        self._last_tokens: dict[int, int] = {}
        self._progress = Progress()

    def _check_fit(self, workload: Workload) -> None:
        for index, request in enumerate(workload.all_requests()):
            tokens = request.prompt_tokens + request.output_tokens
            if tokens > self._limit:
                raise ConfigError(
                    f"request {index} of the workload needs {tokens} tokens, one may use {self._limit}: raise "
                    "--ctx-size or shorten the requests",
                    param="ctx_size",
                )

    def run(self) -> Simulated:
        """Play it to the end."""
        counters = self.result.counters
        is_awake = self._wait()
        while is_awake:
            self._take_arrivals()
            if self._seqs.live:
                start = self.now
                self._step()
                counters.busy_ns += self.now - start
            else:
                is_awake = self._wait()
        counters.total_ns = self.now - ORIGIN_NS
        self.result.outcomes.sort(key=lambda outcome: outcome.index)
        self.result.exhausted = self._feed.exhausted
        return self.result

    def _wait(self) -> bool:
        """The engine is idle until the next request comes. False: none will."""
        arrival = self._feed.next_ns
        if arrival is None:
            return False
        self.now = max(self.now, arrival + ORIGIN_NS) + self._wake_ns
        return True

    # -- arrivals and ends ----------------------------------------------------------------------------------------

    def _take_arrivals(self) -> None:
        feed = self._feed
        while feed.next_ns is not None and feed.next_ns + ORIGIN_NS <= self.now:
            at_ns, index, request = feed.take()
            self._add(at_ns + ORIGIN_NS, index, request)

    def _add(self, at_ns: int, index: int, request: TraceRequest) -> None:
        known = self._overrides.get(index, Override())
        view = SeqView(
            id=index + 1,
            state=SeqState.WAITING,
            prompt_tokens=request.prompt_tokens,
            prefill_left=request.prompt_tokens,
            max_tokens=request.output_tokens if known.max_tokens is None else known.max_tokens,
            arrival_ns=at_ns,
            priority=request.priority,
            user=request.user,
            slo_ms=request.slo_ms,
            state_ns=at_ns,
        )
        self._seqs.add(SimSequence(view, index, request, known.cached_tokens))
        self._tell("add", view)

    def _tell(self, what: str, value: SeqView | int) -> None:
        try:
            getattr(self._policy, what)(value)
        except BaseException as error:
            if not is_fault(error):
                raise
            raise self._broken(f"{what}() raised {said(error)}") from error

    def _broken(self, reason: str) -> PluginError:
        return PluginError(f"the scheduler '{self._policy.name}' broke its contract: {reason}")

    def _finish(self, seq: SimSequence) -> None:
        self._seqs.finish(seq, self.now)
        self._tell("remove", seq.view.id)
        deliver = self._deliver_ns - ORIGIN_NS
        seen = [(at + deliver) / SECOND for at in seq.token_ns]
        self.result.outcomes.append(
            Outcome(
                seq.index,
                seq.request,
                token_s=tuple(seen),
                finished_s=seen[-1],
                cached_tokens=seq.view.cached_tokens,
                preemptions=seq.view.preemptions,
            )
        )
        self._feed.answered(seq.index, self.now + deliver)

    # -- a step -----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Plan, preempt, admit, run, follow."""
        plan = self._plan()
        self.now += self._plan_ns
        steps = plan.repeat
        fresh = bool(plan.preempt)
        seqs, fitted = self._seqs, None
        if self._is_tight:
            fitted = fit_or_go_on(plan, seqs.views, self._kv_tokens, self.config.n_batch)
            plan = fitted.plan
        for handle, how in plan.preempt.items():
            self.now += seqs.preempt(handle, how, self.now)
        if fitted is not None:
            steps = self._make_room(fitted)
        for handle in plan.tokens:
            if seqs.views[handle].is_queued and not seqs.waits_for_prefix(handle, plan):
                self.now += self._admit_ns
                self.now += seqs.start(handle, self.now)
                fresh = True
        self.now += seqs.close_holes()
        decode, prefill = seqs.shape(plan)
        if prefill:
            self._chunks(decode, prefill)
        elif decode:
            self._repeat(decode, 1 if fresh else steps, plan.until_ns)
        else:
            self._sleep(plan.until_ns or self.now + NAP_NS)

    def _plan(self) -> Plan:
        state = self._state()
        try:
            plan = own_plan(self._policy.plan(state))
        except PluginError as error:
            raise self._broken(error.message) from None
        except BaseException as error:
            if not is_fault(error):
                raise
            raise self._broken(f"plan() raised {said(error)}") from error
        try:
            check_plan(plan, self._seqs.views, state)
            self._progress.check(plan, self.now, len(self._seqs.views))
        except PluginError as error:
            raise self._broken(error.message) from None
        counters = self.result.counters
        counters.plans += 1
        counters.replans += plan.tokens != self._last_tokens
        self._last_tokens = dict(plan.tokens)
        return plan

    def _state(self) -> EngineState:
        seqs, config = self._seqs, self.config
        seqs.estimate()
        decoding, cells = seqs.load()
        key = (max(decoding, 1), cells // max(decoding, 1) // BUCKET)
        costs = self._policy_costs.get(key)
        if costs is None:
            costs = self._policy_costs[key] = self._model.costs(key[0], key[1] * BUCKET, config.n_batch)
        return EngineState(
            now_ns=self.now,
            step=self.result.counters.steps,
            free_slots=seqs.cache.free,
            max_prefill=config.n_batch,
            n_slots=config.n_slots,
            free_cells=self._kv_tokens - seqs.cells_running(),
            costs=costs,
        )

    def _make_room(self, fitted: Fitted) -> int:
        """Give up retained prefixes, also those of whom the plan preempted. Returns the steps it may be repeated."""
        seqs = self._seqs
        free = self._kv_tokens - seqs.cells_running() - seqs.cache.retained()
        if free < fitted.wanted:
            freed, ns = seqs.cache.evict_retained(fitted.wanted - free, self.now)
            free += freed
            self.now += ns
        return fitted.steps(free)

    def _sleep(self, until_ns: int) -> None:
        start, arrival = self.now, self._feed.next_ns
        if arrival is not None and arrival + ORIGIN_NS < until_ns:
            self._wait()
        else:
            self.now = max(self.now, until_ns)
        self.result.counters.busy_ns -= self.now - start

    def _chunks(self, decode: list[SimSequence], prefill: list[tuple[SimSequence, int]]) -> None:
        """One step with prompt chunks."""
        self.now += self._timing.mixed(decode, prefill)
        self.result.counters.steps += 1
        self._advance(decode, 1, 0)
        for seq, n in prefill:
            if self._seqs.computed(seq, n, self.now) and seq.done:
                self._finish(seq)

    def _repeat(self, decode: list[SimSequence], max_steps: int, until_ns: int) -> None:
        """Decode until something changes: an end, an arrival, the plan's limits."""
        timing, counters = self._timing, self.result.counters
        groups = timing.groups(decode)
        left = min(seq.left for seq in decode)
        limit = min(left, max_steps) if max_steps else left
        arrival = self._feed.next_ns
        stop = EVER if arrival is None else arrival + ORIGIN_NS
        if until_ns:
            stop = min(stop, until_ns)
        done = 0
        while done < limit:
            ubatches, rebuilds = counters.ubatches, counters.rebuilds
            ns, k = timing.decode(groups)
            if k > 1:
                # Up to the first step that ends at or after `stop`.
                k = min(k, limit - done, max(-(-(stop - self.now) // ns), 1)) if self.config.batch_steps else 1
                counters.ubatches += (k - 1) * (counters.ubatches - ubatches)
                counters.rebuilds += (k - 1) * (counters.rebuilds - rebuilds)
            self.now += k * ns
            counters.steps += k
            done += k
            self._advance(decode, k, ns)
            if self.now >= stop:
                break

    def _advance(self, decode: list[SimSequence], k: int, ns: int) -> None:
        """``k`` tokens more for each, the last of them now, ``ns`` apart; who has all of its own has ended."""
        now = self.now
        for seq in decode:
            if k == 1:
                seq.token_ns.append(now)
            else:
                seq.token_ns.extend(range(now - (k - 1) * ns, now + 1, ns))
            view = seq.view
            view.generated += k
            view.cells += k
        for seq in decode:
            if seq.done:
                self._finish(seq)
