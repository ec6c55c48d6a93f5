import pytest
import torch

from oprd.objectives.range_mass import BLOCK, mass_of_ranges, sorted_mass


def ranges_of(size, count, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.randint(size + 1, (2, 3, count), generator=generator)
    low[:, 0], high[:, 0] = 0, size  # everything
    low[:, 1], high[:, 1] = 5, 5  # nothing
    low[:, 2], high[:, 2] = size - 1, size
    return low, high


@pytest.mark.parametrize("size", [6, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 7])
def test_masses_and_gradients_equal_sums_over_tokens(size):
    torch.manual_seed(size)
    logits = torch.randn(3, size, dtype=torch.float64, requires_grad=True)
    rank = torch.randperm(size)
    low, high = ranges_of(size, 40, size)
    ours = mass_of_ranges(logits, rank, low, high)
    inside = (rank >= low.unsqueeze(2)) & (rank < high.unsqueeze(2))
    twin = (logits.softmax(-1).unsqueeze(1) * inside).sum(2)
    torch.testing.assert_close(ours, twin, atol=1e-12, rtol=1e-12)
    factor = torch.randn(3, 40, dtype=torch.float64)
    gradients = (torch.autograd.grad((factor * mass).sum(), logits)[0] for mass in (ours, twin))
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


def test_float32_keeps_small_ranges_behind_large_masses():
    """Relative to the range, however small: beside a certain token, within its block and blocks behind."""
    size = 4 * BLOCK
    logits = torch.full((1, size), -20.0)
    logits[0, 3] = 0.0
    order = torch.arange(size)
    low = torch.tensor([[4, 4, 4, 2 * BLOCK, 2 * BLOCK + 5]])
    high = torch.tensor([[6, BLOCK, 3 * BLOCK + 2, size, 2 * BLOCK + 6]])
    mass = sorted_mass(logits, order).of(low, high)
    expected = (high - low) * torch.exp(torch.tensor(-20.0, dtype=torch.float64))
    torch.testing.assert_close(mass, expected, atol=0, rtol=1e-5)
