"""torch.compile, autocast, accumulation, several processes, other algorithms, and a real training run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from benchmarks.distillation import few_labels, student_after
from compress_core import ModelError, create_compressed_model, register_default_init_args
from examples.common.datasets import digits
from examples.common.networks import demo_network
from examples.common.training import accuracy
from examples.common.training import train as train_epochs
from tests.integration.processes import as_rank, run_in_processes
from tests.plugins.knowledge_distillation.helpers import create, images, make, section

SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, "params": {"sparsity_target_epoch": 4}}
VALUES = {
    "type": "softmax",
    "temperature": 3.0,
    "features": [{"student": "block*", "type": "attention", "scale": 50.0}],
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_compiled_model_learns_the_same():
    controller, model = create(make(), SPARSE, **VALUES)
    model.dropout.p = 0.0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for factor in (1, 2):
        model(factor * images())
        loss = controller.loss()
        expected = gradients(model, loss)
        compiled(factor * images())
        found = controller.loss()
        torch.testing.assert_close(found, loss)
        for name, gradient in gradients(model, found).items():
            torch.testing.assert_close(gradient, expected[name], msg=name)


def test_autocast_compares_in_float32_and_learns():
    controller, model = create(make(), SPARSE, **VALUES)
    model.dropout.p = 0.0
    model(images())
    expected = controller.loss()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(images())
        inside = controller.loss()
    assert outputs.dtype == torch.bfloat16 and inside.dtype == torch.float32
    torch.testing.assert_close(inside, expected, rtol=0.05, atol=0.0)
    torch.testing.assert_close(controller.loss(), expected, rtol=0.05, atol=0.0)
    assert all(gradient.isfinite().all() for gradient in gradients(model, inside).values())


def test_accumulated_gradients_are_those_of_all_micro_batches():
    controller, model = create(make(), SPARSE, type="mse", features=[{"student": "block1"}])
    model.dropout.p = 0.0
    for module in model.modules():
        module.training = module is model  # batch norm sees one micro-batch at a time
    model(images(8))
    expected = gradients(model, controller.loss())
    model.zero_grad()
    for micro in images(8).split(2):
        model(micro)
        (controller.loss() / 4).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def worker(rank, folder):
    with as_rank(rank, folder):
        found = step_of(rank, DistributedDataParallel)
        torch.save(found, f"{folder}/rank{rank}.pt")


def step_of(rank, wrap):
    """Returns the gradients after one step on this rank's half of the samples, or on all of them."""
    controller, model = create(make(), SPARSE, **VALUES)
    model.dropout.p = 0.0
    wrapped = wrap(model)
    model.eval()
    model.training = wrapped.training = True
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    x = images(8)
    wrapped(x if rank is None else x[4 * rank : 4 * rank + 4])
    return gradients(model, controller.loss())


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    run_in_processes(worker, (str(tmp_path),), 2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = step_of(None, lambda model: model)
    for name, gradient in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_beside_sparsity_pruning_and_quantization_in_one_config():
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"prune_first_conv": True, "multiple_of": 1},
    }
    document = {"compression": [{"algorithm": "quantization"}, section(**VALUES), SPARSE, pruning]}
    config = register_default_init_args(document, [images(8)] * 2)
    controller, model = create_compressed_model(make(), config)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(8):
        controller.scheduler.epoch_step()
        controller.scheduler.step()
        optimizer.zero_grad()
        model(images(8))
        loss = controller.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    x = images(8)
    torch.testing.assert_close(controller.strip().eval()(x), model.eval()(x), rtol=0.02, atol=0.05)


def test_after_channels_are_gone_outputs_and_attention_go_on_and_others_say_why_not():
    pruning = {
        "algorithm": "filter_pruning",
        "pruning_init": 0.5,
        "params": {"prune_first_conv": True, "multiple_of": 1},
    }
    for kind in ("attention", "mse"):
        features = [{"student": ["block1", "block2"], "type": kind}]
        document = {"compression": [pruning, section(type="mse", features=features)]}
        controller, model = create_compressed_model(make(), register_default_init_args(document, [images(8)] * 2))
        model.dropout.p = 0.0
        model(images(8))
        controller.loss()
        before = controller.statistics().to_dict()["knowledge_distillation"]["losses"]
        controller.shrink()
        assert model.block1[0].out_channels < 6
        model(images(8))
        if kind == "mse":
            with pytest.raises(
                ModelError, match=r"'?block1 <- block1 \(mse\)'? has the shape .* or the type attention"
            ):
                controller.loss()
            continue
        assert controller.loss() > 0
        after = controller.statistics().to_dict()["knowledge_distillation"]["losses"]
        assert after["output"] == pytest.approx(before["output"], rel=1e-3)
        gradients(model, controller.loss())


@pytest.mark.slow
def test_distillation_improves_a_sparse_network_over_the_same_run_without():
    """Digits, 95 % sparse, five epochs; benchmarks/distillation.py has more seeds and losses."""
    data = digits()
    torch.manual_seed(0)
    teacher = demo_network("digits")
    train_epochs(teacher, data.loader(train=True, batch_size=128, shuffle=True), epochs=15, max_lr=0.2)
    assert accuracy(teacher, data.test) > 97
    batches = few_labels(data, len(data.train[0]), 128)
    results = {
        distill: [student_after(copy.deepcopy(teacher), batches, data.test, distill, seed, 5) for seed in range(3)]
        for distill in (False, True)
    }
    assert min(results[True]) > max(results[False])
    assert sum(results[True]) / 3 > sum(results[False]) / 3 + 1
