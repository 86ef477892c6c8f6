"""LoRA adapters in the core: what they change, whom they change, and that they can go again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import adapters
import pytest
from core_support import Driver, greedy, sampled

from mullama import abi
from mullama._core import Adapter, Model
from mullama.errors import InvalidRequest, ModelLoadError
from mullama.types import SamplingParams

Load = Callable[..., Adapter]
ADAPTER_GONE = 5  # CORE_ADAPTER of _core/compute/guard.h
PROMPT = "It was a dark and stormy night; the rain fell in torrents."


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Iterator[Model]:
    """A model of its own, so that a test's adapters are all there are."""
    model = Model(tiny_model())
    yield model
    model.close()  # raises when an adapter or a context still uses it


@pytest.fixture
def load(model: Model, tmp_path: Path) -> Iterator[Load]:
    """``load(seed)``: a random adapter on the model."""
    made: list[Adapter] = []

    def get(seed: int = 1, **options: object) -> Adapter:
        path = adapters.build(tmp_path / f"{len(made)}.gguf", Path(model.path), seed=seed, **options)  # type: ignore[arg-type]
        made.append(Adapter(model, path))
        return made[-1]

    yield get
    for adapter in made:
        adapter.close()


@pytest.fixture
def driver(model: Model, load: Load, make_core: Callable[..., Driver]) -> Iterator[Driver]:
    """A Core with four slots; closed before the adapters are."""
    driver = make_core(model)
    yield driver
    assert driver.core.audit() == []
    driver.close()


def test_facts(model: Model, load: Load) -> None:
    adapter = load()
    assert adapter.model is model
    assert adapter.n_matrices == 2 * len(adapters.TARGETS)
    # Rank 4 of 32-bit numbers: q and v of 64 by 64 and 64 by 32, up of 64 by 128, in two layers.
    assert adapter.n_bytes >= 2 * 4 * 4 * (64 + 64 + 64 + 32 + 64 + 128)
    assert adapter.n_host_bytes == adapter.n_bytes
    adapter.close()


def test_scale_zero_is_the_bare_model(driver: Driver, load: Load) -> None:
    adapter = load()
    bare = driver.generate(PROMPT, greedy())
    assert driver.generate(PROMPT, greedy(), adapters=[(adapter, 0.0)]).tokens == bare.tokens
    assert driver.core.counters_dict()["adapter_switches"] == 0


def test_an_adapter_changes_the_answer_and_its_absence_changes_it_back(driver: Driver, load: Load) -> None:
    adapter = load()
    bare = driver.generate(PROMPT, greedy()).tokens
    changed = driver.generate(PROMPT, greedy(), adapters=[(adapter, 1.0)]).tokens
    assert changed != bare
    assert driver.generate(PROMPT, greedy()).tokens == bare
    assert driver.generate(PROMPT, greedy(), adapters=[(adapter, 1.0)]).tokens == changed
    assert driver.generate(PROMPT, greedy(), adapters=[(adapter, 0.5)]).tokens != changed


def test_two_adapters_together_differ_from_each_alone(driver: Driver, load: Load) -> None:
    one, two = load(1), load(2)
    found = [
        driver.generate(PROMPT, greedy(), adapters=pairs).tokens
        for pairs in ([(one, 1.0)], [(two, 1.0)], [(one, 1.0), (two, 1.0)], [(two, 1.0), (one, 1.0)])
    ]
    assert found[2] == found[3], "the order in which they are named does not matter"
    assert len({tuple(tokens) for tokens in found}) == 3


def test_sequences_side_by_side_give_what_each_gives_alone(driver: Driver, load: Load) -> None:
    one, two = load(1), load(2)
    sets = [[(one, 1.0)], [(two, 1.0)], [], [(one, 0.5), (two, 0.25)]]
    prompts = [f"{PROMPT} {n}" for n in range(4)]
    alone = [
        driver.generate(prompt, greedy(), adapters=pairs).tokens for prompt, pairs in zip(prompts, sets, strict=True)
    ]
    before = driver.core.counters_dict()
    handles = [
        driver.open(prompt, greedy(), slot=slot, adapters=pairs)
        for slot, (prompt, pairs) in enumerate(zip(prompts, sets, strict=True))
    ]
    driver.finish_all()
    assert [driver.outputs[handle].tokens for handle in handles] == alone
    after = driver.core.counters_dict()
    # 24 tokens each, the first of them by the prompt's last chunk: 23 steps of four sets.
    assert after["adapter_ubatches"] - before["adapter_ubatches"] == 3 * 23
    assert after["split_ubatches"] == before["split_ubatches"]


