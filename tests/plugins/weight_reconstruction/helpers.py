"""What the tests of weight reconstruction share."""

import copy
import threading

import torch
from torch import nn

from compress_core import create_compressed_model


def section(level=0.6, *, adapt=False, algorithm="magnitude_sparsity", **reconstruction):
    initializer = {"weight_reconstruction": {"num_samples": 64, **reconstruction}}
    if adapt:
        initializer["batchnorm_adaptation"] = {"num_bn_adaptation_samples": 64}
    params = {"sparsity_target": level, "sparsity_level_setting_mode": "local"}
    return {"algorithm": algorithm, "sparsity_init": level, "params": params, "initializer": initializer}


def create(model, data, *sections, **options):
    sections = sections or (section(),)
    controller, _ = create_compressed_model(model, {"compression": list(sections)}, init_loader=data, **options)
    report = controller.statistics().weight_reconstruction.report
    assert not [t for t in threading.enumerate() if t.name == "weight reconstruction"]
    return controller, report


def batches(*shape, count=6, size=16, seed=3):
    generator = torch.Generator().manual_seed(seed)
    # Correlated inputs, with a mean: otherwise nothing can make up for what is removed.
    x = torch.randn(count * size, *shape, generator=generator)
    for dim in range(1, x.ndim):
        x = x + 0.8 * x.roll(1, dim) + 0.5 * x.roll(2, dim)
    return list((x / x.std() + 0.3).split(size))


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval()


class ConvNet(nn.Module):
    """Convolutions with and without batch norm, a residual block, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.conv2(self.norm1(self.conv1(x)).relu())
        return self.fc(x.relu().mean((2, 3)))


def trained_convnet():
    model = seeded(ConvNet)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.train()
        for batch in batches(3, 8, 8, count=40, seed=9):
            model(batch)
    return model.eval()


def tensors(model):
    return {name: tensor.detach().clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def output_error(model, original, data):
    with torch.no_grad():
        pairs = [(model(batch), original(batch)) for batch in data]
    wanted = torch.cat([b for _, b in pairs])
    return float((torch.cat([a for a, _ in pairs]) - wanted).square().mean() / wanted.var())


def copied(model):
    return copy.deepcopy(model)
