"""The loops: what is trained, at which level, what is returned, and what is refused."""

import copy
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress_core import (
    CompressionStage,
    ConfigError,
    EarlyExitCompressionTrainingLoop,
    UsageError,
    check_config,
    create_accuracy_aware_training_loop,
    create_compressed_model,
    draw_accuracy_aware,
)
from tests.accuracy_aware.loops_helpers import (
    PRUNING,
    QUANTIZATION,
    SPARSITY,
    Net,
    Training,
    adaptive,
    assert_same,
    document,
    holds_up_to,
)

SLOW_SPARSITY = {
    "algorithm": "magnitude_sparsity",
    "params": {"sparsity_target": 0.8, "sparsity_target_epoch": 50},
}
EARLY = {"maximal_total_epochs": 5, "maximal_absolute_accuracy_degradation": 1.0}

# early_exit


def early(*sections, **params):
    return document("early_exit", list(sections) or [QUANTIZATION], **{**EARLY, **params})


def trained(training):
    return [call[1] for call in training.calls if call[0] == "train"]


def test_a_model_that_is_accurate_at_once_is_not_trained(tmp_path):
    training = Training(early(), metrics=[9.5])
    loop = training.loop(10.0)
    assert training.run(loop, tmp_path) is training.model
    assert trained(training) == []
    statistics = loop.statistics
    assert (statistics.compressed_accuracy, statistics.accuracy_budget) == (9.5, 0.5)
    assert statistics.absolute_accuracy_degradation == 0.5
    assert statistics.relative_accuracy_degradation == 5.0
    assert statistics.compression_rate == 0.0


def test_it_stops_when_the_accuracy_holds(tmp_path):
    training = Training(early(), metrics=[1.0, 2.0, 9.0, 9.9])
    loop = training.loop(10.0)
    training.run(loop, tmp_path)
    assert trained(training) == [0, 1]
    assert loop.statistics.compressed_accuracy == 9.0 and loop.statistics.result == 2
    assert training.controller.scheduler.current_epoch == 1


@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_the_best_epoch_is_returned_metrics_below_zero_included(tmp_path, shift):
    training = Training(early(maximal_total_epochs=4), metrics=[m + shift for m in (1.0, 2.0, 5.0, 3.0, 4.0)])
    at_best = []

    def validate(model, epoch):
        metric = training.validate(model, epoch)
        if epoch == 2:
            at_best.append(copy.deepcopy(training.everything()))
        return metric

    loop = training.loop(10.0 + shift)
    training.run(loop, tmp_path, validate_fn=validate)
    assert loop.statistics.result == 2
    history = training.controller.history
    assert [row.given.get("metric") for row in history] == [m + shift for m in (1.0, 2.0, 5.0)]
    # Which the loop records once it has the metric.
    at_best[0][1]["history"] = training.everything()[1]["history"]
    assert_same(training.everything(), at_best[0])


@pytest.mark.parametrize(("accuracy", "relative", "lowest"), [(80.0, 1.0, 79.2), (-80.0, 1.0, -80.8), (0.0, 5.0, 0.0)])
def test_a_relative_degradation_is_a_part_of_the_size(accuracy, relative, lowest):
    config = document("early_exit", [QUANTIZATION], maximal_relative_accuracy_degradation=relative)
    assert Training(config).loop(accuracy).minimal_accuracy == pytest.approx(lowest)
    if relative == 1.0:
        assert Training(document("early_exit", [QUANTIZATION])).loop(accuracy).minimal_accuracy == pytest.approx(lowest)


def test_without_a_fully_compressed_epoch_the_last_is_returned_with_a_word(tmp_path, caplog):
    training = Training(early(SLOW_SPARSITY, maximal_total_epochs=2), metrics=[20.0, 20.0, 20.0])
    loop = training.loop(10.0)
    training.run(loop, tmp_path)
    assert trained(training) == [0, 1]
    assert loop.statistics.compression_rate == training.controller.compression_rate > 0
    assert "not fully compressed (magnitude_sparsity)" in caplog.text
    assert training.controller.scheduler.current_epoch == 1


