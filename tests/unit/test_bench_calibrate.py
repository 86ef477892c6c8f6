"""Which rounds are believed."""

from __future__ import annotations

from bench import calibrate

QUIET = {"hash_1": 1000.0, "hash_2": 2000.0, "copy": 9000.0, "decode_1": 100.0, "decode_2": 120.0}


def test_a_quiet_machine_has_no_faults() -> None:
    assert calibrate.faults(QUIET, QUIET) == []
    assert calibrate.faults({key: 0.91 * value for key, value in QUIET.items()}, QUIET) == []


def test_a_stolen_core_is_noticed() -> None:
    assert calibrate.faults(QUIET | {"hash_2": 1500.0}, QUIET) == ["hash_2 1500 of 2000"]
    assert calibrate.faults(QUIET | {"copy": 7000.0}, QUIET) == ["copy 7000 of 9000"]


def test_two_threads_slower_than_one_tell_of_a_spell() -> None:
    (fault,) = calibrate.faults(QUIET | {"decode_2": 54.0}, QUIET)
    assert "2 threads 54" in fault
    assert calibrate.faults(QUIET | {"decode_1": 100.0, "decode_2": 95.0}, QUIET) == []


def test_rounds_are_judged_by_the_best_calibration_of_the_run() -> None:
    slow = QUIET | {"hash_1": 850.0}
    assert calibrate.keep([(QUIET, QUIET), (QUIET, slow), (slow, QUIET)]) == [True, False, False]
    assert calibrate.keep([(slow, slow)]) == [True]  # nothing better was seen
    assert calibrate.keep([]) == []


def test_the_fixed_work_runs_and_gives_rates() -> None:
    assert calibrate.hash_rate(2, blocks=2) > 0
    assert calibrate.copy_rate(1 << 20) > 0


def test_jsonl_skips_what_is_not_json() -> None:
    assert calibrate.jsonl('\nmain: loading\n{"pl": 8, "speed_tg": 175.5}\n\nbye') == [{"pl": 8, "speed_tg": 175.5}]
