"""What a plan may say, and how parameters are declared, checked and changed."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from policy_support import moment, seq

from mullama.errors import InvalidRequest, PluginError
from mullama.scheduling import Batching, Fcfs, Param, Plan, Policy, SeqView, check_plan
from mullama.scheduling.priority import Priority
from mullama.types import Preempt, SeqState

WAITING, PREFILL, DECODE, PREEMPTED = SeqState.WAITING, SeqState.PREFILL, SeqState.DECODE, SeqState.PREEMPTED

# -- check_plan --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "known", "reason"),
    [
        (Plan({9: 1}), [seq(1)], "does not exist"),
        (Plan({1: 2}), [seq(1, DECODE)], "one token a step"),
        (Plan({1: 0}), [seq(1, DECODE)], "one token a step"),
        (Plan({1: 2}), [seq(1, PREEMPTED, 0)], "one token a step"),
        (Plan({1: 11}), [seq(1)], "10 prompt tokens left"),
        (Plan({1: 0}), [seq(1, PREFILL)], "10 prompt tokens left"),
        (Plan({1: -1}), [seq(1, PREFILL)], "10 prompt tokens left"),
        (Plan({1: 11}), [seq(1, PREEMPTED, 10)], "10 prompt tokens left"),
        (Plan({1: 1.0}), [seq(1, DECODE)], "a whole number is needed"),  # type: ignore[dict-item]
        (Plan({1: True}), [seq(1, DECODE)], "a whole number is needed"),
        (Plan({1: 1}), [seq(1, SeqState.DONE)], "cannot compute"),
        (Plan({1: 1, 2: 1, 3: 1}), [seq(1), seq(2), seq(3)], "3 sequences, 2 slots are free"),
        (Plan({1: 1, 2: 1, 3: 1}), [seq(1), seq(2), seq(3, PREEMPTED, 0)], "3 sequences, 2 slots are free"),
        (Plan({1: 10, 2: 10}), [seq(1), seq(2)], "16 are allowed"),
        (Plan(preempt={9: Preempt.AUTO}), [seq(1)], "preempts sequence 9, which does not exist"),
        (Plan(preempt={1: Preempt.AUTO}), [seq(1)], "is waiting and holds no slot"),
        (Plan(preempt={1: Preempt.AUTO}), [seq(1, PREEMPTED)], "is preempted and holds no slot"),
        (Plan({1: 1}, preempt={1: Preempt.AUTO}), [seq(1, DECODE)], "and gives it tokens"),
        (Plan(preempt={1: "drop"}), [seq(1, DECODE)], "auto, swap, recompute"),  # type: ignore[dict-item]
    ],
)
def test_nonsense_is_named(plan: Plan, known: list[SeqView], reason: str) -> None:
    with pytest.raises(PluginError, match=reason):
        check_plan(plan, {one.id: one for one in known}, moment(free_slots=2, max_prefill=16))


def test_a_preempted_slot_can_be_given_at_once() -> None:
    seqs = {1: seq(1, DECODE), 2: seq(2), 3: seq(3, PREFILL, 5), 4: seq(4, PREEMPTED, 0)}
    check_plan(Plan({2: 10, 4: 1}, preempt={1: Preempt.SWAP, 3: Preempt.RECOMPUTE}), seqs, moment(free_slots=0))


def test_what_a_view_says_of_itself() -> None:
    assert [seq(1, state).is_queued for state in (WAITING, PREEMPTED, PREFILL, DECODE)] == [True, True, False, False]
    assert [seq(1, state).is_running for state in (WAITING, PREEMPTED, PREFILL, DECODE)] == [False, False, True, True]
    assert seq(1, DECODE, generated=20).tokens_left == 30
    assert seq(1, DECODE, generated=51).tokens_left == 0


# -- parameters --------------------------------------------------------------------------------------------------


class Knobs(Policy):
    PARAMS: ClassVar[tuple[Param, ...]] = (
        Param("size", 8, "how many", minimum=1, maximum=64),
        Param("share", 0.5, "how much", minimum=0),
        Param("quiet", False, "whether"),
        Param("way", "up", "where to", choices=("up", "down")),
        Param("label", "", "what to call it"),
    )
    size: int
    share: float


def test_defaults_and_values() -> None:
    assert Knobs().params() == {"size": 8, "share": 0.5, "quiet": False, "way": "up", "label": ""}
    assert Knobs(size=9, way="down").params() == {"size": 9, "share": 0.5, "quiet": False, "way": "down", "label": ""}
    assert Knobs(size=9).size == 9


def test_texts_are_converted_by_the_type_of_the_default() -> None:
    found = Knobs(size=" 12 ", share="2", quiet="yes", way="down", label="7").params()
    assert found == {"size": 12, "share": 2.0, "quiet": True, "way": "down", "label": "7"}
    assert type(found["share"]) is float
    assert Knobs(share=2).params()["share"] == 2.0
    assert Knobs(quiet="OFF").params()["quiet"] is False


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"size": 0}, "size must be a whole number from 1 to 64, not 0"),
        ({"size": 65}, "from 1 to 64"),
        ({"size": 2.0}, "from 1 to 64"),
        ({"size": True}, "from 1 to 64"),
        ({"size": None}, "from 1 to 64"),
        ({"size": "many"}, "from 1 to 64, not 'many'"),
        ({"share": -0.1}, "share must be a number, 0 or more"),
        ({"share": float("nan")}, "0 or more"),
        ({"share": "inf"}, "0 or more"),
        ({"share": 10**400}, "0 or more"),
        ({"share": []}, "0 or more"),
        ({"quiet": 1}, "quiet must be true or false"),
        ({"quiet": "perhaps"}, "true or false"),
        ({"way": "left"}, "way must be up, down, not 'left'"),
        ({"label": 3}, "label must be a text"),
        ({"sise": 3}, "Knobs has no parameter 'sise'; its parameters are size, share, quiet, way, label"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(wrong: dict[str, Any], right: str) -> None:
    with pytest.raises(InvalidRequest, match=right) as error:
        Knobs(**wrong)
    assert error.value.param == f"params.{next(iter(wrong))}"
    assert error.value.status == 400


def test_changes_are_made_together_or_not_at_all() -> None:
    policy = Knobs(size=3)
    with pytest.raises(InvalidRequest):
        policy.configure(size=4, share=-1)
    assert policy.params()["size"] == 3
    policy.configure(size="4", share=1)
    assert (policy.size, policy.share) == (4, 1.0)


def test_a_subclass_has_its_own_name() -> None:
    class Mine(Fcfs):
        """Not fcfs."""

    assert (Mine().name, Fcfs().name, Knobs.name) == ("Mine", "fcfs", "Knobs")
    with pytest.raises(InvalidRequest, match="Mine has no parameter 'x'"):
        Mine(x=1)


def test_a_policy_is_its_ordering_rule() -> None:
    """What a user writes who wants no more than another order."""

    class ShortPromptsFirst(Batching):
        def rank(self, seq: SeqView) -> tuple[float, ...]:
            return seq.prompt_tokens, seq.id

    policy = ShortPromptsFirst(prefill_budget=100)
    for seq_id, tokens in ((1, 90), (2, 5), (3, 50)):
        policy.add(seq(seq_id, left=tokens, prompt_tokens=tokens))
    assert policy.plan(moment()).tokens == {2: 5, 3: 50, 1: 45}


def test_changed_parameters_hold_in_the_next_plan() -> None:
    policy = Priority()
    for seq_id in (1, 2, 3):
        policy.add(seq(seq_id))
    assert sum(policy.plan(moment()).tokens.values()) == 30
    policy.configure(prefill_budget=12, chunk=8)
    assert policy.plan(moment()).tokens == {1: 8, 2: 4}
