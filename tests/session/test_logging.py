"""`controller.log_to`: what is written where, when, and what happens if that fails or the training is resumed."""

import copy
import csv
import math
import pickle

import pytest
import torch
import torch.distributed as dist

from compress_core import (
    FileError,
    UsageError,
    create_compressed_model,
    hookimpl,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from compress_core.session.log_file import CsvFile
from compress_core.testing import fingerprint
from tests.session.checkpoint_helpers import SETS, SPARSITY, Net, Training, assert_same, seed

LEVEL = "magnitude_sparsity/sparsity_level"


class Board:
    """What `SummaryWriter` has that is used."""

    def __init__(self):
        self.scalars = []

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def of(self, name):
        return [(step, value) for found, value, step in self.scalars if found == name]


def compressed(**section):
    config = {"compression": {"algorithm": "magnitude_sparsity", **section}}
    return create_compressed_model(Net(), config)[0]


def lines(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path, name):
    return [float(line[name]) if line[name] else None for line in lines(path)]


def test_a_file_has_the_history(tmp_path):
    seed(1)
    training = Training(SETS["all"])
    path = tmp_path / "figures.csv"
    training.controller.log_to(path)
    for epoch in range(3):
        training.run(1)
        training.controller.log_epoch(loss=1 / (epoch + 3), **{"val/accuracy": math.nan})
    rows = training.controller.history
    assert [(int(line["epochs"]), int(line["steps"])) for line in lines(path)] == [row.moment for row in rows]
    for name in rows[-1].measured:
        assert column(path, name) == [row.measured[name] for row in rows]
    assert column(path, "loss") == [None, 1 / 3, 1 / 4, 1 / 5]
    assert [line["val/accuracy"] for line in lines(path)] == ["", "nan", "nan", "nan"]


def test_tensorboard_and_functions_get_prefixed_names():
    board, calls = Board(), []
    controller = compressed(sparsity_init=0.5)
    controller.log_to(board)
    controller.log_to(lambda values, step: calls.append((values, step)))
    for loss in (3.0, 2.0):
        controller.scheduler.epoch_step()
        controller.log_epoch(loss=loss)
    assert [step for step, _ in board.of(f"compression/{LEVEL}")] == [0, 1, 2]
    assert board.of("loss") == [(1, 3.0), (2, 2.0)]
    assert [(step, values.get("loss")) for values, step in calls] == [(0, None), (1, 3.0), (2, 2.0)]
    assert all(values["compression/compression_rate"] == pytest.approx(0.5, abs=1e-2) for values, _ in calls[1:])


def test_the_real_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        controller = compressed(sparsity_init=0.5)
        controller.log_to(writer)
        controller.scheduler.epoch_step()
        controller.log_epoch(loss=1.0)
        twin = copy.deepcopy(controller)
        twin.scheduler.epoch_step()
    assert len(list(tmp_path.iterdir())) == 1


def test_every_epoch_is_what_was_trained_without_log_epoch():
    """At the beginning of epoch 2 what is written belongs to epoch 1: the schedule moves afterwards."""
    board = Board()
    controller = compressed(sparsity_init=0.2, params={"sparsity_target": 0.8, "sparsity_target_epoch": 3})
    controller.log_to(board)
    levels = []
    for _ in range(3):
        controller.scheduler.epoch_step()
        levels.append(controller.statistics().scalars()[LEVEL])
    assert [value for _, value in board.of(f"compression/{LEVEL}")][1:] == levels[:-1]
    controller.log_epoch()
    assert [value for _, value in board.of(f"compression/{LEVEL}")][1:] == levels


def test_every_so_many_steps(tmp_path):
    board, path = Board(), tmp_path / "figures.csv"
    controller = compressed(sparsity_init=0.5)
    controller.log_to(board, every_steps=3)
    controller.log_to(path, every_steps=2)
    for _ in range(2):
        controller.scheduler.epoch_step()
        for _ in range(4):
            controller.scheduler.step()
    controller.log_epoch(loss=1.0)
    # Multiples of 3, and the ends of the epochs after 4 and 8 steps.
    assert [step for step, _ in board.of(f"compression/{LEVEL}")] == [0, 3, 4, 6, 8]
    assert [(line["epochs"], line["steps"]) for line in lines(path)] == [
        ("0", "0"), ("0", "2"), ("1", "4"), ("1", "6"), ("2", "8"),
    ]  # fmt: skip


def test_a_loop_without_steps_is_told(caplog):
    controller = compressed()
    controller.log_to(Board(), every_steps=3)
    for _ in range(3):
        controller.scheduler.epoch_step()
    assert len([r for r in caplog.records if "does not call controller.scheduler.step()" in r.message]) == 1


@pytest.mark.parametrize(
    ("writer", "message"),
    [
        ("figures.txt", r"'figures.txt' does not end in .csv"),
        ("", "'.' does not end in .csv"),
        (Board, "the class Board"),
        (7, "a int"),
        (None, "a NoneType"),
    ],
)
def test_other_writers_are_refused(writer, message):
    controller = compressed()
    with pytest.raises(UsageError, match=f"log_to: (got )?{message}"):
        controller.log_to(writer)
    controller.scheduler.epoch_step()


@pytest.mark.parametrize("every_steps", [0, -1, 2.0, True, "2"])
def test_other_numbers_of_steps_are_refused(every_steps):
    with pytest.raises(UsageError, match="every_steps"):
        compressed().log_to(Board(), every_steps=every_steps)


def test_a_resumed_training_goes_on_in_the_file(tmp_path):
    """The interrupted one went on for an epoch after its checkpoint, and was killed in the middle of a line."""
    seed(1)
    whole, path = Training([SPARSITY]), tmp_path / "whole.csv"
    whole.controller.log_to(path)
    whole.run(4)
    expected = path.read_bytes()

    seed(1)
    training, path, checkpoint = Training([SPARSITY]), tmp_path / "figures.csv", tmp_path / "run.pt"
    training.controller.log_to(path)
    training.run(2)
    save_checkpoint(checkpoint, training.controller, **training.parts)
    training.run(1)
    with path.open("ab") as file:
        file.write(b"3,12,0.")
    state = read_checkpoint(checkpoint).compression_state
    resumed = Training([SPARSITY], state=state)
    resumed.controller.log_to(path)
    load_checkpoint(checkpoint, resumed.controller, **resumed.parts)
    resumed.run(2)
    assert path.read_bytes() == expected


@pytest.mark.parametrize("cut", [1, 3, 20])
def test_of_a_killed_process_at_most_the_last_line_is_lost(tmp_path, cut):
    path = tmp_path / "figures.csv"
    log = CsvFile(path)
    for number in range(4):
        log.write((number, 0), {"level": number / 3})
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    log.write((4, 0), {"level": 0.5})
    epochs = [int(line["epochs"]) for line in lines(path)]
    assert epochs == [0, 1, 2, 4] if cut < 20 else epochs == [0, 1, 4]
    assert path.read_bytes().endswith(b"4,0,0.5\n")
    assert path.read_bytes().startswith(content[: content.index(b"\n1,") + 1])


def test_a_column_that_comes_later_is_added(tmp_path):
    path = tmp_path / "figures.csv"
    log = CsvFile(path)
    log.write((0, 0), {"a": 1})
    log.write((1, 0), {"a": 2, 'b, "quoted"\n': 0.1})
    log.write((2, 0), {"c": 3})
    log.write((2, 0), {"a": 4})
    assert lines(path) == [
        {"epochs": "0", "steps": "0", "a": "1", 'b, "quoted"\n': "", "c": ""},
        {"epochs": "1", "steps": "0", "a": "2", 'b, "quoted"\n': "0.1", "c": ""},
        {"epochs": "2", "steps": "0", "a": "4", 'b, "quoted"\n': "", "c": "3"},
    ]
    again = CsvFile(path)
    again.write((3, 0), {"c": 5})
    assert [line["c"] for line in lines(path)] == ["", "", "3", "5"]


def test_a_file_that_was_removed_begins_anew(tmp_path):
    path = tmp_path / "figures.csv"
    log = CsvFile(path)
    log.write((0, 0), {"a": 1})
    path.unlink()
    log.write((1, 0), {"a": 2})
    assert lines(path) == [{"epochs": "1", "steps": "0", "a": "2"}]


@pytest.mark.parametrize(
    "content", ["a,b\n1,2\n", "epochs,steps\n1,2,3\n", "no line", "epochs,steps,a\n1,2,x\n", "\0\n"]
)
def test_another_file_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "figures.csv"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"figures.csv' is no file that log_to has written"):
        compressed().log_to(path)
    assert path.read_text() == content


