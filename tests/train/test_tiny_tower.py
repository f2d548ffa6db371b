"""The tiny tower: what it is, that it learns, and that it can be had again."""

import pytest
import torch
import torch.nn.functional as F

from laco_kernels.hf.compress import layer_at
from laco_kernels.train import tiny_tower
from laco_kernels.train.digits import draw_digits


def test_the_papers_depths_are_layers_of_their_own():
    config = tiny_tower.build_tiny_tower().config
    assert [layer_at(1 / depth, config.num_hidden_layers) for depth in (12, 6, 4, 2)] == [1, 2, 3, 6]
    assert (config.image_size // config.patch_size,) * 2 == tiny_tower.GRID


def test_the_same_seed_gives_the_same_tower_and_leaves_the_callers_random_numbers():
    steps = []
    before = torch.get_rng_state()
    one = tiny_tower.pretrain_tiny_tower(steps=2, batch=2, on_step=lambda _, done: steps.append(done))
    assert torch.equal(torch.get_rng_state(), before)
    assert steps == [0, 0.5]
    torch.rand(1)
    again, other = (tiny_tower.pretrain_tiny_tower(steps=2, batch=2, seed=seed) for seed in (0, 1))
    for name, parameter in one.encoder.state_dict().items():
        assert torch.equal(parameter, again.encoder.state_dict()[name])
    assert one.accuracy == again.accuracy
    assert not torch.equal(one.reader.heads[0].weight, other.reader.heads[0].weight)
    assert not any(p.requires_grad for p in [*one.encoder.parameters(), *one.reader.parameters()])
    assert not one.encoder.training


def test_it_learns():
    def loss(tower, digits):
        with torch.no_grad():
            return float(F.cross_entropy(tower.reader(tower.encoder(digits.pixels).last_hidden_state).mT, digits.labels))

    digits = draw_digits(64, torch.Generator().manual_seed(7))
    start, later = (tiny_tower.pretrain_tiny_tower(steps=steps, batch=8) for steps in (1, 40))
    assert loss(later, digits) < loss(start, digits) - 0.05


def test_each_head_reads_the_mean_of_its_quadrant():
    reader = tiny_tower.QuadrantReader(5)
    tokens = torch.randn(2, 4 * 6, 5)
    logits = reader(tokens, (4, 6))
    image = tokens.view(2, 4, 6, 5)
    quadrants = [image[:, :2, :3], image[:, :2, 3:], image[:, 2:, :3], image[:, 2:, 3:]]
    expected = torch.stack([head(part.mean((1, 2))) for head, part in zip(reader.heads, quadrants, strict=True)], 1)
    torch.testing.assert_close(logits, expected)


def test_accuracy_is_the_share_of_digits_read_right():
    tower = tiny_tower.pretrain_tiny_tower(steps=1, batch=1)
    digits = tiny_tower.held_out_digits(20)
    with torch.no_grad():
        right = tower.reader(tower.encoder(digits.pixels).last_hidden_state).argmax(-1) == digits.labels
    assert tiny_tower.accuracy(tower.encoder, tower.reader, digits) == pytest.approx(int(right.sum()) / 80)


@pytest.mark.parametrize(("argument", "value"), [("steps", 0), ("batch", 1.5), ("seed", -1)])
def test_numbers_out_of_range(argument, value):
    with pytest.raises((TypeError, ValueError), match=f"{argument}: got"):
        tiny_tower.pretrain_tiny_tower(**{argument: value})