def test_equal_sets_share_a_ubatch(driver: Driver, load: Load) -> None:
    """Slots 0 and 2 have one set and 1 and 3 another, so that a gap-free range never has one set only."""
    one, two = load(1), load(2)
    pairs = [[(one, 1.0)], [(two, 1.0)], [(one, 1.0)], [(two, 1.0)]]
    alone = [driver.generate(f"{PROMPT} {n}", greedy(), adapters=pairs[n]).tokens for n in range(4)]
    before = driver.core.counters_dict()
    handles = [driver.open(f"{PROMPT} {n}", greedy(), slot=n, adapters=pairs[n]) for n in range(4)]
    driver.prefill()
    driver.step()
    after = driver.core.counters_dict()
    assert after["adapter_ubatches"] - before["adapter_ubatches"] == 1
    assert after["ubatches"] - before["ubatches"] == 4 + 4  # a prompt chunk a slot; one of each slot alone in its range
    driver.finish_all()
    assert [driver.outputs[handle].tokens for handle in handles] == alone


def test_equal_sets_in_a_range_are_one_ubatch(driver: Driver, load: Load) -> None:
    one = load(1)
    for slot in range(4):
        driver.open(f"{PROMPT} {slot}", greedy(), slot=slot, adapters=[(one, 1.0)] if slot < 2 else [])
    driver.prefill()
    before = driver.core.counters_dict()["ubatches"]
    driver.step()
    assert driver.core.counters_dict()["ubatches"] - before == 2
    driver.finish_all()


@pytest.mark.parametrize("unified", [False, True])
def test_prompts_and_answers_mixed(model: Model, load: Load, make_core: Callable[..., Driver], unified: bool) -> None:
    """A prompt of one set comes in chunks while sequences of other sets decode; nobody's tokens change."""
    one, two = load(1), load(2)
    sets = [[(one, 1.0)], [], [(two, 1.0)], [(one, 1.0)]]
    prompts = [PROMPT * (1 + n) for n in range(4)]
    driver = make_core(model, unified_cells=4 * 512 if unified else 0)
    alone = [
        driver.generate(prompt, greedy(), chunk=16, adapters=pairs).tokens
        for prompt, pairs in zip(prompts, sets, strict=True)
    ]
    handles = []
    for slot in (0, 1):
        handles.append(driver.open(prompts[slot], greedy(), slot=slot, adapters=sets[slot]))
    driver.prefill(16)
    for slot in (2, 3):
        handles.append(driver.open(prompts[slot], greedy(), slot=slot, adapters=sets[slot]))
    left = {slot: len(driver.core.slot_info(slot)[3]) for slot in (2, 3)}
    while any(left.values()):
        chunks = [(slot, min(16, n)) for slot, n in left.items() if n]
        left = {slot: n - min(16, n) for slot, n in left.items()}
        decoding = [slot for slot in (0, 1) if driver.core.states()[slot] == abi.DECODE]
        driver.core.run(decoding, chunks, 1)
        driver.check_law()
        driver.collect()
    driver.finish_all()
    assert [driver.outputs[handle].tokens for handle in handles] == alone
    driver.close()


def test_sampling_with_an_adapter_is_reproducible(driver: Driver, load: Load) -> None:
    pairs = [(load(), 1.0)]
    first = driver.generate(PROMPT, sampled(), adapters=pairs).tokens
    assert driver.generate(PROMPT, sampled(), adapters=pairs).tokens == first


def test_a_preempted_sequence_keeps_its_adapters(driver: Driver, load: Load) -> None:
    adapter = load()
    alone = driver.generate(PROMPT, greedy(), adapters=[(adapter, 1.0)]).tokens
    for save in (True, False):
        handle = driver.open(PROMPT, greedy(), adapters=[(adapter, 1.0)])
        driver.prefill()
        driver.step(5)
        parked = driver.core.preempt(0, save=save)
        driver.generate(PROMPT, greedy(4))
        driver.core.drop_adapters()
        with pytest.raises(RuntimeError, match="in use"):
            adapter.close()  # the parked sequence has it
        driver.core.resume(1, parked)
        driver.finish_all()
        assert driver.outputs[handle].tokens == alone