def test_early_stopping_is_asked_when_all_is_compressed(tmp_path):
    asked = []
    training = Training(early(SPARSITY, maximal_total_epochs=9), metrics=[0.1 * n for n in range(12)])
    training.run(
        training.loop(10.0), tmp_path, early_stopping_fn=lambda metric: asked.append(metric) or len(asked) == 2
    )
    assert asked == pytest.approx([0.2, 0.3])  # the second level of the schedule begins in epoch 1
    assert trained(training) == [0, 1, 2]


def test_a_composed_rate_is_measured(tmp_path):
    training = Training(early(PRUNING, SPARSITY, QUANTIZATION, maximal_total_epochs=3), metrics=[0.0, 0.0, 10.0])
    loop = training.loop(10.0)
    training.run(loop, tmp_path)
    algorithms = training.controller.algorithms
    rates = [algorithms[name].compression_rate for name in ("filter_pruning", "magnitude_sparsity")]
    assert loop.statistics.compression_rate == pytest.approx(1 - math.prod(1 - rate for rate in rates))
    assert 0.6 < loop.statistics.compression_rate < 0.65


# adaptive_compression_level


def test_it_ends_at_the_highest_level_whose_accuracy_holds(tmp_path):
    training = Training(adaptive(), holds_up_to(0.73))
    loop = training.loop()
    training.run(loop, tmp_path)
    asked = [record.target_rate for record in loop.statistics.epochs if record.phase == "search"]
    assert asked == [pytest.approx(rate, abs=1e-3) for rate in (
        0.5, 0.6, 0.7, 0.8, 0.8, 0.75, 0.75, 0.7, 0.725, 0.75, 0.75, 0.7375)]  # fmt: skip
    assert training.controller.compression_rate == loop.statistics.compression_rate == pytest.approx(0.725, abs=1e-3)
    assert training.rates[-1] == loop.statistics.compression_rate  # measured once more at the end
    assert loop.statistics.accuracy_budget >= 0
    # The learning rate is reduced at each turn, of a new optimizer.
    rates = [call[2] for call in training.calls if call[0] == "train"]
    assert rates == pytest.approx([0.01] * 6 + [0.005] * 3 + [0.0025] * 3 + [0.00125])
    assert trained(training) == list(range(13))


@pytest.mark.parametrize(
    ("sections", "level"),
    [(SPARSITY, 0.1), (PRUNING, 0.1), (PRUNING, 0.85), ([QUANTIZATION, SPARSITY], 0.4), ([PRUNING, QUANTIZATION], 0.4)],
)
def test_measured_rates_and_levels_are_the_same_quantity(tmp_path, sections, level):
    training = Training(adaptive(sections, patience_epochs=1), holds_up_to(level))
    loop = training.loop()
    training.run(loop, tmp_path)
    searched = [r for r in loop.statistics.epochs if r.phase == "search"]
    # Pruning removes whole channels, of 16 and 8: less than one in each group is kept in addition.
    assert all(0 <= r.target_rate - r.rate + 1e-3 < 2 / 24 + 1e-3 for r in searched)
    assert level - 2 / 24 - 0.025 < loop.statistics.compression_rate <= level + 1e-9
    assert loop.statistics.compression_rate == max(r.rate for r in searched if r.budget >= 0)


def test_floating_point_operations_are_the_unit_of_the_level_where_they_are_that_of_the_target(tmp_path):
    section = copy.deepcopy(PRUNING)
    del section["params"]["pruning_target"]
    section["params"]["pruning_flops_target"] = 0.3
    training = Training(adaptive(section, patience_epochs=1, maximal_total_epochs=30), lambda t: 0.0)
    highest = training.controller.algorithms["filter_pruning"].highest_level
    assert highest == pytest.approx(training.controller.maximal_compression_rate)
    loop = training.loop(maximal_compression_rate=0.999)
    training.run(loop, tmp_path)
    assert len(loop.statistics.epochs) < 15
    assert loop.statistics.compression_rate == training.controller.flops_pruning_level == pytest.approx(highest)


def test_a_level_that_no_bound_stops_ends_at_the_bound(tmp_path):
    training = Training(adaptive(), lambda t: 0.0)
    loop = training.loop(maximal_compression_rate=0.83)
    training.run(loop, tmp_path)
    assert loop.statistics.compression_rate == pytest.approx(0.83, abs=1e-3)


