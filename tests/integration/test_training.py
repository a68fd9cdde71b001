"""Real training runs on real data: the digits that scikit-learn bundles."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from compress_core import create_compressed_model
from examples.common.datasets import digits
from examples.common.networks import demo_network
from examples.common.training import accuracy, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained_digits():
    torch.manual_seed(0)
    data, model = digits(), demo_network("digits")
    train(model, data.loader(train=True, batch_size=128, shuffle=True), epochs=15, max_lr=0.2)
    return data, model


def config(samples, **params):
    return {
        "compression": {
            "algorithm": "magnitude_sparsity",
            "sparsity_init": 0.8,
            "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": samples}},
            "params": {"sparsity_target": 0.9, "sparsity_target_epoch": 2, **params},
        }
    }


def test_adaptation_and_fine_tuning_bring_the_accuracy_back(trained_digits):
    data, fp32 = trained_digits
    loader = data.loader(train=True, batch_size=64, shuffle=True)
    start = accuracy(fp32, data.test)
    assert start > 97
    _, plain = create_compressed_model(copy.deepcopy(fp32), config(0))
    controller, model = create_compressed_model(copy.deepcopy(fp32), config(256), init_loader=loader)
    broken, adapted = accuracy(plain, data.test), accuracy(model, data.test)
    assert broken < 60
    assert adapted > 93
    train(model, data.loader(train=True, batch_size=128), epochs=6, max_lr=0.05, controller=controller)
    assert controller.sparsity_level == pytest.approx(0.9, abs=1e-4)
    assert accuracy(model, data.test) > 95
    stripped = controller.strip()
    assert accuracy(stripped, data.test) == accuracy(model, data.test)
    zeros = sum(int((p == 0).sum()) for n, p in stripped.named_parameters() if p.ndim > 1)
    assert zeros == round(0.9 * sum(p.numel() for n, p in stripped.named_parameters() if p.ndim > 1))


def run_epochs(model, controller, optimizer, batches, epochs):
    """A loop without randomness."""
    for epoch in epochs:
        controller.scheduler.epoch_step()
        assert controller.scheduler.current_epoch == epoch
        for inputs, labels in batches:
            controller.scheduler.step()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()


@pytest.mark.parametrize(
    "params",
    [
        {"schedule": "polynomial"},
        {"schedule": "polynomial", "update_per_optimizer_step": True, "steps_per_epoch": 5},
        {"schedule": "adaptive"},
    ],
    ids=str,
)
def test_resumed_run_ends_in_the_same_bits(trained_digits, params, tmp_path):
    data, fp32 = trained_digits
    document = config(64, **params)
    if params["schedule"] == "adaptive":
        del document["compression"]["params"]["sparsity_target_epoch"]
    loader = data.loader(train=True, batch_size=64)
    batches = list(data.loader(train=True, batch_size=256))[:5]

    def start(state=None):
        torch.manual_seed(1)
        model = copy.deepcopy(fp32).train()
        extra = {"init_loader": loader} if state is None else {"compression_state": state}
        controller, model = create_compressed_model(model, document, **extra)
        return model, controller, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)

    model, controller, optimizer = start()
    run_epochs(model, controller, optimizer, batches, range(4))
    expected = model.state_dict()

    model, controller, optimizer = start()
    run_epochs(model, controller, optimizer, batches, range(2))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    (tmp_path / "compression.json").write_text(json.dumps(controller.get_compression_state()))
    del model, controller, optimizer

    model, controller, optimizer = start(json.loads((tmp_path / "compression.json").read_text()))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"], strict=True)
    optimizer.load_state_dict(checkpoint["optimizer"])
    run_epochs(model, controller, optimizer, batches, range(2, 4))
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_ema_and_swa_see_the_same_names(trained_digits):
    data, fp32 = trained_digits
    _, model = create_compressed_model(copy.deepcopy(fp32), config(0))
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    batches = list(data.loader(train=True, batch_size=256))[:3]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    for inputs, labels in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        average.update_parameters(model)
    assert [n for n, _ in average.module.named_parameters()] == [n for n, _ in fp32.named_parameters()]
    zeros = (average.module.layer2[0].conv2.weight == 0).float().mean()
    assert zeros > 0.5


def test_demo_prints_its_table_and_leaves_its_results(tmp_path, monkeypatch, capsys):
    from examples import demo

    monkeypatch.setitem(demo.RECIPES, "digits", (6, 3, False))
    for expected in ("FP32, 6 epochs of training", "FP32 (trained by an earlier run)"):
        monkeypatch.setattr("sys.argv", ["demo", "--runs", str(tmp_path)])
        demo.main()
        out = capsys.readouterr().out
        for part in (expected, "compressed, no adaptation", "32 samples", "2048 samples", "fine-tuned", "conv1.weight"):
            assert part in out
        for part in ("8 bits, one epoch", "half of the filters, stripped", "GFLOPs", "int8.onnx"):
            assert part in out
    report = json.loads((tmp_path / "digits" / "statistics.json").read_text())
    rows = {row["step"]: row["accuracy"] for row in report["steps"]}
    assert rows["compressed and adapted, 32 samples"] > rows["compressed, no adaptation"] + 20
    assert rows["half of the filters, adapted"] > rows["half of the filters, no adaptation"]
    assert rows["half of the filters, stripped: smaller tensors"] > rows["half of the filters, adapted"] + 20
    assert rows["8 bits, calibrated and adapted"] > rows[expected] - 3
    checkpoint = torch.load(tmp_path / "digits" / "compressed.pt", weights_only=True)
    assert set(checkpoint) == {"state_dict", "compression_state"}
    assert (tmp_path / "digits" / "demo.png").read_bytes().startswith(b"\x89PNG")
