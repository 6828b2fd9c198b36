"""Bugs in what connects models: calls, masks, rules, regions."""

from tests.mutations.catalogue.mutation import Mutation

MODELS = (
    Mutation(
        "text at the wrong end",
        "models.py",
        'COGVIDEO = Known(axes="B T C H W", text=TEXT, text_at="first"',
        'COGVIDEO = Known(axes="B T C H W", text=TEXT, text_at="last"',
        ("models/test_zoo.py::test_the_layout_says_where_video_and_text_are",),
    ),
    Mutation(
        "a sample's text length of another",
        "calls.py",
        "    counts = layout.index(mask.device)[2].expand(",
        "    lengths = lengths[:1].expand_as(lengths)\n    counts = layout.index(mask.device)[2].expand(",
        ("models/test_zoo.py::test_uncompiled_all_tiles_equal_dense_and_fewer_do_not",),
    ),
    Mutation(
        "a mask's hole unseen",
        "ops/text_lengths.py",
        'wrong[f"leaves {name} text tokens that are no prefix"] = ~prefix.all()',
        'wrong[f"leaves {name} text tokens that are no prefix"] = ~prefix[:, :1].all()',
        ("models/test_zoo.py::test_a_mask_with_a_hole_is_never_taken_for_a_prefix",),
    ),
    Mutation(
        "hidden video tokens unseen",
        "ops/text_lengths.py",
        'wrong["hides video tokens"] = ~video.all()',
        'wrong["hides video tokens"] = ~video.any()',
        ("models/test_zoo.py::test_a_mask_with_a_hole_is_never_taken_for_a_prefix",),
    ),
    Mutation(
        "a joint gate shifted",
        "calls.py",
        "(0, 0, layout.text_first, layout.text_last), value=rest",
        "(0, 0, layout.text_last, layout.text_first), value=rest",
        ("test_calls.py",),
    ),
    Mutation(
        "text's fine output gated away",
        "calls.py",
        "None if fine is None else gate_heads(fine, q, layout, 1.0)",
        "None if fine is None else gate_heads(fine, q, layout, 0.0)",
        ("models/test_knobs.py::test_fine_gates",),
    ),
    Mutation(
        "a mask that differs between queries taken for a key mask",
        "ops/text_lengths.py",
        "        if not torch.equal(rows, rows.any(-1, keepdim=True) & keys):\n            return None\n",
        "        if rows.numel() == 0:\n            return None\n",
        ("ops/test_text_lengths.py",),
    ),
    Mutation(
        "the last rule holds",
        "rules.py",
        "        for pattern, value in self.rules:\n            if any(",
        "        for pattern, value in reversed(self.rules):\n            if any(",
        ("models/test_knobs.py::test_dense_layers",),
    ),
    Mutation(
        "one compiled form for different builders",
        "wrapped.py",
        "key = (kind, tuple(rules.index(name) for name in names) if len(rules.rules) > 1 else ())",
        "key = (kind, ())",
        ("models/test_knobs.py::test_builders_by_name",),
    ),
    Mutation(
        "dense steps one too few",
        "steps.py",
        "self._set(step + 1 < self.dense_until(steps))",
        "self._set(step + 2 < self.dense_until(steps))",
        ("models/test_knobs.py::test_no_dense_step_and_all_dense_steps",),
    ),
)