def test_unloading_is_refused_while_a_sequence_or_the_context_has_it(driver: Driver, load: Load) -> None:
    adapter = load()
    handle = driver.open(PROMPT, greedy(), adapters=[(adapter, 1.0)])
    driver.prefill()
    with pytest.raises(RuntimeError, match="in use"):
        adapter.close()
    driver.finish_all()
    assert driver.outputs[handle].reason == "length"
    with pytest.raises(RuntimeError, match="in use"):
        adapter.close()
    driver.core.drop_adapters()
    adapter.close()
    adapter.close()
    with pytest.raises(ValueError, match="closed"):
        driver.open(PROMPT, greedy(), adapters=[(adapter, 1.0)])
    assert driver.generate(PROMPT, greedy()).reason == "length"


def test_a_retained_prefix_holds_no_adapter(driver: Driver, load: Load) -> None:
    adapter = load()
    driver.generate(PROMPT, greedy(), retain=True, adapters=[(adapter, 1.0)])
    assert driver.core.retained(0)[0] > 0
    driver.core.drop_adapters()
    adapter.close()  # no set holds it


def test_a_cancelled_sequence_lets_go(driver: Driver, load: Load) -> None:
    adapter = load()
    driver.open(PROMPT, greedy(), adapters=[(adapter, 1.0)])
    driver.prefill()
    driver.core.cancel(0)
    driver.core.drop_adapters()
    adapter.close()  # no set holds it


def test_a_sequence_goes_on_with_what_its_adapter_became(driver: Driver, load: Load, model: Model) -> None:
    """As after a change of weights; here the twin is of other numbers, so that it shows."""
    one, two = load(1), load(2)
    alone = driver.generate(PROMPT, greedy(), adapters=[(one, 1.0)]).tokens
    handle = driver.open(PROMPT, greedy(), adapters=[(one, 1.0)])
    driver.prefill()
    driver.step(3)
    driver.core.drop_adapters()
    one.exchange(two)
    driver.finish_all()
    changed = driver.outputs[handle].tokens
    assert changed[:4] == alone[:4] and changed != alone
    driver.core.drop_adapters()
    one.exchange(two)
    assert driver.generate(PROMPT, greedy(), adapters=[(one, 1.0)]).tokens == alone


def test_an_adapter_that_is_on_no_model_computes_nothing(driver: Driver, load: Load, model: Model) -> None:
    one, bare = load(1), driver.generate(PROMPT, greedy()).tokens
    alone = driver.generate(PROMPT, greedy(), adapters=[(one, 1.0)]).tokens
    handle = driver.open(PROMPT, greedy(), adapters=[(one, 1.0)])
    driver.prefill()
    driver.core.drop_adapters()
    one.leave()
    one.leave()
    assert not one.is_on
    with pytest.raises(RuntimeError, match="in use"):
        one.close()
    with pytest.raises(ValueError, match="closed or is of another model"):
        driver.open(PROMPT, greedy(), slot=1, adapters=[(one, 1.0)])
    driver.step()
    assert (driver.outputs[handle].reason, driver.outputs[handle].error) == ("error", ADAPTER_GONE)
    driver.core.close_slot(0)
    assert driver.generate(PROMPT, greedy()).tokens == bare
    one.exchange(load(1))
    assert one.is_on
    assert driver.generate(PROMPT, greedy(), adapters=[(one, 1.0)]).tokens == alone
    gone = load(2)
    gone.close()
    with pytest.raises(RuntimeError, match="closed"):
        one.exchange(gone)


def test_reference_computations_do_not_depend_on_neighbours(
    model: Model, load: Load, make_core: Callable[..., Driver]
) -> None:
    """Sequences of one set share a product: its columns are then more than one."""
    one = load(1)
    driver = make_core(model, reference=True)
    prompts = [list(PROMPT[i:].encode()) for i in range(4)]
    alone = [driver.generate(prompt, greedy(40), adapters=[(one, 1.0)]).text for prompt in prompts]
    handles = [driver.open(prompt, greedy(40), slot=slot, adapters=[(one, 1.0)]) for slot, prompt in enumerate(prompts)]
    driver.finish_all()
    assert [driver.outputs[handle].text for handle in handles] == alone
    driver.close()


