"""Counter-based random numbers against known answers, and their independence of how the work is split."""

import numpy as np
import pytest
import torch
from scipy import stats

from mixflow.runtime.seeds import Stream, normal, permutation, philox4x32, random_words, uniform


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # the known answers that come with Random123, the authors' own library
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == answer


def test_normal_draws_are_standard_normal():
    draws = normal(3, Stream.NOISE, 0, torch.arange(2000), (1, 10, 10)).flatten().double().numpy()
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert abs(stats.kurtosis(draws)) < 0.03
    # Box-Muller makes pairs: they must not be correlated.
    pairs = draws.reshape(2000, 2, 50)
    assert abs(np.corrcoef(pairs[:, 0].ravel(), pairs[:, 1].ravel())[0, 1]) < 0.01


def test_uniform_draws_are_uniform_and_below_one():
    draws = uniform(5, Stream.TIME, 7, torch.arange(100_000)).flatten().double().numpy()
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert draws.min() >= 0.0
    assert draws.max() < 1.0


def test_draws_depend_on_the_index_alone():
    whole = normal(1, Stream.NOISE, 4, torch.arange(10), (3, 5, 5))
    parts = torch.cat([normal(1, Stream.NOISE, 4, torch.tensor([i]), (3, 5, 5)) for i in range(10)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole.flip(0), normal(1, Stream.NOISE, 4, torch.arange(9, -1, -1), (3, 5, 5)))


def test_more_numbers_continue_the_same_sequence():
    few = random_words(1, Stream.NOISE, 0, torch.arange(4), 6)
    many = random_words(1, Stream.NOISE, 0, torch.arange(4), 1000)
    assert torch.equal(few, many[:, :6])


@pytest.mark.parametrize("other", [(2, Stream.NOISE, 0), (1, Stream.TIME, 0), (1, Stream.NOISE, 1), (1 + 2**32, 0, 0)])
def test_seed_stream_and_step_all_matter(other):
    indices = torch.arange(1000)
    a, b = uniform(1, Stream.NOISE, 0, indices), uniform(other[0], Stream(other[1]), other[2], indices)
    assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 0.15
    assert not torch.equal(a, b)


def test_permutation_is_a_permutation_that_changes_by_epoch():
    first, second = (permutation(0, Stream.DATA_ORDER, epoch, 1000) for epoch in (0, 1))
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, permutation(0, Stream.DATA_ORDER, 0, 1000))
