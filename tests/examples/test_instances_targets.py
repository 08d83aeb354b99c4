"""What a detector learns from: which box answers for what, in numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.instances.targets import BACKGROUND, IGNORED, assign, box_iou, sample


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_iou_of_known_boxes():
    first = torch.tensor([[0.0, 0, 10, 10], [0, 0, 0, 0]])
    second = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    expected = torch.tensor([[1, 1 / 3, 0], [0, 0, 0]])
    torch.testing.assert_close(box_iou(first, second), expected)


def test_a_box_is_for_the_thing_it_covers_best():
    overlap = torch.tensor([[0.9, 0.75], [0.4, 0.1], [0.29, 0.0], [0.71, 0.72]])
    found = assign(overlap, positive=0.7, negative=0.3, lowest=0.3)
    # The second thing's best is the first box: its own best rule takes it from the first thing.
    assert found.tolist() == [1, IGNORED, BACKGROUND, 1]


def test_a_thing_no_box_covers_well_gets_its_best():
    overlap = torch.tensor([[0.35, 0.0], [0.2, 0.25], [0.35, 0.1]])
    assert assign(overlap, 0.7, 0.3, lowest=0.3).tolist() == [0, BACKGROUND, 0]
    assert assign(overlap, 0.7, 0.3, lowest=0.5).tolist() == [IGNORED, BACKGROUND, IGNORED]


def test_without_things_all_is_background():
    assert assign(torch.zeros(3, 0), 0.7, 0.3, 0.3).tolist() == [BACKGROUND] * 3


@given(
    kinds=st.lists(st.sampled_from([IGNORED, BACKGROUND, 0, 1, 2]), max_size=40),
    number=st.integers(1, 20),
)
def test_samples_are_of_their_kind_and_not_too_many(kinds, number):
    assigned = torch.tensor(kinds, dtype=torch.long)
    positive, negative = sample(assigned, number, 0.25, generator())
    assert (assigned[positive] >= 0).all()
    assert (assigned[negative] == BACKGROUND).all()
    assert len(positive) == min(number // 4, sum(k >= 0 for k in kinds))
    assert len(negative) == min(number - len(positive), kinds.count(BACKGROUND))
    assert len(set(positive.tolist())) == len(positive)


def test_samples_differ_by_generator_alone():
    assigned = torch.full((200,), BACKGROUND)
    first, again, other = (sample(assigned, 9, 0.5, generator(s))[1].tolist() for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("positive", [True, False])
def test_nothing_to_sample(positive):
    assigned = torch.tensor([0] if positive else [], dtype=torch.long)
    found = sample(assigned, 8, 0.5, generator())
    assert [len(part) for part in found] == [int(positive), 0]
