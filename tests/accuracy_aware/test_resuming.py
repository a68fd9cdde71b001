"""A run that is interrupted after any epoch goes on with the same bits; damaged or other states are refused."""

import copy
import shutil

import pytest
import torch

from compress_core import StateError, read_checkpoint
from tests.accuracy_aware.loops_helpers import (
    PRUNING,
    QUANTIZATION,
    SPARSITY,
    Training,
    adaptive,
    assert_same,
    document,
    holds_up_to,
)

COSINE = dict(scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 3))  # noqa: C408
STAGED = {**QUANTIZATION, "params": {"weights_quant_start_epoch": 1, "activations_quant_start_epoch": 3}}


def noisy(level):
    """A metric of the model's own numbers, so that other bits would take other ways."""
    ideal = holds_up_to(level)

    def metric(training):
        return ideal(training) + float(training.model.fc.weight.detach().mean()) + float(torch.rand(1)) / 10

    return metric


CASES = {
    "sparsity": (adaptive(patience_epochs=1, maximal_total_epochs=9), 0.73),
    "composed": (
        adaptive(
            [PRUNING, SPARSITY, STAGED], algorithm="magnitude_sparsity", patience_epochs=1, maximal_total_epochs=7
        ),
        0.8,
    ),
    "pruning": (adaptive(PRUNING, patience_epochs=2, maximal_total_epochs=7), 0.5),
    "early exit": (document("early_exit", [SPARSITY, QUANTIZATION], maximal_total_epochs=5), -1.0),
}


def fresh(name, state=None):
    config, level = CASES[name]
    return Training(copy.deepcopy(config), noisy(level), state=state, **COSINE)


@pytest.mark.parametrize("name", CASES)
def test_it_goes_on_with_the_same_bits_after_any_epoch(tmp_path, name):
    whole = fresh(name)
    torch.manual_seed(4)
    loop = whole.loop()
    whole.run(loop, tmp_path / "whole")
    epochs = [call for call in whole.calls if call[0] == "train"]
    assert len(epochs) > 4
    end = torch.get_rng_state()

    pieces = fresh(name)
    torch.manual_seed(4)
    pieces.stop_after = 0
    folder = None
    for finished in range(len(epochs) + 1):
        again = pieces.loop()
        try:
            pieces.run(again, tmp_path / "pieces", resume_from=folder)
        except InterruptedError:
            assert finished < len(epochs)
        folder = folder or again.log_dir
        assert again.log_dir == folder
        if again._statistics is not None:
            break
        # As a new process: another model, other random numbers; one more epoch and the next interruption.
        torch.manual_seed(finished + 100)
        state = read_checkpoint(folder / "last.pt").compression_state
        pieces = fresh(name, state if finished % 2 else None)
        torch.manual_seed(finished + 200)
        pieces.stop_after = 1
    assert again.statistics.to_dict() == loop.statistics.to_dict()
    assert_same(pieces.everything(), whole.everything())
    assert torch.equal(torch.get_rng_state(), end)
    files = sorted(path.name for path in folder.iterdir() if path.suffix == ".pt")
    assert files == sorted(path.name for path in loop.log_dir.iterdir() if path.suffix == ".pt")


def test_a_process_that_is_killed_between_its_two_files_leaves_what_the_older_one_needs(tmp_path, monkeypatch):
    """The best model of an epoch is there, the state after it is not: the run goes on from the epoch before."""
    whole = fresh("sparsity")
    torch.manual_seed(4)
    loop = whole.loop()
    whole.run(loop, tmp_path / "whole")

    from compress_core.accuracy_aware.saved import Folder

    original, saves = Folder.save_last, []

    def save_last(self, *arguments):
        saves.append(1)
        if len(saves) == 5:
            raise KeyboardInterrupt
        original(self, *arguments)

    killed = fresh("sparsity")
    torch.manual_seed(4)
    again = killed.loop()
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "save_last", save_last)
        with pytest.raises(KeyboardInterrupt):
            killed.run(again, tmp_path / "killed")
    assert len(list(again.log_dir.glob("best_*"))) == 2
    resumed = fresh("sparsity")
    last = resumed.loop()
    resumed.run(last, None, resume_from=again.log_dir)
    assert last.statistics.to_dict() == loop.statistics.to_dict()
    assert_same(resumed.everything(), whole.everything())


