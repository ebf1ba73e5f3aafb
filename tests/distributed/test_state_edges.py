"""Rare states and refusals, on real engines on two real ranks; see drivers/state_edges.py."""

from __future__ import annotations

import json

import pytest

from tests.ranks import ROOT, run_ranks

pytestmark = pytest.mark.ranks

DRIVER = ROOT / "tests" / "distributed" / "drivers" / "state_edges.py"
CHECKS = (
    "a_parameter_without_optimizer_state_keeps_having_none",
    "a_parameter_that_was_frozen_later_keeps_its_optimizer_state",
    "a_parameter_may_be_frozen_on_one_side_and_trained_on_the_other",
    "weights_that_are_not_the_cast_master_come_back",
    "all_ranks_use_the_restored_weights",
    "a_restore_rebinds_no_tensor_of_deepspeed",
    "deepspeeds_accessors_see_the_restored_state",
    "two_step_counts_do_not_fit_one_flat_partition",
    "another_model_is_refused_with_the_parameters_that_differ",
    "the_size_of_a_save_is_known_before_the_first_step",
    "a_refused_state_changes_nothing",
    "an_optimizer_state_that_is_not_known_is_named",
    "what_is_not_supported_is_refused_by_name",
    "state_that_is_elsewhere_or_moves_is_neither_described_nor_filled",
    "secondary_shards_of_hpz_do_not_outlive_a_restore",
    "partitions_reach_the_other_ranks_through_memory",
    "all_ranks_fall_back_where_one_has_no_memory_to_share",
)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("edges") / "verdicts.json"
    run_ranks(2, DRIVER, str(out), timeout_s=900.0)
    found: dict[str, str] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_that(verdicts: dict[str, str], check: str) -> None:
    assert verdicts[check] == "ok"


def test_every_check_of_the_driver_is_listed(verdicts: dict[str, str]) -> None:
    assert sorted(verdicts) == sorted(CHECKS)