def test_figures_of_another_training_are_not_replaced(tmp_path):
    path = tmp_path / "figures.csv"
    controller = compressed()
    controller.log_to(path)
    for _ in range(3):
        controller.scheduler.epoch_step()
    before = path.read_bytes()
    with pytest.raises(UsageError, match="went on to epoch 2, and this one is at its beginning"):
        compressed().log_to(path)
    assert path.read_bytes() == before


def test_two_trainings_at_once_do_not_replace_one_anothers_figures(tmp_path):
    path = tmp_path / "figures.csv"
    first, second = compressed(), compressed()
    for controller in (first, second):
        controller.log_to(path)
    for controller in (first, second):
        controller.scheduler.epoch_step()
    first.log_epoch(loss=1.0)
    with pytest.raises(UsageError, match="has figures of another training that were written since"):
        second.log_epoch(loss=2.0)
    first.scheduler.epoch_step()
    first.log_epoch(loss=3.0)
    with pytest.raises(UsageError, match="has figures of another training"):
        second.scheduler.epoch_step()
    assert column(path, "loss") == [None, 1.0, 3.0]


def test_the_same_file_may_be_given_twice(tmp_path):
    path = tmp_path / "figures.csv"
    (tmp_path / "folder").mkdir()
    controller = compressed()
    controller.log_to(path)
    controller.log_to(tmp_path / "folder" / ".." / "figures.csv", every_steps=2)
    for epoch in range(2):
        controller.scheduler.epoch_step()
        for _ in range(3):
            controller.scheduler.step()
        controller.log_epoch(loss=epoch)
    assert column(path, "epochs") == [0, 0, 1, 1, 2]
    assert column(path, "steps") == [0, 2, 3, 4, 6]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_writer_that_fails_is_named_and_the_epoch_has_not_begun(error, tmp_path):
    def broken(values, step):
        if is_broken:
            raise error("the server is gone")

    controller = compressed(sparsity_init=0.2, params={"sparsity_target": 0.8, "sparsity_target_epoch": 3})
    path, is_broken = tmp_path / "figures.csv", False
    controller.log_to(path)
    controller.log_to(broken)
    controller.scheduler.epoch_step()
    is_broken = True
    before = fingerprint(controller.model), controller.get_compression_state()
    for call in (controller.scheduler.epoch_step, controller.log_epoch):
        with pytest.raises(error, match="the server is gone") as caught:
            call()
        assert "raised by the function" in caught.value.__notes__[0] and "broken" in caught.value.__notes__[0]
        assert (fingerprint(controller.model), controller.get_compression_state()) == before
    is_broken = False
    controller.scheduler.epoch_step()
    assert [line["epochs"] for line in lines(path)] == ["0", "1"]  # which was written before the other one failed


