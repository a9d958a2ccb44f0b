//! What must not change a result, on the CPU.

mod common;

use common::Setup;

const TOLERANCE: f32 = 1e-4;

#[test]
fn chunks_of_any_size_equal_the_whole_prompt() {
    common::equalities::chunks_of_any_size_equal_the_whole_prompt(Setup::default(), TOLERANCE);
}

#[test]
fn both_forms_of_latent_attention_agree() {
    common::equalities::both_forms_of_latent_attention_agree(Setup::default(), TOLERANCE);
}

#[test]
fn places_of_blocks_do_not_matter() {
    common::equalities::places_of_blocks_do_not_matter(Setup::default());
}

#[test]
fn a_batch_of_32_equals_one_by_one() {
    common::equalities::a_batch_of_32_equals_one_by_one(Setup::default(), TOLERANCE);
}

#[test]
fn a_preempted_request_goes_on_as_if_undisturbed() {
    common::equalities::a_preempted_request_goes_on_as_if_undisturbed(Setup::default());
}

#[test]
fn a_plan_without_effect_runs_nothing() {
    common::equalities::a_plan_without_effect_runs_nothing(Setup::default());
}

#[test]
fn the_same_session_has_the_same_digests_and_another_seed_has_not() {
    common::equalities::the_same_session_has_the_same_digests_and_another_seed_has_not(
        Setup::default(),
    );
}

#[test]
fn a_shared_prefix_equals_a_cold_start() {
    common::equalities::a_shared_prefix_equals_a_cold_start(Setup::default(), TOLERANCE);
}

#[test]
fn blocks_behind_the_cache_come_back_to_the_bit() {
    for kv_dtype in [engine::KvDtype::F32, engine::KvDtype::Bf16] {
        common::behind::blocks_come_back_to_the_bit(Setup { kv_dtype, ..Setup::default() });
    }
}

#[test]
fn steps_that_run_ahead_change_nothing() {
    common::ahead::run_ahead_changes_nothing(Setup::default(), false);
}
