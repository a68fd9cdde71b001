"""The callback for Lightning's Trainer, against the plain loop."""

import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")
import lightning.pytorch as pl
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.tuner import Tuner

from compress_core import StateError, UsageError
from compress_core.integrations import read_compression_state
from compress_core.integrations.lightning import CompressionCallback
from tests.integrations.plain_loop import (
    CONFIG,
    DISTILLED,
    PENALTY,
    SPARSITY,
    Network,
    assert_same_state,
    compressed,
    images,
    masks_and_scales,
    parameter_groups,
    saved_state,
    sgd,
    train,
)


@pytest.fixture(autouse=True)
def quiet():
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Module(pl.LightningModule):
    """A network that was compressed, and how it is trained; `returned` is what `training_step` returns."""

    def __init__(self, network, returned="tensor"):
        super().__init__()
        self.network, self.returned = network, returned
        self.lr = 0.05

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.network(batch[0]).float(), batch[1])
        return {"tensor": loss, "dict": {"loss": loss, "other": 1}, "nothing": None}[self.returned]

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.network(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(parameter_groups(self.network, 1e-3), lr=self.lr, momentum=0.9)


class Manual(Module):
    """Steps its optimizer itself, at each batch."""

    def __init__(self, network, controller):
        super().__init__(network)
        self.automatic_optimization, self.controllers = False, [controller]

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = F.cross_entropy(self.network(batch[0]), batch[1]) + self.controllers[0].loss()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def loader(batch=16):
    return DataLoader(TensorDataset(*images()), batch)


def trainer(folder, *callbacks, epochs=3, **options):
    """A Trainer of 6 optimizer steps in each epoch, each of two micro-batches."""
    defaults = {"accumulate_grad_batches": 2, "logger": False}
    if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
        defaults["enable_checkpointing"] = False
    return pl.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{**defaults, **options},
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("returned", ["tensor", "dict"])
def test_ends_with_the_bits_of_the_plain_loop(tmp_path, precision, returned):
    controller, network = compressed()
    trainer(tmp_path, CompressionCallback(controller), precision=precision).fit(Module(network, returned), loader())
    plain_controller, plain = compressed()
    optimizer = sgd(plain)
    train(plain_controller, plain, optimizer, 3, precision=torch.bfloat16 if precision == "bf16-mixed" else None)
    assert masks_and_scales(network)
    assert_same_state(network, plain)
    assert saved_state(controller) == saved_state(plain_controller)
    assert torch.equal(controller.strip().eval()(images(8)[0]), plain_controller.strip().eval()(images(8)[0]))


def test_distillation_sees_every_micro_batch_and_ends_as_in_the_plain_loop(tmp_path):
    controller, network = compressed(config=DISTILLED)
    trainer(tmp_path, CompressionCallback(controller), epochs=1).fit(Module(network), loader())
    plain_controller, plain = compressed(config=DISTILLED)
    train(plain_controller, plain, sgd(plain), 1)
    assert_same_state(network, plain)
    figures = [c.statistics().knowledge_distillation.to_dict() for c in (controller, plain_controller)]
    assert figures[0] == figures[1] and figures[0]["loss"] > 0


def test_an_optimizer_that_undoes_a_factor_on_gradients_is_warned_about(tmp_path, caplog):
    class Adaptive(Module):
        def configure_optimizers(self):
            return torch.optim.Adam(self.network.parameters(), 1e-3)

    controller, network = compressed(config=DISTILLED)
    trainer(tmp_path, CompressionCallback(controller), epochs=1).fit(Adaptive(network), loader())
    assert caplog.text.count("Adam takes nearly the same steps whatever the size of gradients") == 1


@pytest.mark.parametrize("kind", ["tensor", "dict", "manual"])
def test_the_loss_of_algorithms_counts_once_for_each_step(tmp_path, kind):
    controller, network = compressed(config=PENALTY)
    if kind == "manual":
        tested = trainer(tmp_path, CompressionCallback(controller), accumulate_grad_batches=1)
        tested.fit(Manual(network, controller), loader(32))
    else:
        trainer(tmp_path, CompressionCallback(controller)).fit(Module(network, kind), loader())
    plain_controller, plain = compressed(config=PENALTY)
    optimizer = sgd(plain)
    micro = {"micro_batches": 1, "batch": 32} if kind == "manual" else {}
    train(plain_controller, plain, optimizer, 3, **micro)
    assert_same_state(network, plain)
    assert controller.scheduler.current_step == 17


def test_a_step_that_returns_nothing_is_skipped_as_without_compression(tmp_path):
    controller, network = compressed(config=PENALTY)
    before = copy.deepcopy(network.fc.weight)
    trainer(tmp_path, CompressionCallback(controller), epochs=1).fit(Module(network, "nothing"), loader())
    assert torch.equal(network.fc.weight, before)


@pytest.mark.parametrize("live", [False, True], ids=["from the state", "live"])
@pytest.mark.parametrize("saved_at", ["epoch", "step"])
def test_resumes_to_the_same_bits_from_the_end_of_an_epoch(tmp_path, live, saved_at):
    every = {"every_n_epochs": 1} if saved_at == "epoch" else {"every_n_train_steps": 6}

    def run(folder, checkpoint=None):
        state = read_compression_state(checkpoint) if checkpoint and not live else None
        controller, network = compressed(Network, state)
        saving = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, auto_insert_metric_name=False, **every)
        trainer(folder, CompressionCallback(controller), saving).fit(Module(network), loader(), ckpt_path=checkpoint)
        return controller, network

    controller, network = run(tmp_path / "whole")
    for step in (6, 12):
        again, resumed = run(tmp_path / str(step), str(tmp_path / "whole" / f"{step}.ckpt"))
        assert_same_state(network, resumed)
        assert saved_state(again) == saved_state(controller)


