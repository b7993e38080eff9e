"""Packed rows hold every token once, in its place, and little else."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pytest
from conftest import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st

from jlrm.model.visibility import prefix_align
from jlrm.runtime.mesh import training_layout
from jlrm.training.packing import GROWTH, Group, Packed, pack, row_sizes, shapes, spread

IDS = st.integers(1, 99)
GROUPS = st.lists(
    st.builds(
        Group,
        st.lists(IDS, min_size=1, max_size=70),
        st.lists(st.lists(IDS, min_size=1, max_size=40), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=6,
)
SIZES = st.sampled_from([[128], [256], [128, 256, 512]])


def seen_by(packed: Packed, at: tuple[int, int], query: int) -> np.ndarray:
    """Return the slots that a query sees, by the definition of packed attention."""
    group, start = (x[at] for x in packed.rows.packing[:2])
    keys = np.arange(len(group))
    is_prompt = keys < packed.rows.packing.prefix[at]
    same = (group == group[query]) & (group > 0)
    return np.flatnonzero(same & (keys <= query) & (is_prompt | (keys >= start[query])))


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, sizes=SIZES, num_rows=st.integers(1, 4))
def test_every_target_is_predicted_from_its_prompt_and_what_came_before(groups, sizes, num_rows):
    packed = pack(groups, sizes, num_rows)
    rows = packed.rows
    flat = [(g.prompt, ids) for g in groups for ids in g.completions]
    met = set()
    for a, b, c in np.argwhere(packed.is_target):
        number, offset = packed.completion[a, b, c], packed.offset[a, b, c]
        prompt, ids = flat[number]
        met.add((number, offset))
        assert rows.targets[a, b, c] == ids[offset]
        slots = seen_by(packed, (a, b), rows.sources[a, b, c])
        order = slots[np.argsort(rows.positions[a, b, slots])]
        wanted = [*prompt, *ids[:offset]]
        assert rows.tokens[a, b, order].tolist() == wanted
        assert rows.positions[a, b, order].tolist() == list(range(len(wanted)))
        assert c < rows.count[a] and a < rows.num_passes
    assert met == {(n, t) for n, (_, ids) in enumerate(flat) for t in range(len(ids))}
    assert len(met) == packed.is_target.sum()
    assert packed.num_tokens == (rows.packing.group > 0).sum()
    assert not np.any(rows.packing.prefix % prefix_align(rows.tokens.shape[2]))


@settings(deadline=None, max_examples=30)
@given(groups=GROUPS, num_rows=st.integers(1, 3))
def test_completions_of_a_row_are_numbered_apart(groups, num_rows):
    packed = pack(groups, [128], num_rows)
    for at in np.ndindex(packed.completion.shape[:2]):
        here = packed.is_target[at]
        pairs = set(zip(packed.completion[at][here], packed.rows.sequence[at][here], strict=True))
        assert len(pairs) == len({number for number, _ in pairs}) == len({s for _, s in pairs})


def test_values_are_laid_out_beside_their_targets():
    groups = [Group([1, 2], [[3, 4], [5]]), Group([6], [[7, 8, 9]])]
    packed = pack(groups, [128], 1)
    per_token = np.arange(9, dtype=np.float32).reshape(3, 3) + 1
    per_completion = np.array([10.0, 20.0, 30.0], np.float32)
    where = packed.is_target
    found = dict(
        zip(
            packed.rows.targets[where].tolist(),
            zip(packed.take(per_token)[where], packed.take(per_completion)[where], strict=True),
            strict=True,
        )
    )
    assert found == {3: (1, 10), 4: (2, 10), 5: (4, 20), 7: (7, 30), 8: (8, 30), 9: (9, 30)}
    assert not packed.take(per_token)[~where].any()


def test_a_group_longer_than_a_row_is_cut_and_its_prompt_repeated():
    group = Group([1] * 60, [[2] * 30 for _ in range(8)])
    packed = pack([group], [128], 1)
    assert packed.rows.num_passes == 4  # two completions a row
    assert packed.num_tokens == 4 * (60 + 2 * 29)


def test_a_sequence_longer_than_any_row_is_refused():
    with pytest.raises(ValueError, match="longer than 256 slots"):
        pack([Group([1] * 200, [[2] * 100])], [128, 256], 1)


@pytest.mark.parametrize(
    "longest", [(1024, 2048), (1024, 512), (40, 24), (1, 1), (300, 9000), (4500, 4500)]
)
@pytest.mark.parametrize("pack_tokens", [0, 128, 5000])
def test_row_sizes_are_few_and_hold_the_longest_sequence(longest, pack_tokens):
    sizes = row_sizes(*longest, most_tokens=20000, pack_tokens=pack_tokens)
    assert sizes == sorted(set(sizes)) and all(size % 128 == 0 for size in sizes)
    assert all(b >= min(GROWTH * a, a + 128) for a, b in itertools.pairwise(sizes))
    prompt, completion = longest
    pack([Group([1] * prompt, [[2] * completion])], sizes, 1)


def test_what_a_batch_costs_is_logged():
    """Eight groups of a whole row: two passes of three rows hold eight rows, one is empty."""
    groups = [Group([1] * 28, [[2] * 101]) for _ in range(8)]
    packed = pack(groups, [128], 3)
    assert packed.num_tokens == 8 * 128
    assert packed.metrics == {
        "perf/passes": 3,
        "perf/row_tokens": 128,
        "perf/padding": pytest.approx(1 / 9),
    }
    half = pack([Group([1] * 20, [[2] * 45])], [128], 1)
    assert half.metrics["perf/padding"] == pytest.approx(0.5)


def test_a_row_may_be_full_to_the_last_slot():
    assert pack([Group([1] * 28, [[2] * 101])], [128], 1).rows.num_passes == 1
    with pytest.raises(ValueError, match="longer than 128 slots"):
        pack([Group([1] * 29, [[2] * 101])], [128], 1)
    # One slot, and a target more than there are slots in a row.
    full, more = ([[2]] * 128, [[2]] * 129)
    assert pack([Group([1], full)], [128], 1).rows.num_passes == 1
    assert pack([Group([1], more)], [128], 1).rows.num_passes == 2


def test_what_is_cut_off_a_group_fills_a_row_as_well():
    """Both completions fill a row with their prompt; a group of one slot needs a third."""
    groups = [Group([1] * 28, [[2] * 101] * 2), Group([1], [[2]])]
    assert pack(groups, [128], 1).rows.num_passes == 3


def test_of_sizes_that_compute_the_same_the_longer_takes_fewer_passes():
    groups = [Group([1] * 28, [[2] * 101]) for _ in range(4)]
    packed = pack(groups, [128, 256], 1)
    assert packed.rows.tokens.shape[2] == 256 and packed.rows.num_passes == 2
    # 384 slots would hold them in two passes too, but compute more.
    assert pack(groups, [128, 256, 384], 1).rows.tokens.shape[2] == 256


def test_arrays_have_two_shapes_at_most():
    """One pass, or the most there can be: as many rows as completions."""
    groups = [Group([1] * 28, [[2] * 101]) for _ in range(7)]
    assert pack(groups[:2], [128], 2).rows.tokens.shape == (1, 2, 128)
    assert pack(groups, [128], 2).rows.tokens.shape == (4, 2, 128)
    several = [Group([1], [[2] * 60, [3] * 60]) for _ in range(5)]
    assert pack(several, [128], 2).rows.tokens.shape == (5, 2, 128)
    assert pack(several, [128], 2).rows.num_passes == 3


def test_the_fullest_row_of_a_pass_is_counted():
    groups = [Group([1] * 8, [[2] * 100]), Group([1] * 100, [[2] * 9]), Group([1] * 90, [[2] * 5])]
    packed = pack(groups, [128], 2)
    assert packed.rows.count[: packed.rows.num_passes].tolist() == [100, 5]


@pytest.mark.parametrize(
    ("longest", "most_tokens", "pack_tokens", "platform", "largest"),
    [
        ((40, 24), 20000, 0, "cpu", 1536),
        ((40, 24), 20000, 0, "tpu", 6144),
        ((40, 24), 20000, 0, "gpu", 6144),
        ((40, 24), 700, 0, "tpu", 768),  # a batch never fills more
        ((40, 24), 768, 0, "tpu", 768),
        ((40, 24), 769, 0, "tpu", 896),
        ((40, 24), 20000, 1000, "tpu", 1024),
        ((64, 192), 100, 100, "tpu", 256),  # the longest sequence has room
        ((64, 193), 100, 100, "tpu", 384),
    ],
)
def test_the_longest_row(longest, most_tokens, pack_tokens, platform, largest):
    assert row_sizes(*longest, most_tokens, pack_tokens, platform)[-1] == largest


def test_lengths_grow_by_blocks_then_by_a_share():
    sizes = row_sizes(40, 24, 20000, 6144)
    assert sizes[:3] == [768, 896, 1024] and sizes[-2:] == [5632, 6144]  # from an eighth on
    for smaller, larger in itertools.pairwise(sizes):
        # The next block below a GROWTH-th: no length is left out, none is too near.
        assert smaller == max(int(larger / GROWTH) // 128 * 128, 128)


@settings(deadline=None, max_examples=60)
@given(groups=GROUPS, sizes=SIZES, num_rows=st.integers(1, 4))
def test_every_shape_that_a_batch_has_is_known_before(groups, sizes, num_rows):
    packed = pack(groups, sizes, num_rows)
    num_passes, _, size = packed.rows.tokens.shape
    num_completions = sum(len(group.completions) for group in groups)
    assert (num_passes, size) in shapes(sizes, num_completions, num_rows)


def test_several_passes_are_of_long_rows_alone():
    """Two passes of short rows would be one of long ones, so their programs are never needed."""
    assert shapes([128, 256, 384, 512], 6, 2) == [(3, 512), (3, 384), (1, 256), (1, 128)]
    assert shapes([128, 256], 2, 2) == [(1, 256), (1, 128)]


@pytest.fixture(scope="module")
def real_lengths(reference) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of real pairs as judge prompts and of written reviews of them, 4/3 tokens a word."""
    with gzip.open(reference / "train" / "vicuna80_reviews.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    parts = "question_body", "answer1_body", "answer2_body"
    prompts = [sum(len(row[part].split()) for part in parts) + 230 for row in rows]
    judgements = [len(row["text"].split()) + 10 for row in rows]
    return np.array(prompts) * 4 // 3, np.array(judgements) * 4 // 3


@pytest.mark.slow
@pytest.mark.parametrize(("num_prompts", "num_rows"), [(16, 1), (16, 4), (64, 16)])
@pytest.mark.parametrize("limit", [512, 2048])
def test_padding_is_below_a_tenth_on_real_lengths(real_lengths, num_prompts, num_rows, limit):
    prompts, judgements = np.clip(real_lengths[0], 1, 1024), np.clip(real_lengths[1], 1, limit)
    rng = np.random.default_rng(0)
    per_row = -(-num_prompts // num_rows) * (1024 + 8 * limit)
    sizes = row_sizes(1024, limit, per_row)
    computed = used = 0
    for _ in range(10):
        groups = [
            Group([1] * rng.choice(prompts), [[2] * n for n in rng.choice(judgements, 8)])
            for _ in range(num_prompts)
        ]
        packed = pack(groups, sizes, num_rows)
        _, _, num_slots = packed.rows.tokens.shape
        computed += int(packed.rows.num_passes) * num_rows * num_slots
        used += packed.num_tokens
    assert 1 - used / computed < 0.1


@pytest.mark.parametrize("num_dimensions", [1, 2, 3, 4])
def test_arrays_lie_by_row_and_numbers_everywhere(num_dimensions):
    layout = training_layout(mesh_of(2, 2, 2))
    found = spread(layout, num_dimensions).spec
    if num_dimensions < 2:
        assert found == layout.replicated().spec
    else:
        assert len(found) == num_dimensions and found[1] and not any((found[0], *found[2:]))


def test_no_pair_is_cut_where_a_loss_compares_within_a_row():
    long = [Group([1] * 60, [[2] * 40, [3] * 40])]
    assert pack(long, [128], 1).rows.num_passes == 2
    with pytest.raises(ValueError, match="group is longer than 128"):
        pack(long, [128], 1, is_whole=True)
    rows = pack(long, [128, 256], 1, is_whole=True).rows
    assert rows.num_passes == 1 and rows.tokens.shape[-1] == 256