def test_generators_of_registered_loaders_go_on(tmp_path):
    from torch.utils.data import DataLoader, TensorDataset

    from compress_core import create_accuracy_aware_training_loop, create_compressed_model
    from tests.accuracy_aware.loops_helpers import IMAGES, LABELS, Net

    ends = []
    for interrupted in (False, True):
        folder = None
        for attempt in range(2 if interrupted else 1):
            torch.manual_seed(1)
            generator = torch.Generator().manual_seed(5)
            loader = DataLoader(TensorDataset(IMAGES, LABELS), 2, shuffle=True, generator=generator)
            config = document("early_exit", [SPARSITY], maximal_total_epochs=4)
            controller, model = create_compressed_model(Net(), config, init_loader=loader)

            def train(
                controller, model, epoch, optimizer, lr_scheduler, loader=loader, stops=interrupted and not attempt
            ):
                if stops and epoch == 2:
                    raise InterruptedError
                for images, labels in loader:
                    controller.scheduler.step()
                    optimizer.zero_grad()
                    torch.nn.functional.cross_entropy(model(images), labels).backward()
                    optimizer.step()

            loop = create_accuracy_aware_training_loop(config, controller, 1.0, verbose=False)
            try:
                loop.run(
                    model,
                    train,
                    lambda model, epoch: -1.0 - 1 / (epoch + 1),
                    lambda model=model: (torch.optim.SGD(model.parameters(), 0.1), None),
                    log_dir=tmp_path / str(interrupted),
                    resume_from=folder,
                )
            except InterruptedError:
                folder = loop.log_dir
        ends.append(model.state_dict())
    assert_same(*ends)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    training = fresh("sparsity")
    training.stop_after = 4
    loop = training.loop()
    with pytest.raises(InterruptedError):
        training.run(loop, tmp_path_factory.mktemp("runs"))
    return loop.log_dir


def test_checkpoints_need_no_pickle(interrupted):
    for path in interrupted.glob("*.pt"):
        assert torch.load(path, weights_only=True)["kind"] == "compress_core.checkpoint"
    assert read_checkpoint(interrupted / "last.pt").extra["accuracy_aware_training"]["epochs"] == 4


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"patience_epochs": 2}, "patience_epochs: is 2, and was 1"),
        ({"maximal_absolute_accuracy_degradation": 2.0}, "maximal_absolute_accuracy_degradation"),
        ({"maximal_total_epochs": 5}, ""),
    ],
)
def test_other_numbers_are_refused(tmp_path, interrupted, params, words):
    folder = tmp_path / "copy"
    shutil.copytree(interrupted, folder)
    training = Training(adaptive(**{"patience_epochs": 1, "maximal_total_epochs": 9, **params}), noisy(0.73), **COSINE)
    before = copy.deepcopy(training.everything())
    if words:
        with pytest.raises(StateError, match=words):
            training.run(training.loop(), None, resume_from=folder)
        assert_same(training.everything(), before)
    else:
        training.run(training.loop(), None, resume_from=folder / "last.pt")


def test_what_is_no_state_of_a_run_is_refused(tmp_path, interrupted, caplog):
    training = fresh("sparsity")
    best = next(interrupted.glob("best_*"))
    with pytest.raises(StateError, match="not one of accuracy-aware training"):
        training.run(training.loop(), None, resume_from=best)
    other = fresh("early exit")
    with pytest.raises(StateError, match="is of mode 'adaptive_compression_level'"):
        other.run(other.loop(), None, resume_from=interrupted)
    folder = tmp_path / "copy"
    shutil.copytree(interrupted, folder)
    other = fresh("sparsity")
    other.run(other.loop(0.5), None, resume_from=folder)
    assert "uncompressed_model_accuracy: is 0.5, and was 0.0" in caplog.text