@pytest.mark.parametrize(("bounds", "warned"), [((0.0, 0.4), True), ((0.6, 0.9), True), ((0.3, 0.6), False)])
def test_a_search_that_begins_outside_of_its_bounds_says_so(bounds, warned, tmp_path, caplog):
    training = Training(adaptive(maximal_total_epochs=4), lambda t: 0.0)  # the schedule has ended at 0.5 by then
    loop = training.loop(minimal_compression_rate=bounds[0], maximal_compression_rate=bounds[1])
    training.run(loop, tmp_path)
    assert ("outside of minimal_compression_rate" in caplog.text) == warned


def test_where_no_level_holds_the_model_stays_as_it_is_with_a_word(tmp_path, caplog):
    training = Training(adaptive(), lambda t: -5.0)
    loop = training.loop(minimal_compression_rate=0.25)
    training.run(loop, tmp_path)
    assert "does not hold at the lowest level" in caplog.text
    assert "has not held at any level" in caplog.text
    assert loop.statistics.accuracy_budget == -4.0
    assert training.controller.compression_rate == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
    "kind", [np.float32, np.array, torch.tensor, lambda v: np.array([v]), lambda v: torch.tensor([v])]
)
def test_metrics_may_be_tensors_and_arrays_of_one_number(kind, tmp_path):
    training = Training(document("early_exit", QUANTIZATION), metrics=[kind(-0.5), kind(2.25)])
    loop = training.loop(kind(1.5))
    assert loop.minimal_accuracy == 1.485
    training.run(loop, tmp_path)
    assert [record.metric for record in loop.statistics.epochs] == [-0.5, 2.25]
    for wrong in (kind([1.5, 2.5]) if kind in (np.array, torch.tensor) else None, "80", True):
        with pytest.raises(UsageError, match="uncompressed_model_accuracy: must be a finite number"):
            training.loop(wrong)


def test_early_exit_of_what_compresses_nothing_ends_when_the_accuracy_holds(tmp_path):
    """Distillation alone: there is nothing to wait for."""
    config = document("early_exit", {"algorithm": "knowledge_distillation", "type": "mse"}, maximal_total_epochs=9)
    training = Training(config, metrics=[70.0, 79.0, 79.5, 80.0])
    loop = training.loop(80.0)
    training.run(loop, tmp_path)
    assert [record.metric for record in loop.statistics.epochs] == [70.0, 79.0, 79.5]
    assert loop.statistics.result == 2


def test_a_factor_that_the_optimizer_undoes_is_named_without_checkpoints_too(tmp_path, caplog):
    config = {**document("early_exit", QUANTIZATION, maximal_total_epochs=1), "compression_lr_multiplier": 5.0}
    training = Training(config)
    training.run(training.loop(dump_checkpoints=False), tmp_path)
    assert "compression_lr_multiplier multiplies the gradients" in caplog.text


def test_a_metric_that_is_not_a_number_ends_nothing(tmp_path, caplog):
    below = holds_up_to(0.62)
    training = Training(adaptive(), lambda t: below(t) if t.controller.compression_rate < 0.65 else math.nan)
    loop = training.loop()
    training.run(loop, tmp_path)
    assert "counts as worse than anything else" in caplog.text
    assert loop.statistics.compression_rate == pytest.approx(0.6, abs=2e-2)
    json.loads((loop.log_dir / "statistics.json").read_text())


def test_the_level_at_which_the_search_begins_is_a_candidate(tmp_path):
    """NNCF forgets it, and returns a lower level or the last one."""
    training = Training(adaptive(patience_epochs=1), holds_up_to(0.505))
    loop = training.loop()
    training.run(loop, tmp_path)
    assert loop.statistics.compression_rate == pytest.approx(0.5, abs=1e-3)


def test_without_initial_epochs_the_search_begins_at_the_measured_level(tmp_path):
    training = Training(adaptive(initial_training_phase_epochs=0), holds_up_to(0.45))
    loop = training.loop()
    training.run(loop, tmp_path)
    assert [r.phase for r in loop.statistics.epochs][:3] == ["initial", "search", "search"]
    assert loop.statistics.compression_rate == pytest.approx(0.4375, abs=2e-2)


def test_the_most_epochs_are_all_there_are(tmp_path):
    training = Training(adaptive(maximal_total_epochs=5), holds_up_to(0.73))
    loop = training.loop()
    training.run(loop, tmp_path)
    assert trained(training) == [0, 1, 2, 3, 4]
    assert loop.statistics.compression_rate == pytest.approx(0.7, abs=1e-3)


