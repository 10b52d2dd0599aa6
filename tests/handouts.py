"""The assignments: which functions are cut, what is graded, and what a student is told.

A function is named by its file and its place in it: "tokenizer.Quantizer.encode". assignments.py
finds it in the source, and takes signature, docstring and the section's comment from there.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Assignment:
    number: int
    title: str
    bodies: tuple[str, ...]         # to be written
    give_aways: tuple[str, ...]     # would show how: compiled in the student's folder
    forbidden: tuple[str, ...]      # names that no body may use; the give-aways' are added
    points: dict[str, int]          # of each graded test, as pytest names it
    hours: str                      # a guess
    after: tuple[int, ...]          # assignments that it builds on
    text: str
    question: str

    @property
    def of(self) -> int:
        return sum(self.points.values())


TOKENIZER = "tests/test_tokenizer.py::"
TRANSFORMER = "tests/test_var.py::"
KERNELS = "tests/test_kernels.py::"
GRADED = "tests/test_graded.py::"
PARITY = "tests/test_parity.py::"
ONLY_TRITON = ("torch", "F", "math", "handle", "data", "numpy")    # of the interpreter: handles

LIST = [
    Assignment(
        number=1,
        title="A residual pyramid",
        bodies=("tokenizer.Quantizer.accumulate", "tokenizer.Quantizer.read",
                "tokenizer.Quantizer.encode", "tokenizer.Quantizer.decode"),
        give_aways=("tokenizer.Quantizer.teacher_inputs", "tokenizer.Quantizer.forward",
                    "tokenizer.Quantizer.start_from", "var.VAR.generate", "var.Known.tokens",
                    "reference.running_latents", "reference.read"),
        forbidden=(),
        points={
            TOKENIZER + "test_every_step_of_the_loop_is_numpys": 3,
            TOKENIZER + "test_every_pyramid_encodes_and_decodes": 1,
            TOKENIZER + "test_decode_of_encode_is_the_quantizers_own_output": 1,
            TOKENIZER + "test_the_residual_shrinks_with_every_scale": 1,
            GRADED + "test_areas_that_overlap_are_averaged_row_by_row": 1,
            GRADED + "test_the_first_maps_alone_are_decoded": 1,
            GRADED + "test_the_running_sum_is_computed_in_fp32_under_autocast": 1,
            PARITY + "test_tokenizer": 1,
        },
        hours="3-5",
        after=(),
        text="", question="",
    ),
    Assignment(
        number=2,
        title="The codebook loss",
        bodies=("tokenizer.Quantizer.forward",),
        give_aways=("tokenizer.Quantizer.encode", "tokenizer.Quantizer.decode",
                    "tokenizer.Quantizer.teacher_inputs", "tokenizer.Quantizer.start_from",
                    "var.VAR.generate", "var.Known.tokens", "reference.running_latents"),
        forbidden=(),
        points={
            TOKENIZER + "test_the_codebook_loss_and_its_gradients_are_numpys": 4,
            TOKENIZER + "test_gradients_pass_straight_through_to_the_encoder": 2,
            TOKENIZER + "test_decode_of_encode_is_the_quantizers_own_output": 1,
            TOKENIZER + "test_a_training_pass_keeps_residuals_without_their_graph_and_counts_hits": 2,
            TOKENIZER + "test_hits_do_not_depend_on_how_a_step_is_split": 1,
        },
        hours="3-5",
        after=(1,),
        text="", question="",
    ),
    Assignment(
        number=3,
        title="A living codebook",
        bodies=("tokenizer.Quantizer.start_from", "tokenizer.Quantizer.remember",
                "tokenizer.Quantizer.revive"),
        give_aways=("tokenizer.Quantizer.encode", "tokenizer.Quantizer.decode",
                    "tokenizer.Quantizer.teacher_inputs", "tokenizer.Quantizer.forward",
                    "var.VAR.generate", "var.Known.tokens"),
        forbidden=(),
        points={
            TOKENIZER + "test_the_first_codes_are_residuals_of_every_scale_alike": 3,
            TOKENIZER + "test_remember_is_a_running_average_of_the_hits_of_a_step": 2,
            TOKENIZER + "test_revive_moves_dead_codes_only_and_makes_them_new": 3,
            TOKENIZER + "test_hits_do_not_depend_on_how_a_step_is_split": 1,
            GRADED + "test_the_hits_and_residuals_of_all_processes_count": 1,
        },
        hours="3-5",
        after=(1, 2),
        text="", question="",
    ),
    Assignment(
        number=4,
        title="Teacher forcing",
        bodies=("tokenizer.Quantizer.teacher_inputs",),
        give_aways=("tokenizer.Quantizer.encode", "tokenizer.Quantizer.decode",
                    "tokenizer.Quantizer.forward", "tokenizer.Quantizer.start_from",
                    "var.VAR.generate", "reference.running_latents"),
        forbidden=(),
        points={
            TOKENIZER + "test_teacher_inputs_read_the_running_latent_of_coarser_scales_only": 3,
            TOKENIZER + "test_every_step_of_the_loop_is_numpys": 2,
            TOKENIZER + "test_every_pyramid_encodes_and_decodes": 1,
            TRANSFORMER + "test_cached_generation_equals_the_masked_forward": 3,
            PARITY + "test_tokenizer": 1,
        },
        hours="1-2",
        after=(1,),
        text="", question="",
    ),
    Assignment(
        number=5,
        title="The mask as a table",
        bodies=("kernels.KeyRanges.from_scales", "kernels.transposed_table",
                "kernels.attention_calls", "kernels.block_attention_torch"),
        give_aways=("kernels.obvious_attention", "reference.attention"),
        forbidden=(),
        points={
            GRADED + "test_the_table_of_scales": 2,
            GRADED + "test_a_token_sees_its_own_scale_at_least": 1,
            KERNELS + "test_the_transposed_table_is_the_transposed_mask": 2,
            KERNELS + "test_attention_and_its_gradients[torch]": 3,
            KERNELS + "test_attention_at_the_length_of_the_published_models[torch]": 1,
            KERNELS + "test_the_unused_end_of_a_cache_may_hold_anything[torch]": 1,
            KERNELS + "test_attention_names_what_it_cannot_take": 1,
            GRADED + "test_long_runs_of_queries_need_no_mask": 1,
        },
        hours="4-6",
        after=(),
        text="", question="",
    ),
    Assignment(
        number=6,
        title="The block",
        bodies=("var.Attention.project", "var.Block.forward", "var.Block.add_branch",
                "var.VAR.modulations"),
        give_aways=("reference.attention",),
        forbidden=(),
        points={
            TRANSFORMER + "test_attention_is_numpys": 3,
            TRANSFORMER + "test_a_block_is_what_it_says": 2,
            TRANSFORMER + "test_stochastic_depth_skips_whole_images_and_scales_the_others": 2,
            TRANSFORMER + "test_label_dropout_and_stochastic_depth_stop_in_eval": 1,
            GRADED + "test_what_the_class_does_to_each_layer": 1,
            TRANSFORMER + "test_cached_generation_equals_the_masked_forward": 1,
            PARITY + "test_transformer": 2,
        },
        hours="4-6",
        after=(),
        text="", question="",
    ),
    Assignment(
        number=7,
        title="Generation",
        bodies=("var.LayerCache.extend", "var.VAR.generate", "var.VAR.draw"),
        give_aways=("tokenizer.Quantizer.teacher_inputs",),
        forbidden=("forward",),
        points={
            GRADED + "test_a_cache_takes_its_room_once_and_gives_what_is_there": 1,
            TRANSFORMER + "test_cached_generation_equals_the_masked_forward": 3,
            TRANSFORMER + "test_guidance_grows_from_nothing_at_the_first_scale_to_cfg_at_the_last": 2,
            TRANSFORMER + "test_guidance": 1,
            TRANSFORMER + "test_one_scale_alone_generates": 1,
            TRANSFORMER + "test_an_interrupted_generation_leaves_nothing_behind": 1,
            GRADED + "test_no_guidance_does_not_pay_for_it": 1,
            GRADED + "test_draws_follow_their_own_generator_and_the_distribution": 1,
            GRADED + "test_tokens_that_are_known_are_read_by_the_next_scale": 1,
            PARITY + "test_transformer": 1,
        },
        hours="5-8",
        after=(4, 6),
        text="", question="",
    ),
    Assignment(
        number=8,
        title="Sampling",
        bodies=("kernels.sample_tokens_torch",),
        give_aways=("kernels.obvious_sampling", "kernels.ranked_within",
                    "kernels.sample_tokens_kernel", "reference.kept_probabilities"),
        forbidden=("sample_tokens", "sample_tokens_triton"),
        points={
            KERNELS + "test_a_draw_is_the_best_of_the_tokens_kept[torch]": 2,
            KERNELS + "test_both_faces_draw_the_same_token": 1,
            KERNELS + "test_top_k_keeps_k_whatever_their_sign_and_their_ties": 2,
            KERNELS + "test_top_p_keeps_what_holds_p_of_what_top_k_left": 2,
            KERNELS + "test_frequencies_follow_the_distribution": 1,
            KERNELS + "test_sampling_names_what_it_cannot_take": 1,
            GRADED + "test_drawing_changes_nothing_that_it_was_given": 1,
        },
        hours="3-5",
        after=(),
        text="", question="",
    ),
    Assignment(
        number=9,
        title="Adaptive layer norm in Triton",
        bodies=("kernels.normalise", "kernels.adaln_forward", "kernels.adaln_backward"),
        give_aways=("kernels.adaln_torch", "kernels.obvious_adaln", "reference.adaln"),
        forbidden=ONLY_TRITON,
        points={
            KERNELS + "test_adaln_and_its_gradients[triton]": 7,
            KERNELS + "test_adaln_sums_gradients_in_one_order": 1,
            TRANSFORMER + "test_both_faces_give_the_same_loss_and_gradients": 2,
        },
        hours="4-6",
        after=(),
        text="", question="",
    ),
    Assignment(
        number=10,
        title="The nearest code in Triton",
        bodies=("kernels.nearest_code_kernel",),
        give_aways=("kernels.nearest_code_torch", "kernels.obvious_nearest_code",
                    "reference.distances"),
        forbidden=ONLY_TRITON,
        points={
            KERNELS + "test_nearest_code_is_nearest[triton]": 4,
            KERNELS + "test_of_equally_near_codes_the_first_wins_wherever_it_is[triton]": 2,
            KERNELS + "test_nearest_code_at_the_published_size[triton]": 2,
            KERNELS + "test_nearest_code_stays_in_fp32_under_autocast": 1,
        },
        hours="3-5",
        after=(9,),
        text="", question="",
    ),
    Assignment(
        number=11,
        title="Attention in Triton: forward",
        bodies=("kernels.plan_tiles", "kernels.attention_forward"),
        give_aways=("kernels.attention_backward_q", "kernels.attention_backward_kv",
                    "kernels.attention_calls", "kernels.block_attention_torch",
                    "kernels.obvious_attention", "reference.attention"),
        forbidden=ONLY_TRITON,
        points={
            KERNELS + "test_attention_and_its_gradients[triton]": 4,
            KERNELS + "test_attention_at_the_length_of_the_published_models[triton]": 2,
            KERNELS + "test_tiles_out_of_range_are_not_visited": 1,
            KERNELS + "test_the_unused_end_of_a_cache_may_hold_anything[triton]": 1,
            KERNELS + "test_the_tiles_that_are_counted_and_drawn_are_those_that_are_visited": 2,
        },
        hours="6-10",
        after=(5, 10),
        text="", question="",
    ),
    Assignment(
        number=12,
        title="Attention in Triton: backward",
        bodies=("kernels.attention_backward_q", "kernels.attention_backward_kv"),
        give_aways=("kernels.attention_calls", "kernels.block_attention_torch",
                    "kernels.obvious_attention", "reference.attention"),
        forbidden=ONLY_TRITON,
        points={
            KERNELS + "test_attention_and_its_gradients[triton]": 6,
            KERNELS + "test_attention_at_the_length_of_the_published_models[triton]": 2,
            TRANSFORMER + "test_both_faces_give_the_same_loss_and_gradients": 2,
        },
        hours="6-10",
        after=(11,),
        text="", question="",
    ),
    Assignment(
        number=13,
        title="In-painting",
        bodies=("var.Known.put", "var.Known.tokens", "var.Known.places", "sample.fill_holes"),
        give_aways=("tokenizer.Quantizer.encode", "tokenizer.Quantizer.forward",
                    "tokenizer.Quantizer.start_from"),
        forbidden=(),
        points={
            TRANSFORMER + "test_which_tokens_are_known": 2,
            TRANSFORMER + "test_the_closed_loop_codes_what_is_missing_and_the_open_loop_the_images_"
                          "own_tokens": 2,
            TRANSFORMER + "test_in_painting_keeps_what_is_known_and_the_closed_loop_keeps_it_"
                          "better": 2,
            GRADED + "test_a_hole_is_filled_from_its_border": 2,
            GRADED + "test_filling_reads_nothing_in_the_hole_and_reaches_its_middle": 1,
            GRADED + "test_all_or_nothing_known_ends": 1,
        },
        hours="3-5",
        after=(1, 7),
        text="", question="",
    ),
]

ASSIGNMENTS = {each.number: each for each in LIST}
