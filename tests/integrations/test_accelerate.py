"""The callback for loops with accelerate, against the plain loop."""

import copy
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from compress_core import StateError, UsageError
from compress_core.integrations import read_compression_state
from compress_core.integrations.accelerate import CompressionCallback
from tests.integrations.plain_loop import (
    CONFIG,
    PENALTY,
    SPARSITY,
    Network,
    assert_same_state,
    compressed,
    images,
    masks_and_scales,
    saved_state,
    sgd,
    train,
)


@pytest.fixture(autouse=True)
def fresh_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Loop:
    """A user's loop of 6 optimizer steps in each epoch, each of two micro-batches."""

    def __init__(self, state=None, config=CONFIG, micro_batches=2, **options):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=micro_batches, **options)
        self.controller, self.network = compressed(Network, state, config)
        self.compression = CompressionCallback(self.controller, self.accelerator)
        optimizer = sgd(self.network)
        loader = DataLoader(TensorDataset(*images()), 32 // micro_batches)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(self.network, optimizer, loader)

    def run(self, first, last, save=None, skip=0):
        for epoch in range(first, last):
            self.compression.epoch_step(epoch)
            self.model.train()
            batches = self.accelerator.skip_first_batches(self.loader, skip) if epoch == first else self.loader
            for number, (inputs, labels) in enumerate(batches):
                with self.accelerator.accumulate(self.model):
                    self.compression.step()
                    loss = F.cross_entropy(self.model(inputs).float(), labels) + self.controller.loss()
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                if save is not None and (epoch, number) in save:
                    self.accelerator.save_state(str(save[epoch, number]))
        return self


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_ends_with_the_bits_of_the_plain_loop(precision):
    loop = Loop(mixed_precision=precision).run(0, 3)
    controller, plain = compressed()
    optimizer = sgd(plain)
    train(controller, plain, optimizer, 3, precision=torch.bfloat16 if precision == "bf16" else None)
    assert masks_and_scales(loop.network)
    assert_same_state(loop.network, plain)
    assert saved_state(loop.controller) == saved_state(controller)
    assert torch.equal(loop.controller.strip().eval()(images(8)[0]), controller.strip().eval()(images(8)[0]))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_loss_of_algorithms_counts_once_for_each_step(micro_batches):
    loop = Loop(config=PENALTY, micro_batches=micro_batches).run(0, 3)
    controller, plain = compressed(config=PENALTY)
    optimizer = sgd(plain)
    train(controller, plain, optimizer, 3, micro_batches=micro_batches, batch=32 // micro_batches)
    assert_same_state(loop.network, plain)
    assert loop.controller.scheduler.current_step == 17


@pytest.mark.parametrize("live", [False, True], ids=["from the state", "live"])
@pytest.mark.parametrize(("epoch", "batch"), [(0, 11), (1, 5), (1, 11)])
def test_resumes_to_the_same_bits_in_the_middle_and_at_the_end_of_an_epoch(tmp_path, live, epoch, batch):
    whole = Loop().run(0, 3, {(epoch, batch): tmp_path / "saved"})
    loop = Loop(None if live else read_compression_state(tmp_path / "saved"))
    loop.accelerator.load_state(str(tmp_path / "saved"))
    at_end = batch == 11
    loop.run(epoch + at_end, 3, skip=0 if at_end else batch + 1)
    assert_same_state(loop.network, whole.network)
    assert saved_state(loop.controller) == saved_state(whole.controller)


def test_saving_what_was_just_loaded_saves_the_same(tmp_path):
    Loop().run(0, 2, {(1, 5): tmp_path / "saved"})
    loop = Loop()
    loop.accelerator.load_state(str(tmp_path / "saved"))
    loop.accelerator.save_state(str(tmp_path / "again"))
    saved, again = (json.loads((tmp_path / name / "compression_state.json").read_text()) for name in ("saved", "again"))
    assert again == saved


def test_what_does_not_fit_is_refused_before_anything_is_loaded(tmp_path):
    loop = Loop(config={**CONFIG, "compression": [SPARSITY]})
    loop.accelerator.save_state(str(tmp_path / "sparse"))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(Network())
    accelerator.save_state(str(tmp_path / "plain"))
    loop = Loop()
    before = copy.deepcopy(loop.network.state_dict())
    with pytest.raises(StateError, match=r"is of the algorithms \['magnitude_sparsity'\]"):
        loop.accelerator.load_state(str(tmp_path / "sparse"))
    with pytest.raises(StateError, match="saved without the CompressionCallback"):
        loop.accelerator.load_state(str(tmp_path / "plain"))
    (tmp_path / "sparse" / "compression_state.json").write_text("{")
    with pytest.raises(StateError, match="is no JSON"):
        loop.accelerator.load_state(str(tmp_path / "sparse"))
    (tmp_path / "sparse" / "compression_state.json").write_text("[]")
    with pytest.raises(StateError, match="does not read"):
        loop.accelerator.load_state(str(tmp_path / "sparse"))
    assert all(torch.equal(before[name], value) for name, value in loop.network.state_dict().items())


def test_what_would_be_wrong_is_refused(tmp_path):
    loop = Loop()
    loop.run(0, 1)
    loop.compression.epoch_step(0)  # once more, which changes nothing
    assert loop.controller.scheduler.current_epoch == 0
    with pytest.raises(UsageError, match="begins its epoch 2, for the controller epoch 2"):
        loop.compression.epoch_step(2)
    with pytest.raises(UsageError, match="got a Network, not the controller"):
        CompressionCallback(loop.network, loop.accelerator)
    other = Accelerator(cpu=True)
    CompressionCallback(compressed()[0], other)
    other.prepare(Network())
    with pytest.raises(UsageError, match=r"none of the prepared models \(\['Network'"):
        other.save_state(str(tmp_path / "other"))


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM])
def test_sharded_weights_are_refused(kind):
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = kind
    with pytest.raises(UsageError, match="parts of weights"):
        CompressionCallback(compressed()[0], accelerator)


def test_training_that_ends_too_early_says_so_and_trackers_get_the_statistics(caplog):
    loop = Loop()
    logged = []
    loop.accelerator.trackers = [type("Tracker", (), {"main_process_only": False, "name": "t"})()]
    loop.accelerator.log = lambda values, step: logged.append((step, values))
    with caplog.at_level(logging.WARNING):
        loop.run(0, 2).compression.end()
    assert "the model is PARTIALLY_COMPRESSED" in caplog.text
    name = "compression/magnitude_sparsity/sparsity_level"
    assert [step for step, _ in logged] == [0, 6, 12]
    assert logged[-1][1][name] == loop.controller.sparsity_level > logged[0][1][name]
