"""The Triton mask is Philox-4x32-10 of (seed, column // 8, position, salt), whatever the blocks and the company."""

import pytest
import torch
from oracle import DEVICE, DTYPES, assert_no_further_from_truth, guarded
from torch import Tensor

from peft_kernels.gpu._philox import scale_of, threshold_of
from peft_kernels.gpu.dropout import Tile, launch_dropout, launch_keep_mask

SEEDS = [7, -(2**62) - 5, 2**63 - 1]
SALT = 2**63 + 2**33 + 9
WORD = 0xFFFFFFFF


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011, section 3.3) in int64, whose products wrap and keep all 64 bits."""
    c0, c1, c2, c3 = (word & WORD for word in counter)
    k0, k1 = (word & WORD for word in key)
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (right >> 32) & WORD ^ c1 ^ k0,
            right & WORD,
            (left >> 32) & WORD ^ c3 ^ k1,
            left & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1, c2, c3]


def philox_numbers(M: int, K: int, seeds: Tensor, rows_per_sample: int, salt: int) -> Tensor:
    """(M, K): element (m, k) has the 16-bit number k % 8 of the draw k // 8 of its row."""
    row, column = torch.arange(M)[:, None], torch.arange(K)[None, :]
    seed = seeds.cpu()[row // rows_per_sample] if M else torch.zeros(0, 1, dtype=torch.int64)
    zero = torch.zeros(M, K, dtype=torch.int64)
    counter = [zero + column // 8, zero + row % rows_per_sample, zero + (salt & WORD), zero + (salt >> 32 & WORD)]
    words = torch.stack(philox(counter, [zero + seed, zero + (seed >> 32)]), -1)
    word = words.gather(-1, (zero + column % 8 // 2)[..., None])[..., 0]
    return torch.where(column % 2 == 0, word, word >> 16) & 0xFFFF


def philox_keep_reference(M: int, K: int, p: float, seeds: Tensor, rows_per_sample: int, salt: int) -> Tensor:
    """(M, K) bool: kept where the number is at least the threshold."""
    return philox_numbers(M, K, seeds, rows_per_sample, salt) >= round(p * 65536)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([WORD] * 4, [WORD] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_reference_is_philox(counter, key, expected):
    """The known answers that Salmon et al. publish with Random123."""
    words = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert [int(word) for word in words] == expected


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.999])
@pytest.mark.parametrize(("rows", "K"), [(0, 8), (1, 1), (5, 7), (17, 129)])
def test_mask_equals_the_reference_bit_for_bit(rows, K, p):
    seeds = torch.tensor(SEEDS, device=DEVICE)
    mask = launch_keep_mask(3 * rows, K, p, seeds, rows, SALT, DEVICE)
    assert mask.dtype == torch.bool
    assert torch.equal(mask.cpu(), philox_keep_reference(3 * rows, K, p, seeds, rows, SALT))


@pytest.mark.parametrize("column", range(8))
def test_a_number_equal_to_the_threshold_is_kept(column):
    seeds = torch.tensor([3], device=DEVICE)
    number = int(philox_numbers(1, 8, seeds, 1, 0)[0, column])
    for threshold, kept in ((number, True), (number + 1, False)):
        assert launch_keep_mask(1, 8, threshold / 65536, seeds, 1, 0, DEVICE)[0, column].item() is kept


@pytest.mark.parametrize("tile", [Tile(rows=16, columns=8), Tile(rows=64, columns=16), Tile(rows=4, columns=256)])
def test_mask_knows_nothing_of_blocks(tile):
    seeds = torch.tensor(SEEDS, device=DEVICE)
    usual = launch_keep_mask(3 * 11, 75, 0.5, seeds, 11, SALT, DEVICE)
    assert torch.equal(launch_keep_mask(3 * 11, 75, 0.5, seeds, 11, SALT, DEVICE, tile=tile), usual)


def test_mask_knows_nothing_of_the_batch():
    """A sample's mask is the same alone, in company, padded on the right, and whatever the number of columns."""
    seeds = torch.tensor(SEEDS, device=DEVICE)
    batch = launch_keep_mask(3 * 20, 64, 0.3, seeds, 20, 5, DEVICE).view(3, 20, 64)
    for one, seed in zip(batch, seeds, strict=True):
        assert torch.equal(launch_keep_mask(20, 64, 0.3, seed[None], 20, 5, DEVICE), one)
        assert torch.equal(launch_keep_mask(33, 64, 0.3, seed[None], 33, 5, DEVICE)[:20], one)
        assert torch.equal(launch_keep_mask(20, 80, 0.3, seed[None], 20, 5, DEVICE)[:, :64], one)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_rate_per_row_and_per_column(p):
    seeds = torch.arange(8, device=DEVICE)
    mask = launch_keep_mask(8 * 64, 512, p, seeds, 64, 0, DEVICE, tile=Tile(rows=64, columns=256)).double()
    keep = 1 / scale_of(p)
    for rate, count in ((mask.mean(0), mask.shape[0]), (mask.mean(1), mask.shape[1])):
        assert ((rate - keep).abs() <= 5 * (keep * (1 - keep) / count) ** 0.5).all()


@pytest.mark.parametrize("other", [{"salt": 2}, {"salt": 1 + 2**32}, {"seed": 4}, {"seed": 3 + 2**32}])
def test_every_bit_of_seed_and_salt_counts(other):
    """Masks at p = 0.5 agree on half of the elements, within 5 sigma, where anything of their name differs."""
    name = {"seed": 3, "salt": 1}
    one, two = (
        launch_keep_mask(64, 256, 0.5, torch.tensor([n["seed"]], device=DEVICE), 64, n["salt"], DEVICE)
        for n in (name, name | other)
    )
    assert abs((one == two).double().mean() - 0.5) <= 5 * 0.5 / (64 * 256) ** 0.5


def test_neighbours_are_independent():
    """At p = 0.5 an element agrees with the one to its right, 2, … 8 further, and below, half of the time."""
    mask = launch_keep_mask(128, 256, 0.5, torch.tensor([11], device=DEVICE), 128, 1, DEVICE)
    pairs = [(mask[:, :-step], mask[:, step:]) for step in range(1, 9)] + [(mask[:-1], mask[1:])]
    for one, two in pairs:
        assert abs((one == two).double().mean() - 0.5) <= 5 * 0.5 / one.numel() ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_against_truth(dtype, p):
    torch.manual_seed(0)
    seeds = torch.tensor(SEEDS, device=DEVICE)
    x = torch.randn(3 * 13, 67, device=DEVICE, dtype=dtype)
    kept = philox_keep_reference(3 * 13, 67, p, seeds, 13, SALT).to(DEVICE)
    ours = launch_dropout(guarded(x), p, seeds, 13, SALT)
    truth = x.double() * kept * scale_of(p)
    assert_no_further_from_truth([truth], [x * kept * scale_of(p)], [ours])
    assert (ours[~kept] == 0).all()
    assert torch.equal(ours, launch_dropout(x, p, seeds, 13, SALT))


def test_dropout_drops_what_is_not_a_number():
    x = torch.full((4, 64), float("inf"), device=DEVICE)
    y = launch_dropout(x, 0.5, torch.tensor([1], device=DEVICE), 4, 0)
    assert set(y.unique().tolist()) == {0.0, float("inf")}


def test_without_dropout_the_result_is_a_copy():
    x = torch.randn(3, 5, device=DEVICE)
    y = launch_dropout(x, 0.0, None, 3, 0)
    assert torch.equal(x, y)
    assert x.data_ptr() != y.data_ptr()
    assert launch_dropout(x[:0], 0.5, torch.tensor([1], device=DEVICE), 0, 0).shape == (0, 5)


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (1e-6, 0), (0.05, 3277), (0.5, 32768), (1.0, 65536)])
def test_threshold(p, threshold):
    assert threshold_of(p) == threshold
    assert scale_of(p) == (65536 / (65536 - threshold) if threshold < 65536 else 0)