def test_in_the_middle_of_an_epoch_the_clock_goes_on(tmp_path):
    controller, network = compressed()
    saving = ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, auto_insert_metric_name=False, every_n_train_steps=4
    )
    trainer(tmp_path, CompressionCallback(controller), saving).fit(Module(network), loader())
    state = read_compression_state(tmp_path / "4.ckpt")
    assert state["scheduler"]["epoch"] == 0 and state["scheduler"]["step"] == 3
    again, resumed = compressed(Network, state)
    trainer(tmp_path, CompressionCallback(again)).fit(Module(resumed), loader(), ckpt_path=str(tmp_path / "4.ckpt"))
    assert again.scheduler.get_state()["epoch"] == 2
    assert again.sparsity_level == controller.sparsity_level


def test_testing_a_checkpoint_leaves_the_clock(tmp_path):
    class Tested(Module):
        def test_step(self, batch, batch_idx):
            self.log("correct", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    controller, network = compressed()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, auto_insert_metric_name=False)
    tested, module = trainer(tmp_path, CompressionCallback(controller), saving), Tested(network)
    tested.fit(module, loader())
    level = controller.sparsity_level
    tested.test(module, loader(), ckpt_path=str(tmp_path / "0.ckpt"), verbose=False)
    assert controller.scheduler.current_epoch == 2
    assert controller.sparsity_level < level  # measured on the weights that Lightning has loaded