def test_leak_counters(model: Model, load: Load, make_core: Callable[..., Driver]) -> None:
    """What many requests with many sets leave behind is nothing."""
    found = [load(n) for n in range(3)]
    driver = make_core(model)
    for n in range(30):
        pairs = [(found[n % 3], 1.0), (found[(n + 1) % 3], 0.1 * n)]
        driver.open(PROMPT, greedy(3), slot=n % 4, adapters=pairs)
        if n % 4 == 3:
            driver.finish_all(retain=n % 8 == 3)
        if n % 4 == 3:
            for slot in range(4):
                if driver.core.retained(slot)[0]:
                    driver.core.evict(slot)
    driver.finish_all()
    driver.core.drop_adapters()
    for adapter in found:
        adapter.close()  # no set holds it
    driver.close()


def test_a_model_is_not_closed_under_its_adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = Model(tiny_model())
    adapter = Adapter(model, adapters.build(tmp_path / "a.gguf", tiny_model()))
    with pytest.raises(RuntimeError, match="adapter"):
        model.close()
    del adapter  # freed without close
    gc.collect()
    model.close()


def test_closing_a_core_with_running_sequences_frees_the_adapters(
    model: Model, load: Load, make_core: Callable[..., Driver]
) -> None:
    adapter = load()
    driver = make_core(model)
    driver.open(PROMPT, greedy(), adapters=[(adapter, 1.0)])
    driver.prefill()
    driver.close()
    adapter.close()  # no set holds it


def test_an_adapter_of_another_model_is_refused(
    driver: Driver, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = Model(tiny_model())
    adapter = Adapter(other, adapters.build(tmp_path / "a.gguf", tiny_model()))
    with pytest.raises(ValueError, match="another model"):
        driver.open(PROMPT, greedy(), adapters=[(adapter, 1.0)])
    adapter.close()
    other.close()


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_are_finite(driver: Driver, load: Load, scale: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        driver.open(PROMPT, greedy(), adapters=[(load(), scale)])


def test_an_adapter_is_named_once(driver: Driver, load: Load) -> None:
    adapter = load()
    with pytest.raises(ValueError, match="twice"):
        driver.open(PROMPT, greedy(), adapters=[(adapter, 1.0), (adapter, 0.5)])


def test_bad_parameters_leave_no_set_behind(driver: Driver, load: Load) -> None:
    adapter = load()
    with pytest.raises(InvalidRequest):
        driver.open(PROMPT, SamplingParams(temperature=-1), adapters=[(adapter, 1.0)])
    adapter.close()  # no set holds it


def test_what_llama_cpp_refuses(model: Model, tmp_path: Path) -> None:
    base = Path(model.path)
    with pytest.raises(ModelLoadError, match="no such file"):
        Adapter(model, tmp_path / "nothing.gguf")
    with pytest.raises(ModelLoadError, match="arch"):
        Adapter(model, adapters.build(tmp_path / "arch.gguf", base, arch="gemma3"))
    with pytest.raises(ModelLoadError, match="adapter"):
        Adapter(model, adapters.build(tmp_path / "type.gguf", base, general_type="model"))
    with pytest.raises(ModelLoadError, match="without weights"):
        vocab = Model(base, vocab_only=True)
        try:
            Adapter(vocab, adapters.build(tmp_path / "a.gguf", base))
        finally:
            vocab.close()


@pytest.mark.parametrize("arch", ["gemma3", "lfm2"])
def test_other_memories(
    arch: str, tiny_model: Callable[..., Path], tmp_path: Path, make_core: Callable[..., Driver]
) -> None:
    """A sliding window, and a hybrid of attention and state."""
    model = Model(tiny_model(arch))
    adapter = Adapter(model, adapters.build(tmp_path / "a.gguf", tiny_model(arch)))
    driver = make_core(model)
    sets = [[(adapter, 1.0)], [], [(adapter, 1.0)]]
    alone = [driver.generate(PROMPT, greedy(), adapters=pairs).tokens for pairs in sets]
    assert alone[0] == alone[2] != alone[1]
    handles = [driver.open(PROMPT, greedy(), slot=n, adapters=pairs) for n, pairs in enumerate(sets)]
    driver.finish_all()
    assert [driver.outputs[handle].tokens for handle in handles] == alone
    driver.close()
    adapter.close()
    model.close()
