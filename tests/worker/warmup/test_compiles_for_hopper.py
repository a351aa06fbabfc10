"""The interpreter runs what compilers may refuse: every kernel is compiled for Hopper, too."""

from tests.worker.warmup.compiling import run_compiling

LAUNCHED = {
    "_expand_kernel",
    "plan_kernel",
    "small_plan_kernel",
    "stream_plan_kernel",
    "_vector_kernel",
    "_matrix_kernel",
    "_gated_kernel",
    "_packed_vector_kernel",
    "_packed_matrix_kernel",
    "_packed_group_kernel",
    "_unpack_kernel",
    "_rows_kernel",
    "_act_and_mul_kernel",
    "_add_normed_kernel",
    "_rope_and_cache_kernel",
    "prefill_kernel",
    "long_kernel",
    "decode_kernel",
    "small_step_kernel",
    "stream_kernel",
    "combine_kernel",
    "shared_prefix_kernel",
    "_route_kernel",
    "_sort_kernel",
    "_vector_gate_up_kernel",
    "_vector_down_kernel",
    "_grouped_kernel",
    "_combine_kernel",
    "_reduce_kernel",
    "_add_rows_kernel",
    "segments_kernel",
    "_choose_kernel",
}


def test_every_kernel_as_it_is_launched() -> None:
    assert run_compiling("compile_launches.py").keys() == LAUNCHED