def test_an_average_of_the_weights_keeps_the_masks(tmp_path):
    class Average(EMAWeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return step_idx is not None

    controller, network = compressed()
    trainer(tmp_path, Average(decay=0.5), CompressionCallback(controller)).fit(Module(network), loader())
    plain_controller, plain = compressed()
    optimizer = sgd(plain)
    train(plain_controller, plain, optimizer, 3)
    masks = {n: v for n, v in masks_and_scales(plain).items() if "mask" in n}
    assert masks and all(torch.equal(network.state_dict()[name], mask) for name, mask in masks.items())
    assert not torch.equal(network.fc.weight, plain.fc.weight)  # it is an average
    stripped = controller.strip()
    zeros = [(stripped.conv2.weight == 0).float().mean(), (plain_controller.strip().conv2.weight == 0).float().mean()]
    assert zeros[0] >= zeros[1] > 0.6


def test_looking_for_a_learning_rate_leaves_the_clock(tmp_path):
    controller, network = compressed()
    tested, module = trainer(tmp_path, CompressionCallback(controller)), Module(network)
    before = copy.deepcopy(network.state_dict())
    Tuner(tested).lr_find(module, loader(), num_training=8)
    assert controller.scheduler.current_step == controller.scheduler.current_epoch == -1
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_statistics_are_logged_and_the_module_is_left_as_it_was(tmp_path):
    controller, network = compressed()
    module = Module(network)
    tested = trainer(tmp_path, CompressionCallback(controller))
    tested.fit(module, loader(), loader())
    logged = tested.callback_metrics["compression/magnitude_sparsity/sparsity_level"]
    assert float(logged) == pytest.approx(controller.sparsity_level)
    assert vars(module).keys().isdisjoint({"training_step", "on_load_checkpoint"})
    tested.save_checkpoint(tmp_path / "after.ckpt")
    assert read_compression_state(tmp_path / "after.ckpt")["scheduler"]["epoch"] == 2


def test_module_and_callback_are_copied_and_pickled_while_they_train(tmp_path):
    copies = []

    class Copying(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            module = copy.deepcopy(pl_module)
            assert module.training_step.module is module
            copies.append(pickle.loads(pickle.dumps(pl_module.network)))

    controller, network = compressed()
    trainer(tmp_path, CompressionCallback(controller), Copying(), epochs=1).fit(Module(network), loader())
    assert len(copies) == 1


def test_training_that_ends_too_early_says_so(tmp_path, caplog):
    controller, network = compressed()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, CompressionCallback(controller), epochs=1).fit(Module(network), loader())
    assert "at the end of the training, the model is PARTIALLY_COMPRESSED" in caplog.text


def test_what_would_be_wrong_is_refused(tmp_path):
    controller, network = compressed()
    with pytest.raises(UsageError, match="got a Network, not the controller"):
        CompressionCallback(network)
    with pytest.raises(UsageError, match=r"not in this Module \(it has \['network'\]\)"):
        trainer(tmp_path, CompressionCallback(controller)).fit(Module(Network()), loader())
    with pytest.raises(UsageError, match="put EMAWeightAveraging before the CompressionCallback"):
        trainer(tmp_path, CompressionCallback(controller), EMAWeightAveraging()).fit(Module(network), loader())
    callback, module = CompressionCallback(controller), Module(network)
    sharding = trainer(tmp_path, callback)
    sharding.strategy.__class__ = type("Sharded", (FSDPStrategy,), {})
    with pytest.raises(UsageError, match="parts of weights"):
        callback.setup(sharding, module, "fit")
    module.training_step = lambda *args: None
    with pytest.raises(UsageError, match="'training_step' of this Module has been replaced"):
        callback.setup(trainer(tmp_path, callback), module, "fit")


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path):
    def saved(name, callbacks, network, **options):
        saving = ModelCheckpoint(tmp_path, filename=name, **options)
        trainer(tmp_path, *callbacks, saving, epochs=1).fit(Module(network), loader())
        return str(tmp_path / f"{name}.ckpt")

    plain = saved("plain", [], Network())
    sparse_controller, sparse = compressed(config={**CONFIG, "compression": [SPARSITY]})
    other = saved("sparse", [CompressionCallback(sparse_controller)], sparse)
    light = saved("light", [CompressionCallback(sparse_controller)], sparse, save_weights_only=True)
    controller, network = compressed()
    before = copy.deepcopy(network.state_dict())
    for path, error, match in (
        (plain, UsageError, "no compression state"),
        (light, UsageError, "no compression state"),
        (other, StateError, r"is of the algorithms \['magnitude_sparsity'\]"),
    ):
        with pytest.raises(error, match=match):
            trainer(tmp_path, CompressionCallback(controller)).fit(Module(network), loader(), ckpt_path=path)
        assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    with pytest.raises(StateError, match="has no compression state"):
        read_compression_state(plain)
    assert isinstance(network, nn.Module)
