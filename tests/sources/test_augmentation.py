import pytest
import torch

from lmc_curvature.sources import ImageDataset, make_model
from lmc_curvature.sources.augmentation import PADDING, Crops


def images(count=40, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def draw(count, seed=0):
    return Crops.draw(count, torch.Generator().manual_seed(seed))


def test_every_image_is_its_own_window_mirrored_or_not():
    before, crops = images(), draw(40)
    after = crops.apply(before, 0)
    for number, image in enumerate(before):
        padded = torch.zeros(3, 8 + 2 * PADDING, 8 + 2 * PADDING, dtype=torch.uint8)
        padded[:, PADDING:-PADDING, PADDING:-PADDING] = image
        row, column = int(crops.rows[number]), int(crops.columns[number])
        window = padded[:, row : row + 8, column : column + 8]
        assert torch.equal(after[number], window.flip(2) if crops.mirrored[number] else window)


def test_batches_of_any_size_are_augmented_alike():
    crops, data = draw(40), images()
    whole = crops.apply(data, 0)
    parts = torch.cat([crops.apply(part, start) for start, part in zip((0, 16, 32), data.split(16), strict=True)])
    assert torch.equal(whole, parts)


def test_draws_cover_every_window_and_both_sides_evenly():
    crops = draw(20_000)
    for edges in (crops.rows, crops.columns):
        counts = torch.bincount(edges, minlength=2 * PADDING + 1)
        assert len(counts) == 2 * PADDING + 1
        assert counts.min() > 0.9 * 20_000 / (2 * PADDING + 1)
    assert crops.mirrored.float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([crops.rows.float(), crops.columns.float()]))[0, 1]) < 0.03


def test_the_loader_normalises_after_augmenting():
    data = ImageDataset(images(), torch.arange(40) % 10, tuple("0123456789"), torch.full((3,), 0.5), torch.ones(3))
    crops = draw(40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    x = torch.cat([x for x, _ in data.batches(16, order=order, crops=crops)])
    expected = crops.apply(data.images[order], 0).float() / 255 - 0.5
    assert torch.allclose(x, expected, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_augments_alike():
    crops, data = draw(40), images()
    moved = crops.to(torch.device("cuda")).apply(data.cuda(), 0)
    assert torch.equal(moved.cpu(), crops.apply(data, 0))
    assert make_model("resnet20", width=2).cuda()(moved.float()).is_cuda
