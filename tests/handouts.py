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
    quoted: tuple[str, ...]         # what bodies and graded tests use beside them: told, too
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
        bodies=("tokenizer.Quantizer.add", "tokenizer.Quantizer.read",
                "tokenizer.Quantizer.encode", "tokenizer.Quantizer.decode"),
        give_aways=("tokenizer.Quantizer.teacher_inputs", "tokenizer.Quantizer.forward",
                    "tokenizer.Quantizer.start_from", "var.VAR.generate", "sample.Known.tokens",
                    "tokenizer.averaged", "reference.running_latents", "reference.read"),
        forbidden=(),
        quoted=("tokenizer.Quantizer.initial", "tokenizer.Quantizer.accumulate",
                "tokenizer.Quantizer.nearest", "tokenizer.Quantizer.split",
                "devices.fp32_convolutions", "kernels.nearest_code"),
        points={
            TOKENIZER + "test_every_step_of_the_loop_is_numpys": 3,
            TOKENIZER + "test_every_pyramid_encodes_and_decodes": 1,
            TOKENIZER + "test_decode_of_encode_is_the_quantizers_own_output": 1,
            TOKENIZER + "test_the_residual_shrinks_with_every_scale": 1,
            GRADED + "test_areas_that_overlap_are_averaged_row_by_row": 1,
            GRADED + "test_the_first_maps_alone_are_decoded": 1,
            GRADED + "test_neighbouring_scales_share_a_phi": 1,
            GRADED + "test_the_running_sum_is_computed_in_fp32_under_autocast": 1,
            PARITY + "test_tokenizer": 1,
            GRADED + "test_gradients_pass_through_a_sum_to_all_that_is_in_it": 1,
            GRADED + "test_what_the_quantizer_makes_is_where_its_inputs_are": 1,
            GRADED + "test_each_map_is_compared_and_added_once": 1,
            GRADED + "test_one_image_at_one_scale_is_still_a_batch": 1,
        },
        hours="3-5",
        after=(),
        text="""
            The tokenizer writes an image as token maps, from 1 x 1 up to S x S, each of which
            corrects the sum of those before it. Everything in VAR that is a loop over scales is a
            loop over two steps: `accumulate` adds the codes of one scale to the running latent
            f_hat, by way of `add`; `read` looks at a latent at the size of one scale. You write
            `add`, `read` and the first two loops.

            Hints. Print the shape after every line and hold it to the comment. Codes come as [B, l,
            C] and images are [B, C, s, s]: a `reshape` between the two compiles, runs, and is
            wrong. Upsampling is bicubic, averaging is over areas; phi is called like a function,
            and which phi serves which scale stands in `phi_of_scale`. `decode` also takes the first
            few maps alone. Compute outside of autocast, in the dtype of what you are given (fp32 in
            the program, float64 in most tests). A sum is a new tensor: training fails if
            `add` changes f_hat in place, and gradients reach f_hat, codes and phi through
            it. Each vector is compared with the codes once, by `nearest`, and each map accumulated
            once.

            ![The maps of images, and what each adds](.github/images/codes.png)
        """,
        question="""
            How much does phi repair? `PHI_STRENGTH` is 0.5 as published. Train three tokenizers, a
            minute and a half each, with 0, 0.5 and 1:

                # phi.py
                import sys
                import tokenizer
                import train
                tokenizer.PHI_STRENGTH = float(sys.argv.pop())
                train.main()

                for s in 0 0.5 1; do
                    python phi.py --stage tokenizer --tokenizer-steps 800 --out out/phi-$s $s
                done

            Each ends with a table of the PSNR on held-out images after each scale. A good answer
            has one table of three columns, says at which scales they differ by more than another
            `--seed` does, and explains the row of the last scale: it is not enlarged, so what is
            phi good for there? It says what one training of each can show and what it cannot.
        """,
    ),
    Assignment(
        number=2,
        title="The codebook loss",
        bodies=("tokenizer.Quantizer.forward",),
        give_aways=("tokenizer.Quantizer.encode", "tokenizer.Quantizer.decode",
                    "tokenizer.Quantizer.teacher_inputs", "tokenizer.Quantizer.start_from",
                    "var.VAR.generate", "sample.Known.tokens", "reference.running_latents"),
        forbidden=(),
        quoted=("tokenizer.Quantizer.initial", "tokenizer.Quantizer.accumulate",
                "tokenizer.Quantizer.add", "tokenizer.Quantizer.read",
                "tokenizer.Quantizer.nearest", "tokenizer.Quantizer.split",
                "tokenizer.Quantizer.update_hits", "tokenizer.Quantizer.count",
                "tokenizer.COMMITMENT", "kernels.nearest_code"),
        points={
            TOKENIZER + "test_the_codebook_loss_and_its_gradients_are_numpys": 4,
            TOKENIZER + "test_gradients_pass_straight_through_to_the_encoder": 2,
            TOKENIZER + "test_decode_of_encode_is_the_quantizers_own_output": 1,
            TOKENIZER + "test_a_training_pass_keeps_residuals_without_their_graph_and_counts_"
                        "hits": 2,
            TOKENIZER + "test_hits_do_not_depend_on_how_a_step_is_split": 1,
            GRADED + "test_what_the_quantizer_makes_is_where_its_inputs_are": 1,
            GRADED + "test_each_map_is_compared_and_added_once": 1,
            GRADED + "test_one_image_at_one_scale_is_still_a_batch": 1,
        },
        hours="3-5",
        after=(1,),
        text="""
            The nearest code is a choice, and a choice has no gradient. You write the pass that
            training takes all the same: its value is that of the tokens, its gradient goes straight
            through, and a loss of its own holds latents and codes together at every scale.

            Hints. Write down first, for each of the three results (value, gradient to the encoder,
            gradient to the codebook and the phis), where it must come from; then place each
            `detach`. The loss is a mean over scales of means over numbers. What the next scale
            reads must not be part of the gradient. `last_tokens_BL` and `last_residuals` are
            for assignment 3: kept in training mode only, of the last pass only, without a graph.
        """,
        question="""
            Why is every scale's sum held to the latent, and not the last alone? Change your
            `forward` so that only the last scale counts in the loss (and divide by 1, not K). Train
            both, a minute and a half each:

                python train.py --stage tokenizer --tokenizer-steps 800 --out out/every
                python train.py --stage tokenizer --tokenizer-steps 800 --out out/last   # changed

            Compare the PSNR after 1x1, 2x2, ... that both print at the end. A good answer says what
            happens to the coarse scales and to the last, shows pictures of the first scale alone
            (`python sample.py codes data:3 --run out/every`), and argues which of the two the
            transformer would rather predict.
        """,
    ),
    Assignment(
        number=3,
        title="A living codebook",
        bodies=("tokenizer.Quantizer.start_from", "tokenizer.Quantizer.update_hits",
                "tokenizer.Quantizer.revive"),
        give_aways=("tokenizer.Quantizer.encode", "tokenizer.Quantizer.decode",
                    "tokenizer.Quantizer.teacher_inputs", "tokenizer.Quantizer.forward",
                    "var.VAR.generate", "sample.Known.tokens"),
        forbidden=(),
        quoted=("tokenizer.Quantizer.initial", "tokenizer.Quantizer.accumulate",
                "tokenizer.Quantizer.add", "tokenizer.Quantizer.read",
                "tokenizer.Quantizer.split", "tokenizer.Quantizer.count",
                "kernels.nearest_code", "tokenizer.HITS_DECAY", "tokenizer.DEAD_BELOW"),
        points={
            TOKENIZER + "test_the_first_codes_are_residuals_of_every_scale_alike": 3,
            GRADED + "test_the_first_codes_are_of_any_images": 1,
            TOKENIZER + "test_remember_is_a_running_average_of_the_hits_of_a_step": 2,
            TOKENIZER + "test_revive_moves_dead_codes_only_and_makes_them_new": 3,
            TOKENIZER + "test_hits_do_not_depend_on_how_a_step_is_split": 1,
            GRADED + "test_the_codebook_stays_the_parameter_that_it_was": 1,
        },
        hours="3-5",
        after=(1, 2),
        text="""
            A code that is never the nearest gets no gradient, so it will never be the nearest: the
            codebook collapses. Three functions keep it alive. `start_from` puts the first codes
            where residuals are, `update_hits` keeps a running mean of hits, `revive` moves dead
            codes to where they are needed.

            Hints. In `start_from` codes that do not exist yet must not be chosen: search only the
            part that is filled. The codes of scale k are those from ceil(V k / K) to just before
            ceil(V (k + 1) / K). In `revive` the scale is drawn first and the place second; draw
            from the residuals of all images. Whatever the optimizer remembers of a code is about
            the code that was there before. The stage in train.py counts, and sums over processes.
            The codebook and `hits_V` stay the tensors that they are: they are changed in place, the
            codebook outside of any graph (but not by `.data`, which is refused). Where V < K some
            scales get no code.
        """,
        question="""
            What happens without revival? Nothing is below 0 times the average:

                # dead.py
                import tokenizer
                import train
                tokenizer.DEAD_BELOW = 0
                train.main()

                python train.py --stage tokenizer --tokenizer-steps 800 --out out/revived
                python dead.py --stage tokenizer --tokenizer-steps 800 --out out/dead

            Both end with the codes used per scale, their perplexity and the PSNR. A good answer
            compares all three, per scale, and tells apart "used at all" from "used alike". It then
            takes away the good start too (in your `start_from`: codes drawn with `torch.randn`, of
            the residuals' size) and says which of the two measures matters more here, and whether
            that would hold for 4096 codes.
        """,
    ),
    Assignment(
        number=4,
        title="Teacher forcing",
        bodies=("tokenizer.Quantizer.teacher_inputs",),
        give_aways=("tokenizer.Quantizer.encode", "tokenizer.Quantizer.decode",
                    "tokenizer.Quantizer.forward", "tokenizer.Quantizer.start_from",
                    "var.VAR.generate", "reference.running_latents"),
        forbidden=(),
        quoted=("tokenizer.Quantizer.initial", "tokenizer.Quantizer.accumulate",
                "tokenizer.Quantizer.add", "tokenizer.Quantizer.read",
                "tokenizer.Quantizer.split", "kernels.nearest_code"),
        points={
            TOKENIZER + "test_teacher_inputs_read_the_running_latent_of_coarser_scales_only": 3,
            TOKENIZER + "test_every_step_of_the_loop_is_numpys": 2,
            TOKENIZER + "test_every_pyramid_encodes_and_decodes": 1,
            TRANSFORMER + "test_cached_generation_equals_the_masked_forward": 3,
            PARITY + "test_tokenizer": 1,
            GRADED + "test_what_the_quantizer_makes_is_where_its_inputs_are": 1,
            GRADED + "test_each_map_is_compared_and_added_once": 1,
        },
        hours="1-2",
        after=(1,),
        text="""
            In training all scales are predicted at once, because what each should read is known:
            the running latent after the scales before it, at its own size. That is teacher forcing.
            You write the function that makes these inputs from tokens. In generation the same
            inputs come about one by one, and a graded test holds the two to each other.

            Hints. It is one loop over `accumulate` and `read`. Scale k reads what scales 0..k-1 add
            up to: be sure which size is read after which scale. The last scale is read by nobody.
            With one scale there is nothing to read, and the result still has three axes. Each map
            is accumulated once. One graded test draws with `VAR.generate`, and compares the logits
            of each scale with those of the whole model on your inputs.

            ![What each scale reads, and what it is to predict](.github/images/teaching.png)
        """,
        question="""
            Why f_hat and not the codes of the last scale alone? Change your function so that each
            scale reads only the one before: its codes, enlarged and through phi, added to nothing.
            Train the transformer on the same tokens with both, about two minutes each:

                T=out/shapes/tokenizer.pt
                python train.py --tokenizer $T --var-steps 300 --out out/f_hat
                python train.py --tokenizer $T --var-steps 300 --out out/last   # changed

            `log.jsonl` in both folders has lines with "split": "held_out", `loss` and
            `loss_per_scale`. A good answer compares them scale by scale: at which scale can there
            be no difference, and where would you expect the largest? It says why attention to the
            coarser scales does not make up for all of it. (The samples that the second
            training ends with mean nothing: generation still reads f_hat. Why is that a failure?)
        """,
    ),
    Assignment(
        number=5,
        title="The mask as a table",
        bodies=("kernels.KeyRanges.from_scales", "kernels.transposed_table",
                "kernels.mask_in_sight", "kernels.block_attention_torch"),
        give_aways=("benchmark.obvious_attention", "reference.attention"),
        forbidden=("block_attention", "block_attention_triton", "BlockAttention", "launch"),
        quoted=("kernels.block_attention", "kernels.KeyRanges.rows", "kernels.KeyRanges.dense",
                "kernels.KeyRanges.cached", "kernels.table", "kernels.attention_tiles"),
        points={
            GRADED + "test_the_table_of_scales": 2,
            GRADED + "test_a_token_sees_its_own_scale_at_least": 1,
            KERNELS + "test_the_transposed_table_is_the_transposed_mask": 2,
            KERNELS + "test_attention_and_its_gradients[torch]": 3,
            KERNELS + "test_attention_at_the_length_of_the_published_models[torch]": 1,
            KERNELS + "test_the_unused_end_of_a_cache_may_hold_anything[torch]": 1,
            KERNELS + "test_queries_that_all_see_the_same_keys_need_no_mask": 2,
            GRADED + "test_tables_are_small_int32_and_where_they_are_asked_for": 1,
        },
        hours="4-6",
        after=(),
        text="""
            In next-scale prediction a token sees one unbroken range of keys, so a mask is a table
            of two columns: `first` and `last`. You write the table of a pyramid, the same table by
            keys instead of queries, and attention that follows it in PyTorch:
            which keys are in sight of anybody, the mask over those, and none where all queries see
            all of them. `F.scaled_dot_product_attention` may be used.

            Hints. Draw the table for scales (1, 2, 3) on paper, for "all so far", for 1 and for 2
            scales in sight. In the transposed table a key may be seen by nobody: then first and
            last are equal. `torch.searchsorted` on a sorted column answers "how many are at most
            x", and right=True or False is the whole exercise; nothing of the size L S is made for
            it. A ValueError tells the number of scales in sight that is less than 1. Tables are
            int32. The keys and values beyond the last one in sight may hold anything, NaN too, and
            must not be read.

            ![Tiles of the mask](.github/images/tiles.png)
        """,
        question="""
            How far must a token see? Train three transformers on one tokenizer, about a minute and
            a half each:

                T=out/shapes/tokenizer.pt
                python train.py --tokenizer $T --var-steps 250 --out out/all
                python train.py --tokenizer $T --var-steps 250 --last-scales 2 --out out/two
                python train.py --tokenizer $T --var-steps 250 --last-scales 1 --out out/one

            Compare the held-out loss (lines with "split": "held_out" in log.jsonl) and the time per
            step that the progress bar shows. A good answer explains why a token that sees its own
            scale alone is not blind (what does it read?), how much of the time could be saved at
            all at these 103 tokens, and how that changes at the published 680: count the pairs of
            `KeyRanges` for both.
        """,
    ),
    Assignment(
        number=6,
        title="The block",
        bodies=("kernels.split_heads_torch", "var.Attention.project", "var.Block.forward",
                "var.Block.skip", "var.VAR.modulations"),
        give_aways=("kernels.split_heads_forward",
                    "reference.split_heads", "reference.attention"),
        forbidden=("split_heads_triton", "launch", "launch_split_heads", "SplitHeads"),
        quoted=("kernels.split_heads", "kernels.inverse_norm", "kernels.LARGEST_LOG_SCALE",
                "kernels.adaln", "kernels.block_attention", "var.Stream", "var.Attention.forward",
                "var.LayerCache.slots", "var.LayerCache.so_far"),
        points={
            KERNELS + "test_split_heads_and_its_gradients[torch]": 2,
            KERNELS + "test_keys_and_values_go_where_there_is_room_and_nowhere_else": 1,
            TRANSFORMER + "test_attention_is_numpys": 2,
            TRANSFORMER + "test_a_block_is_what_it_says": 2,
            TRANSFORMER + "test_stochastic_depth_skips_whole_images_and_scales_the_others": 2,
            TRANSFORMER + "test_label_dropout_and_stochastic_depth_stop_in_eval": 1,
            GRADED + "test_what_the_class_does_to_each_layer": 1,
            TRANSFORMER + "test_cached_generation_equals_the_masked_forward": 1,
            PARITY + "test_transformer": 2,
            KERNELS + "test_however_short_a_row_is_it_becomes_a_unit[torch]": 1,
            GRADED + "test_gradients_pass_through_a_layer_and_what_the_class_does_to_"
                     "it": 1,
            GRADED + "test_a_skipped_branch_has_no_gradient_and_others_have_more": 1,
        },
        hours="4-6",
        after=(),
        text="""
            A layer of the transformer: attention and a perceptron, each after an adaptive layer
            norm and scaled by a gate. You write how one product becomes queries, keys and values,
            the layer itself, the branch that is skipped at random (stochastic depth), and what
            the class does to each layer.

            Hints. The six vectors of a modulation are unbound in one order, which published
            checkpoints fix: gates, scales, shifts. One product makes queries, keys and values:
            first which, then which head. Keys have no bias. The learned scale is kept as a
            logarithm and must not pass 100. A layer is given the stream and a branch that is still
            to be added to it; it returns the same, with its own last branch. Stochastic depth skips
            a branch for whole images, and on average changes nothing. `adaln` adds the branch it is
            given, and the 1 to the scale, itself. Rows are divided by their norm in fp32, however
            short they are; zeros stay zeros. Graded tests also run a whole `model`: `VAR.generate`
            with its cache against the same tokens read at once by way of `teacher_inputs`, and the
            image that they `decode` to.
        """,
        question="""
            What are normalised queries and keys good for? Four short trainings on one tokenizer, a
            minute each:

                T=out/shapes/tokenizer.pt
                for lr in 1e-2 5e-2; do
                    O="--tokenizer $T --var-steps 150 --var-lr $lr"
                    python train.py $O --out out/unit-$lr
                    python train.py $O --no-normalise-qk --out out/plain-$lr
                done

            Compare the losses in log.jsonl. A good answer shows the four curves, says at which rate
            the two differ and at which they do not, and measures the largest score q.k in the first
            and last layer of each at the end (call `project` yourself). If nothing differs at these
            sizes it says so, and says why it might in 30 layers.
        """,
    ),
    Assignment(
        number=7,
        title="Generation",
        bodies=("var.LayerCache.slots", "var.LayerCache.so_far", "var.VAR.generate",
                "var.VAR.draw"),
        give_aways=("tokenizer.Quantizer.teacher_inputs",),
        forbidden=("forward",),
        quoted=("kernels.sample_tokens", "kernels.KeyRanges.rows", "var.VAR.forward",
                "var.VAR.start", "var.VAR.positions", "var.VAR.modulations", "var.VAR.through_layers",
                "var.VAR.logits", "var.VAR.new_caches", "tokenizer.Quantizer.initial",
                "var.VAR.fineness", "var.VAR.smoothed", "tokenizer.Quantizer.accumulate",
                "tokenizer.Quantizer.add", "tokenizer.Quantizer.read", "sample.Known.put",
                "var.VARConfig", "var.VARConfig.spans"),
        points={
            GRADED + "test_a_cache_takes_its_room_once_and_gives_what_is_there": 1,
            TRANSFORMER + "test_cached_generation_equals_the_masked_forward": 3,
            TRANSFORMER + "test_guidance_grows_from_nothing_at_the_first_scale_to_cfg_at_the_"
                          "last": 2,
            TRANSFORMER + "test_guidance": 1,
            TRANSFORMER + "test_top_p_falls_from_the_first_scale_to_the_last": 1,
            TRANSFORMER + "test_one_scale_alone_generates": 1,
            TRANSFORMER + "test_an_interrupted_generation_leaves_nothing_behind": 1,
            GRADED + "test_no_guidance_does_not_pay_for_it": 1,
            GRADED + "test_draws_follow_their_own_generator_and_the_distribution": 1,
            GRADED + "test_tokens_that_are_known_are_read_by_the_next_scale": 1,
            PARITY + "test_transformer": 1,
            GRADED + "test_each_token_passes_each_layer_once": 2,
            GRADED + "test_what_is_generated_is_where_the_labels_are": 1,
            TRANSFORMER + "test_what_is_smoothed_is_read_and_is_the_latent": 1,
        },
        hours="5-8",
        after=(4, 6),
        text="""
            Generation makes one scale after the other. The keys and values of earlier scales do not
            change, so they are kept: the cache. After each scale its tokens are drawn, added to the
            running latent, and the next scale reads that. With guidance every image is computed
            twice, for its class and for none. You write the cache, the loop, and the draw of one
            scale.

            Hints. `VAR.forward` computes the same logits for all scales at once; a graded test
            holds you to it. The queries of scale k are the rows of the table of ranges that belong
            to it. Both halves of a guided batch read the same f_hat. Without guidance nothing is
            computed twice. The guidance of scale k is cfg (k / (K - 1))^growth, and K may be 1;
            top_p goes from its first number to its second alike. Noise comes from the generator
            that was given. `known` may replace what was drawn (assignment 13): later scales read
            the replacement. Where `smooth` is not 0, what `smoothed` makes is added in place of
            codes, and read; f_hat after each scale, the last too, goes to `latents`. A cache
            (`LayerCache`) keeps its tensors as `self.k_BHLD` and `self.v_BHLD`, whose memory it
            takes once. Each token passes each layer once, with guidance twice: that is counted
            where it comes out of each `mlp`.

            ![Images after each scale](.github/images/progress.png)
        """,
        question="""
            Why does guidance grow with the scale? Compare it with a constant one of the same mean,
            cfg / 2:

                # constant.py
                from pathlib import Path
                import torch
                import sample
                import var
                from support.devices import choose_machine
                from support.images import grid, rows_of_classes, save_picture, to_bytes

                kernel = var.sample_tokens
                labels = [label for label in range(10) for _ in range(16)]
                for cfg in (0.0, 4.0, 8.0, 16.0):
                    sampling = sample.Sampling(cfg, top_k=900, top_p=1.0)
                    run = sample.load_run(Path("out/shapes"), choose_machine("cpu"), sampling)

                    def constant(cond, uncond, guidance, *rest):
                        return kernel(cond, uncond, cfg / 2, *rest)

                    for name, draw in (("growing", kernel), ("constant", constant)):
                        var.sample_tokens = draw
                        tokens_NL = run.generate(labels, seed=0)
                        first = sum(len(x.unique()) for x in tokens_NL[:, 0].split(16)) / 10
                        print(f"cfg {cfg:.0f}, {name}: of 16 first tokens {first} differ, images "
                              "of a class after each scale by", *(
                                  f"{sum(torch.pdist(x).mean() for x in images) / 10:.1f}"
                                  for span in run.model.config.spans
                                  for images in [run.decode(tokens_NL[:, :span.stop])
                                                 .flatten(1).split(16)]))
                        images = run.decode(tokens_NL)
                        picture = grid(rows_of_classes(run.classes, to_bytes(images)))
                        save_picture(Path(f"{name}-{cfg:.0f}.png"), picture)

            A good answer compares variety within a class after the first scales and after all, and
            what the pictures look like, says from which cfg on the two differ, and explains the
            number of different first tokens from the formula of t.
        """,
    ),
    Assignment(
        number=8,
        title="Sampling",
        bodies=("kernels.sample_tokens_torch",),
        give_aways=("kernels.ranked_within",
                    "kernels.sample_tokens_kernel", "reference.kept_probabilities"),
        forbidden=("sample_tokens", "sample_tokens_triton", "launch"),
        quoted=("kernels.sample_tokens",),
        points={
            KERNELS + "test_a_draw_is_the_best_of_the_tokens_kept[torch]": 2,
            KERNELS + "test_both_backends_draw_the_same_token": 1,
            KERNELS + "test_guidance_goes_beyond_the_class": 1,
            KERNELS + "test_top_k_keeps_k_whatever_their_sign_and_their_ties": 2,
            KERNELS + "test_top_p_keeps_what_holds_p_of_what_top_k_left": 2,
            KERNELS + "test_frequencies_follow_the_distribution": 1,
            KERNELS + "test_rare_tokens_count_for_top_p": 1,
            GRADED + "test_each_place_has_a_threshold_of_its_own": 1,
            GRADED + "test_drawing_changes_nothing_that_it_was_given": 1,
            GRADED + "test_a_draw_is_int64_and_where_the_logits_are": 1,
        },
        hours="3-5",
        after=(),
        text="""
            The last step of generation: guidance, then keep the k most likely tokens, of those as
            many as hold p of the probability, then draw. Instead of torch.multinomial the noise is
            handed in: the token with the largest logit - ln(noise) is a draw from the softmax, if
            the noise is Exponential(1). So a test can hold your draws to another implementation,
            token by token.

            Hints. Of equal logits the lower index ranks first, for top-k and for top-p: you need
            how many tokens stay and the threshold, and then count among the equal ones. A token
            stays if those ranked *before* it hold less than p, so the first always stays, p 0
            included. Probabilities are cut to whole units of 2^-40 of the largest (see the
            section's comment): sums are exact, and the Triton kernel draws the same token. The
            target is the float32 product of the sum and p, cut to a whole number. All in float32;
            the caller's tensors stay as they are. Logits are cond + t (cond - uncond), rounded in
            this order, or cond alone where uncond is None; top_k <= 0 or >= V keeps all, and so
            does top_p 1. The result is int64 [B, l], on the device of the logits.
        """,
        question="""
            What does top-p trade? Draw with five values and measure how likely the samples are to
            the model itself and how different they are from each other:

                # variety.py
                from pathlib import Path
                import torch
                import sample
                from support.devices import choose_machine
                from support.images import to_float

                for top_p in (0.3, 0.5, 0.75, 0.9, 1.0):
                    sampling = sample.Sampling(0.0, 900, top_p)
                    run = sample.load_run(Path("out/shapes"), choose_machine("cpu"), sampling)
                    labels = [label for label in range(10) for _ in range(16)]
                    tokens_NL = run.generate(labels, seed=0)
                    nats = -run.log_likelihood(tokens_NL, labels).mean() / tokens_NL.shape[1]
                    first = sum(len(x.unique()) for x in tokens_NL[:, 0].split(16)) / 10
                    images = run.decode(tokens_NL).flatten(1).split(16)
                    spread = sum(torch.pdist(x).mean() for x in images) / 10
                    print(f"top-p {top_p}: {nats:.2f} nats per token, of 16 first tokens {first} "
                          f"differ, images of a class by {spread:.1f}")
                images, labels = (x[:200] for x in run.held_out.tensors)
                tokens_NL = run.encode(to_float(images))[1]
                nats = -run.log_likelihood(tokens_NL, labels.tolist()).mean() / tokens_NL.shape[1]
                print(f"held-out images: {nats:.2f} nats per token")

            A good answer plots variety against likelihood, says at which p samples are as likely as
            real images and whether that is where they look best, and which of the two measures of
            variety sees anything, and why.
        """,
    ),
    Assignment(
        number=9,
        title="Adaptive layer norm in Triton",
        bodies=("kernels.normalise", "kernels.adaln_forward", "kernels.adaln_backward"),
        give_aways=("kernels.adaln_torch", "reference.adaln"),
        forbidden=ONLY_TRITON,
        quoted=("kernels.adaln", "kernels.adaln_triton", "kernels.AdaLN", "kernels.as_arrays",
                "kernels.load_token", "kernels.store_token"),
        points={
            KERNELS + "test_adaln_and_its_gradients[triton]": 6,
            GRADED + "test_a_row_narrower_than_its_tile_and_far_from_zero_is_normalised": 1,
            KERNELS + "test_adaln_sums_gradients_in_one_order": 1,
            TRANSFORMER + "test_both_backends_give_the_same_loss_and_gradients": 2,
            GRADED + "test_the_norm_is_of_the_sum_as_it_is_stored": 1,
        },
        hours="4-6",
        after=(),
        text="""
            The first kernel. AdaLN here is three steps: add the last branch, times its gate, to the
            stream; a layer norm; a scale and a shift per image. PyTorch goes to memory after every
            step; a kernel reads a row once, keeps it in registers, and writes the results. You
            write the norm of a row, the kernel of the forward pass and that of the backward pass.
            Helpers that load and store a row are given.

            Hints. Work out the backward formula on paper first; the section's comment gives the
            result, so check yours against it. A tile is a power of two wide: columns beyond W hold
            zeros when loaded, but not after you subtract a mean. What the backward pass reads is
            the sum as it was stored, in its dtype: norm that. In the backward pass a program sees
            some tokens of one image and adds up three sums; it writes its part of them, and the
            parts are added afterwards. `print` works in a kernel here, in Triton's interpreter. One
            graded test runs a small `VAR` on what `encode` and `teacher_inputs` made of images,
            with your kernels and without, and compares all gradients.
        """,
        question="""
            What is saved? Count the bytes that PyTorch moves, without running anything:

                # bytes.py
                import torch
                import kernels
                from tests import benchmark

                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.empty(64, 680, 1024, dtype=dtype, device="meta")
                    gate = torch.empty(64, 1024, dtype=dtype, device="meta")
                    with benchmark.BytesMoved() as moved:
                        kernels.adaln_torch(x, x, gate, gate, gate, dtype)
                    print(dtype, moved.total / x.numel(), "bytes per number of x")

            Set that beside the bytes of your own kernel, from its loads and stores, forward and
            backward. A good answer lists the steps of PyTorch with the bytes of each until the sum
            is the number printed, derives a speed-up from bytes alone for both dtypes, and names
            two reasons why a GPU would not show exactly that one.
        """,
    ),
    Assignment(
        number=10,
        title="The nearest code in Triton",
        bodies=("kernels.nearest_code_kernel",),
        give_aways=("kernels.nearest_code_torch", "reference.distances"),
        forbidden=ONLY_TRITON,
        quoted=("kernels.nearest_code", "kernels.as_arrays", "kernels.load_tile", "kernels.product"),
        points={
            KERNELS + "test_nearest_code_is_nearest[triton]": 4,
            KERNELS + "test_of_equally_near_codes_the_first_wins_wherever_it_is[triton]": 2,
            KERNELS + "test_nearest_code_at_the_published_size[triton]": 2,
            KERNELS + "test_nearest_code_stays_in_fp32_under_autocast": 1,
        },
        hours="3-5",
        after=(9,),
        text="""
            The tokenizer asks for the nearest of V codes, for every vector and scale. The obvious
            way writes all N V distances to memory to find N indices. You write a kernel that keeps
            them in registers: a program holds a tile of vectors and walks over the codes, tile by
            tile.

            Hints. |x|^2 is the same for all codes, so it is left out. C may be larger than a tile:
            there is a loop over channels too. A tile of codes may stick out of the codebook, and a
            code that is not there must never win. Of equally near codes the lowest index wins:
            within a tile and across tiles. Keep for each column of the tile the best so far, and
            find the best column once, at the end.
        """,
        question="""
            Why fp32? Encode held-out images with products in bf16, and count the tokens that
            change:

                # half.py
                from pathlib import Path
                import sample
                import tokenizer
                from support.devices import choose_machine
                from support.images import to_float

                run = sample.load_run(Path("out/shapes"), choose_machine("cpu"))
                images = to_float(run.held_out.tensors[0][:200])
                nearest = tokenizer.nearest_code

                def half(x_NC, codebook_VC):
                    x, e = x_NC.bfloat16(), codebook_VC.bfloat16()
                    return (e.float().square().sum(dim=1) - 2 * (x @ e.T).float()).argmin(dim=1)

                f_BCSS, exact_BL = run.encode(images)
                tokenizer.nearest_code = half
                rough_BL = run.tokenizer.quantizer.encode(f_BCSS)
                changed = run.tokenizer.quantizer.split((exact_BL != rough_BL).float())
                for s, changed_Bl in zip(run.tokenizer.config.scales, changed):
                    print(f"{s}x{s}: {changed_Bl.mean():.1%} of the tokens change")
                for tokens_BL in (exact_BL, rough_BL):
                    error = (run.decode(tokens_BL) - images).square().mean()
                    print(f"mean squared error {error:.6f}")

            A good answer separates two causes (a rounded product changes a token; a
            changed token changes all that the finer scales are asked for: measure the first alone),
            and says how much worse the images are. Why would changed tokens matter if the images
            hardly differ?
        """,
    ),
    Assignment(
        number=11,
        title="Attention in Triton: forward",
        bodies=("kernels.plan_tiles", "kernels.attention_forward"),
        give_aways=("kernels.attention_backward_q", "kernels.attention_backward_kv",
                    "kernels.block_attention_torch", "benchmark.obvious_attention",
                    "reference.attention"),
        forbidden=ONLY_TRITON,
        quoted=("kernels.block_attention", "kernels.block_attention_triton", "kernels.KeyRanges",
                "kernels.KeyRanges.from_scales", "kernels.KeyRanges.cached", "kernels.launch",
                "kernels.as_arrays", "kernels.load_head", "kernels.store_head", "kernels.product",
                "kernels.tile_partners", "kernels.seen_by", "kernels.attention_tiles"),
        points={
            KERNELS + "test_attention_and_its_gradients[triton]": 3,
            KERNELS + "test_products_of_any_size_make_weights": 1,
            KERNELS + "test_attention_at_the_length_of_the_published_models[triton]": 2,
            KERNELS + "test_tiles_out_of_range_are_not_visited": 1,
            GRADED + "test_tiles_before_the_range_are_not_visited": 1,
            GRADED + "test_tiles_that_all_see_are_not_masked": 1,
            KERNELS + "test_the_unused_end_of_a_cache_may_hold_anything[triton]": 1,
            KERNELS + "test_the_tiles_that_are_counted_and_drawn_are_those_that_are_visited": 2,
        },
        hours="6-10",
        after=(5, 10),
        text="""
            Attention that never writes its scores: a program holds a tile of queries, walks over
            the tiles of keys in its range, and keeps the softmax right as it goes. And no work is
            done on tiles that nobody in the tile of queries sees, and no mask on tiles that all of
            them see. You write the plan (which tiles are whole, which are cut) and the kernel.

            Hints. The section's comments are the algorithm. First do `plan_tiles` on paper: with
            both ends growing, the first and the last row of a tile tell everything; mind the last
            tile, which may stick out. The test of it runs without your kernel. Then write the
            kernel with one loop in which everything is masked, and only then split it. Scores are
            in powers of two; the scale comes divided by ln 2. A query may see nothing of the first
            tile it meets: think of what -inf - (-inf) is. `log2sum` is for the backward pass.
        """,
        question="""
            How many tiles are visited, of all? It depends on the tile's size:

                # tiles.py
                import kernels
                from tests import benchmark

                for L in (130, 680, 2240, 9451):
                    for tile in ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (16, 16)):
                        kernels.ATTENTION_TILES["forward"][0] = (*tile, 8, 3)
                        grid = benchmark.tile_grid(L)
                        visited = (grid > 0).float().mean()
                        cut = (grid == 1).sum() / (grid > 0).sum()
                        print(f"L {L:5}  {tile}: visited {visited:.0%}, of these cut {cut:.0%}")

            The share of pairs that the mask keeps is the limit: compute it from `KeyRanges`. A good
            answer explains both columns as functions of tile size and L, says why the smallest tile
            is not the fastest all the same (count the bytes of keys and values that are loaded per
            query), and predicts the share for `last_scales=1`, then counts it.
        """,
    ),
    Assignment(
        number=12,
        title="Attention in Triton: backward",
        bodies=("kernels.attention_backward_q", "kernels.attention_backward_kv"),
        give_aways=("kernels.block_attention_torch", "benchmark.obvious_attention",
                    "reference.attention"),
        forbidden=ONLY_TRITON,
        quoted=("kernels.block_attention", "kernels.block_attention_triton", "kernels.KeyRanges",
                "kernels.attention_forward", "kernels.plan_tiles", "kernels.tile_partners", "kernels.seen_by",
                "kernels.load_head", "kernels.store_head", "kernels.product",
                "kernels.attention_tiles"),
        points={
            KERNELS + "test_attention_and_its_gradients[triton]": 6,
            KERNELS + "test_attention_at_the_length_of_the_published_models[triton]": 2,
            TRANSFORMER + "test_both_backends_give_the_same_loss_and_gradients": 2,
            GRADED + "test_the_backward_kernels_visit_no_tile_out_of_range_either": 1,
        },
        hours="6-10",
        after=(11,),
        text="""
            The backward pass of attention computes the weights again, from `log2sum`, instead of
            having kept them. Two kernels: one holds queries and walks over keys, for dq; the other
            holds keys and walks over the queries that see them, for dk and dv. Each number is
            written once, by one program, so the result is the same every time.

            Hints. Derive the five lines of the section's comment from o = weights v. delta, the sum
            of o do, is made by the first kernel and read by the second. Where does the scale go,
            and where ln 2? A padded query has log2sum 0 and a weight that is not 0: what keeps it
            out of dk? Test one gradient after the other, at the smallest sizes, against the NumPy
            reference that the tests compare with. One graded test runs a small `VAR` on what
            `encode` and `teacher_inputs` made of images, with your kernels and without.
        """,
        question="""
            What does the second kernel visit? It tiles the transposed table, and may take other
            tiles than the first:

                # transposed.py
                import torch.nn.functional as F
                from kernels import KeyRanges
                from tests.benchmark import BENCHMARK_SCALES

                for L in (680, 2240):
                    mask_LS = KeyRanges.from_scales(BENCHMARK_SCALES[L]).dense()
                    for queries, keys in ((128, 64), (64, 128), (64, 64), (32, 32)):
                        padded = F.pad(mask_LS, (0, -L % keys, 0, -L % queries))
                        tiles = padded.unflatten(1, (-1, keys)).unflatten(0, (-1, queries))
                        visited = tiles.any(dim=3).any(dim=1).float().mean()
                        print(f"L {L}  {queries:3} queries x {keys:3} keys: visited {visited:.0%}")

            Then count matrix products: how many per visited tile forward, in each of your kernels,
            and how many would be needed had the weights been kept? A good answer has the counts,
            the bytes that keeping them would take at B 64, H 16, L 680 in bf16, and a reasoned
            verdict for a GPU with 1000 times as many operations a second as bytes.
        """,
    ),
    Assignment(
        number=13,
        title="In-painting",
        bodies=("sample.Known.put", "sample.Known.tokens", "sample.Known.mask",
                "sample.fill_holes"),
        give_aways=("tokenizer.Quantizer.encode", "tokenizer.Quantizer.forward",
                    "tokenizer.Quantizer.start_from"),
        forbidden=(),
        quoted=("tokenizer.Quantizer", "tokenizer.Quantizer.initial",
                "tokenizer.Quantizer.accumulate", "tokenizer.Quantizer.add",
                "tokenizer.Quantizer.read", "tokenizer.Quantizer.nearest",
                "tokenizer.Quantizer.split"),
        points={
            TRANSFORMER + "test_which_tokens_are_known": 2,
            TRANSFORMER + "test_the_closed_loop_codes_what_is_missing_and_the_open_loop_the_images_"
                          "own_tokens": 2,
            TRANSFORMER + "test_in_painting_keeps_what_is_known_and_the_closed_loop_keeps_it_"
                          "better": 2,
            GRADED + "test_a_hole_is_filled_from_its_border": 2,
            GRADED + "test_filling_reads_nothing_in_the_hole_and_reaches_its_middle": 1,
            GRADED + "test_all_or_nothing_known_ends": 1,
            GRADED + "test_each_channel_is_filled_by_itself_and_nothing_lies_beyond_the_edge": 1,
            GRADED + "test_each_image_has_a_known_part_of_its_own": 1,
            GRADED + "test_what_is_put_is_where_the_drawn_tokens_are": 1,
            GRADED + "test_free_coarse_maps_are_known_where_that_share_is": 1,
        },
        hours="3-5",
        after=(1, 7),
        text="""
            A VAR model completes images without having been trained to: at every scale, tokens that
            it drew where the image is known make way for the image's own. You write which tokens
            those are, where they are put, and how the hole is filled before the image is encoded,
            for the encoder must not see what was there.

            Hints. The docstring of `Known.mask` states the rule; sizes are compared with a quarter
            of the finest side. The loop is closed: once some coarser tokens were generated, the
            image's own tokens, computed beforehand, no longer fit; ask what the image has more than
            what was made so far. The open loop stays available for comparison. `fill_holes` grows
            known pixels inwards, ring by ring, each new pixel the mean of its 3 x 3 neighbours that
            are known by then; it ends where all is known, and with nothing known all is 0.
            `known_HW` is 1 where pixels are known and 0 elsewhere, on the device of the images.
            Graded tests draw with `VAR.generate`, hold your tokens to the nearest in `codebook_VC`,
            and `decode` the result.

            ![Completed images](.github/images/inpaint.png)
        """,
        question="""
            Is the closed loop better? Complete held-out images with three boxes, both ways:

                for box in "0.25 0.25 0.75 0.75" "0 0 0.5 1" "0.6 0.6 0.9 0.9"; do
                    for loop in "" --open-loop; do
                        for seed in 0 1; do
                            python sample.py inpaint data:{0..49} --seeds $seed \\
                                --particles 0 --box $box $loop --out x.png
                        done
                    done
                done

            (In zsh or bash; half a minute or less each.) Each prints the error of the known part
            and how visible the border is. The run is that in `out/shapes`. A good answer has a
            table, says whether the differences are larger than those between two seeds, and
            explains why the known part is not exact in either loop, and what `--paste` hides.
        """,
    ),
]

ASSIGNMENTS = {each.number: each for each in LIST}