def test_other_algorithms_follow_their_schedules_and_no_level_is_judged_without_them(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    staged = {**QUANTIZATION, "params": {"weights_quant_start_epoch": 4, "activations_quant_start_epoch": 4}}
    training = Training(adaptive([SPARSITY, staged]), holds_up_to(0.6))
    loop = training.loop()
    training.run(loop, tmp_path)
    assert "goes on until quantization is fully compressed" in caplog.text
    searched = [r for r in loop.statistics.epochs if r.phase == "search"]
    assert min(r.epoch for r in searched) == 5
    assert training.controller.compression_stages()["quantization"] == CompressionStage.FULLY_COMPRESSED
    assert loop.statistics.compression_rate == pytest.approx(0.6, abs=2e-2)


def test_if_the_others_never_end_a_warning_says_so(tmp_path, caplog):
    staged = {**QUANTIZATION, "params": {"weights_quant_start_epoch": 40}}
    training = Training(adaptive([SPARSITY, staged], maximal_total_epochs=3), holds_up_to(0.6))
    training.run(training.loop(), tmp_path)
    assert "after 3 epochs quantization is not fully compressed, so no level was tried" in caplog.text


def test_early_stopping_leaves_a_level(tmp_path):
    training = Training(adaptive(patience_epochs=50, maximal_total_epochs=60), holds_up_to(0.55))
    training.run(training.loop(), tmp_path, early_stopping_fn=lambda metric: metric < -1)
    assert len(trained(training)) < 15


@pytest.mark.parametrize("name", ["magnitude_sparsity", "filter_pruning"])
def test_of_several_levels_the_one_that_is_named_moves(tmp_path, name):
    training = Training(adaptive([PRUNING, SPARSITY], algorithm=name, patience_epochs=1))
    algorithms = training.controller.algorithms
    training._metric = lambda t: -1.0 + 10 * (0.7 - algorithms[name].compression_rate)
    (other,) = set(algorithms) - {name}
    loop = training.loop()
    training.run(loop, tmp_path)
    assert algorithms[name].compression_rate == loop.statistics.compression_rate == pytest.approx(0.68, abs=0.03)
    target = {"magnitude_sparsity": 0.5, "filter_pruning": 0.25}[other]
    assert algorithms[other].compression_rate == pytest.approx(target, abs=1e-2)


# The config.


@pytest.mark.parametrize(
    ("config", "path", "words"),
    [
        (adaptive([PRUNING, SPARSITY]), "params.algorithm", "'filter_pruning' or 'magnitude_sparsity'"),
        (adaptive(QUANTIZATION), "mode", "(quantization)"),
        (adaptive([SPARSITY, QUANTIZATION], algorithm="quantization"), "params.algorithm", "no level"),
        (adaptive(maximal_relative_accuracy_degradation=1.0), "params", "give one"),
        (adaptive(initial_compression_rate_step=0.01), "params.initial_compression_rate_step", "raise it"),
        (early(patience_epochs=3), "params.patience_epochs", "no effect"),
        (adaptive(patience=3), "params.patience", "patience_epochs"),
        (adaptive(patience_epochs=0), "params.patience_epochs", "got 0"),
        (adaptive(compression_rate_step_reduction_factor=1.0), "params.compression_rate_step_reduction_factor", "got"),
        ({**early(), "accuracy_aware_training": {"mode": "adaptive"}}, "mode", "adaptive_compression_level"),
        ({**early(), "accuracy_aware_training": {}}, "mode", "is required"),
    ],
)
def test_what_cannot_be_meant_is_refused_without_a_model(config, path, words):
    with pytest.raises(ConfigError, match="accuracy_aware_training") as caught:
        check_config(config)
    assert f"accuracy_aware_training.{path}" in str(caught.value) and words in str(caught.value)
    if "algorithm" in path:
        with pytest.raises(ConfigError, match="accuracy_aware_training"):
            create_compressed_model(Net(), config)


def test_the_ledger_says_who_reads_the_section():
    controller, _ = create_compressed_model(Net(), adaptive())
    entry = controller.ledger["accuracy_aware_training.params.patience_epochs"]
    assert "create_accuracy_aware_training_loop" in entry.effect


# Arguments.


def test_what_the_functions_should_not_return_is_refused(tmp_path):
    training = Training(early(), metrics=[0.0])
    for changes, words in [
        ({"configure_optimizers_fn": None}, "configure_optimizers_fn: a function without arguments is needed"),
        ({"configure_optimizers_fn": lambda: 3}, "returned int"),
        ({"configure_optimizers_fn": lambda: (None, None)}, "its first value is empty"),
        ({"validate_fn": lambda model, epoch: "good"}, "validate_fn: must return a number"),
        ({"validate_fn": lambda model, epoch: math.inf}, "got inf"),
        ({"validate_fn": lambda model, epoch: (90.0, 0.3)}, r"must return a number, .*got \(90.0, 0.3\)"),
        ({"validate_fn": lambda model, epoch: torch.ones(2)}, "validate_fn: must return a number"),
        ({"validate_fn": lambda model, epoch: np.ones(2)}, "validate_fn: must return a number"),
        ({"train_epoch_fn": 3}, "train_epoch_fn: must be a function"),
        ({"load_checkpoint_fn": print}, "load_checkpoint_fn: without dump_checkpoint_fn"),
        ({"tensorboard_writer": 3}, "tensorboard_writer"),
        ({"dump_checkpoint_fn": lambda *a: None}, "dump_checkpoint_fn: must return the path"),
        ({"dump_checkpoint_fn": lambda *a: "nowhere"}, "is no file"),
    ]:
        with pytest.raises(UsageError, match=words):
            training.run(training.loop(1.0), tmp_path, **changes)

    def begins_epochs(controller, *args, **keywords):
        controller.scheduler.epoch_step()

    training = Training(early())
    with pytest.raises(UsageError, match=r"remove that call"):
        training.run(training.loop(10.0), tmp_path, train_epoch_fn=begins_epochs)
    with pytest.raises(UsageError, match="not the model of the controller"):
        training.loop(10.0).run(nn.Linear(1, 1), print, print, print)


def test_a_training_function_that_never_steps_is_told(tmp_path, caplog):
    training = Training(early(maximal_total_epochs=2))
    training.run(training.loop(10.0), tmp_path, train_epoch_fn=lambda *args, **keywords: None)
    assert caplog.text.count("never called controller.scheduler.step()") == 1


def test_arguments_of_the_constructor():
    training = Training(adaptive())
    for arguments, words in [
        ({"accuracy": math.nan}, "finite"),
        ({"accuracy": "high"}, "finite"),
        ({"minimal_compression_rate": 0.9, "maximal_compression_rate": 0.5}, "rising"),
        ({"maximal_compression_rate": 1.0}, "rising"),
        ({"maximal_rate": 1.0}, "maximal_rate: is no argument"),
    ]:
        with pytest.raises(UsageError, match=words):
            training.loop(**arguments)
    with pytest.raises(ConfigError, match="this loop is of mode"):
        EarlyExitCompressionTrainingLoop(training.config, training.controller, 1.0)
    with pytest.raises(ConfigError, match="is missing"):
        create_accuracy_aware_training_loop({"compression": SPARSITY}, training.controller, 1.0)
    with pytest.raises(UsageError, match="pass the config that the model was created with"):
        create_accuracy_aware_training_loop(adaptive(PRUNING), training.controller, 1.0)
    with pytest.raises(UsageError, match="got a Net"):
        create_accuracy_aware_training_loop(adaptive(), training.model, 1.0)
    with pytest.raises(UsageError, match="no statistics before"):
        _ = training.loop().statistics


# Learning rates.

SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.1**epoch),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 3),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_scheduler_starts_anew_at_each_level_from_the_reduced_rate(tmp_path, kind):
    training = Training(adaptive(patience_epochs=2), holds_up_to(0.73), scheduler=SCHEDULERS[kind])
    training.run(training.loop(), tmp_path)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = SCHEDULERS[kind](optimizer)
    optimizer.step()
    scheduler.step()
    second = optimizer.param_groups[0]["lr"]
    rates = [call[2] for call in training.calls if call[0] == "train"]
    factors = [1, second, 1, 1, 1, second, 0.5, 0.5 * second, 0.5, 0.25, 0.25, 0.25 * second, 0.125]
    assert rates == pytest.approx([0.01 * factor for factor in factors])