def test_an_algorithm_that_fails_leaves_nothing_in_the_log():
    class Failing:
        @hookimpl
        def compress_epoch_step(self, clock):
            if clock.epoch == 1:
                raise RuntimeError("no epoch 1")

    board = Board()
    config = {"compression": {"algorithm": "magnitude_sparsity"}}
    controller, _ = create_compressed_model(Net(), config, observers=[Failing()])
    controller.log_to(board)
    controller.scheduler.epoch_step()
    before = list(board.scalars)
    with pytest.raises(Exception, match="no epoch 1"):
        controller.scheduler.epoch_step()
    assert board.scalars == before


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    controller = compressed()
    with pytest.raises(FileError, match=r"elsewhere/figures.csv.*the folder must exist"):
        controller.log_to(folder / "elsewhere/figures.csv")
    controller.log_to(folder / "figures.csv")
    folder.rmdir()
    state = controller.get_compression_state()
    with pytest.raises(FileError, match=r"figures.csv.*the folder must exist"):
        controller.scheduler.epoch_step()
    assert controller.get_compression_state() == state


def test_copies_do_not_write():
    board = Board()
    controller = compressed()
    controller.log_to(board)
    controller.log_to(lambda values, step: None)  # which cannot be pickled
    for twin in (copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))):
        twin.scheduler.epoch_step()
        twin.log_epoch(loss=1.0)
    assert not board.scalars
    controller.scheduler.epoch_step()
    assert board.scalars


def test_only_the_first_process_writes(monkeypatch, tmp_path):
    controller = compressed()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    controller.log_to(tmp_path / "figures.csv")
    monkeypatch.undo()
    controller.scheduler.epoch_step()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("algorithms", SETS.values(), ids=SETS)
def test_logging_changes_no_bit(algorithms, tmp_path):
    states = []
    for logs in (False, True):
        seed(1)
        training = Training(algorithms)
        if logs:
            training.controller.log_to(tmp_path / "figures.csv", every_steps=1)
        training.run(2)
        states.append(training.everything())
    assert_same(*states)
    assert len(lines(tmp_path / "figures.csv")) == 8


def test_the_folder_may_change_later(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    controller = compressed()
    controller.log_to("figures.csv")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    controller.scheduler.epoch_step()
    assert (tmp_path / "figures.csv").exists()


def test_numpy_numbers_are_plain(tmp_path):
    import numpy as np

    from compress_core.contract.clock import Clock
    from compress_core.session.history import figures_at

    row = figures_at(Clock(), {"a": np.float64(0.5), "b": 3}, {"loss": np.float32(0.25), "tensor": torch.tensor(2.0)})
    CsvFile(tmp_path / "figures.csv").write(row.moment, row.values)
    assert lines(tmp_path / "figures.csv") == [
        {"epochs": "0", "steps": "0", "loss": "0.25", "tensor": "2.0", "a": "0.5", "b": "3"}
    ]
