"""Dropout and stochastic depth by sample: how often, how strong, and the same however a batch is cut up."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import nn

from hybrid_dist.model.noise import Noise, SampleDropout, SampleDropPath, mix, sample_keys, seed_draws

CPU = torch.device("cpu")


class Net(nn.Module):
    """Two layers of each kind, one dropout over windows."""

    def __init__(self) -> None:
        super().__init__()
        self.drops = nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.0))
        self.paths = nn.Sequential(DropPath(0.3), DropPath(0.3), DropPath(0.0))


def made() -> tuple[Net, Noise]:
    net, noise = Net(), Noise()
    noise.attach(net)
    return net, noise


def test_draws_are_those_of_the_published_generator() -> None:
    """SplitMix64's first outputs for the seed 1234567, as its authors' C code gives them."""
    golden = 0x9E3779B97F4A7C15 - (1 << 64)
    given = mix(torch.arange(1, 6) * golden + 1234567).tolist()
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [value % (1 << 64) for value in given] == expected


def test_so_many_are_dropped_and_the_rest_makes_up_for_it() -> None:
    """Catches a wrong rate, a missing scale, and two layers, samples or steps that drop alike."""
    net, noise = made()
    first, second = net.drops[0], net.drops[1]
    assert isinstance(first, SampleDropout) and type(net.drops[2]) is nn.Dropout
    noise.begin(sample_keys(3, 0, 400, CPU))
    ones = torch.ones(400, 50, 20)
    dropped, other = first(ones), second(ones)
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert abs((dropped == 0).float().mean().item() - 0.2) < 0.003  # 400,000 draws: five standard deviations
    for axis in ((1, 2), (0,)):  # no sample and no place is dropped much more often than another
        assert (dropped == 0).float().mean(axis).std() < 0.03
    for pair in (other, first(ones.roll(1, 0)).roll(1, 0)):
        both = ((dropped == 0) & (pair == 0)).float().mean().item()
        assert abs(both - 0.04) < 0.002
    path = net.paths[0]
    assert isinstance(path, SampleDropPath) and type(net.paths[2]) is DropPath
    noise.begin(sample_keys(4, 0, 100_000, CPU))
    kept, else_kept = path(torch.ones(100_000, 1, 1, 1)), net.paths[1](torch.ones(100_000, 1, 1, 1))
    assert torch.allclose(kept.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert abs((kept == 0).float().mean().item() - 0.3) < 0.008
    assert abs(((kept == 0) & (else_kept == 0)).float().mean().item() - 0.09) < 0.005
    before = kept
    noise.begin(sample_keys(5, 0, 100_000, CPU))
    assert abs(((path(torch.ones(100_000, 1)) == 0) & (before.flatten(1) == 0)).float().mean().item() - 0.09) < 0.005


def test_masks_do_not_know_the_micro_batch() -> None:
    """A batch in one and in pieces, with four windows a sample, drops the same; evaluation and no keys do as ever."""
    net, noise = made()
    drop, path = net.drops[0], net.paths[0]
    images = torch.randn(24, 3, 5)
    windows = torch.randn(24 * 4, 7)

    def run(sizes: list[int]) -> torch.Tensor:
        outputs, at = [], 0
        for size in sizes:
            noise.begin(sample_keys(9, at, size, CPU))
            rows = slice(at, at + size)
            cut = (drop(images[rows]), path(images[rows]), drop(windows[4 * at : 4 * (at + size)]))
            outputs.append(torch.cat([each.reshape(size, -1) for each in cut], 1))
            at += size
        return torch.cat(outputs)

    whole = run([24])
    assert (whole == 0).any()
    for sizes in ([8, 8, 8], [1] * 24, [16, 8]):
        assert torch.equal(run(sizes), whole)
    noise.end()
    torch.manual_seed(1)
    torch_made = drop(images)
    torch.manual_seed(1)
    assert torch.equal(torch_made, nn.functional.dropout(images, 0.2))
    noise.begin(sample_keys(9, 0, 24, CPU))
    net.eval()
    assert torch.equal(drop(images), images) and torch.equal(path(images), images)


def test_what_a_backbone_draws_itself_follows_from_the_seed() -> None:
    """Catches: a generator that is not the one that dropout draws from, which a resume would find in another state."""
    ones = torch.ones(1000)
    drawn = []
    for seed in (3, (1 << 62) - 1, 3):
        seed_draws(seed, torch.device("cpu"))
        drawn.append(nn.functional.dropout(ones))
    torch.manual_seed(3)
    assert torch.equal(drawn[0], nn.functional.dropout(ones))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