def test_plateaus(tmp_path):
    def plateau(mode):
        return lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode=mode, patience=0, factor=0.1)

    training = Training(early(), metrics=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], scheduler=plateau("max"))
    training.run(training.loop(10.0), tmp_path)
    assert [call[2] for call in training.calls] == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-5])
    training = Training(early(), scheduler=plateau("min"))
    with pytest.raises(UsageError, match="create it with mode='max'"):
        training.run(training.loop(10.0), tmp_path)
    seen = []
    training.run(training.loop(10.0), tmp_path, update_learning_rate_fn=lambda *given: seen.append(given[1:3]))
    assert seen == [(n, 0.0) for n in (1, 2, 3, 4, 5)]
    training.calls.clear()
    training = Training(early(), scheduler=SCHEDULERS["step"])
    training.run(training.loop(10.0, lr_updates_needed=False), tmp_path)
    assert {call[2] for call in training.calls} == {0.01}


def test_a_scheduler_that_cannot_be_scaled_is_refused_where_it_would_have_to_be(tmp_path):
    class Own:
        def step(self):
            pass

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    training = Training(adaptive(), scheduler=lambda o: Own())
    with pytest.raises(UsageError, match=r"lr_reduction_factor"):
        training.run(training.loop(), tmp_path)
    training = Training(adaptive(lr_reduction_factor=1.0), holds_up_to(0.6), scheduler=lambda o: Own())
    training.run(training.loop(), tmp_path)


# Files.


@pytest.mark.usefixtures("pictures")
def test_table_picture_and_writer(tmp_path):
    seen = []

    class Writer:
        def add_scalar(self, name, value, epoch):
            seen.append((name, epoch))

    training = Training(adaptive(), holds_up_to(0.6))
    loop = training.loop(dump_checkpoints=False)
    training.run(loop, tmp_path, tensorboard_writer=Writer())
    names = {path.name for path in loop.log_dir.iterdir()}
    assert loop.log_dir.parent == tmp_path / "accuracy_aware_training"
    assert {"statistics.json", "statistics.txt", "rate_and_accuracy.png"} <= names and "last.pt" not in names
    assert json.loads((loop.log_dir / "statistics.json").read_text()) == json.loads(
        json.dumps(loop.statistics.to_dict())
    )
    table = (loop.log_dir / "statistics.txt").read_text()
    assert len([line for line in table.splitlines() if "search" in line]) == len(
        [r for r in loop.statistics.epochs if r.phase == "search"]
    )
    assert ("accuracy_aware/metric", 3) in seen
    draw_accuracy_aware(loop.statistics, tmp_path / "a.svg")
    with pytest.raises(UsageError, match="must end in"):
        draw_accuracy_aware(loop.statistics, tmp_path / "a.gif")
    again = Training(early(), metrics=[10.0])
    loop = again.loop(10.0)
    again.run(loop, tmp_path)
    assert len(list((tmp_path / "accuracy_aware_training").iterdir())) == 2


def test_functions_for_files_of_the_user(tmp_path):
    """His file of the best epoch is copied before he writes it again, and loaded after ours."""
    loaded = []

    def dump(model, controller, runner, folder):
        path = tmp_path / "mine.txt"
        path.write_text(f"{runner.cumulative_epoch_count} {runner.current_val_metric_value}")
        return str(path)

    def load(model, path):
        loaded.append(Path(path).read_text())

    training = Training(early(maximal_total_epochs=3), metrics=[1.0, 5.0, 2.0, 3.0])
    training.run(training.loop(10.0), tmp_path, dump_checkpoint_fn=dump, load_checkpoint_fn=load)
    assert loaded == ["1 5.0"]


def test_a_search_from_the_start_may_begin_above_the_target_of_the_schedule(tmp_path):
    section = copy.deepcopy(PRUNING)
    section["pruning_init"] = 0.8
    with pytest.raises(ConfigError, match="below pruning_init"):
        check_config(adaptive(section, initial_training_phase_epochs=1))
    training = Training(adaptive(section, initial_training_phase_epochs=0, patience_epochs=1), holds_up_to(0.5))
    assert training.controller.compression_rate == pytest.approx(0.79, abs=0.05)
    loop = training.loop()
    training.run(loop, tmp_path)
    assert loop.statistics.compression_rate == pytest.approx(0.46, abs=0.05)
