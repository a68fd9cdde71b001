"""Progress bars: every pass over data has one that says what is running, and none outlives its pass."""

import ast
import io
import tempfile
from pathlib import Path
from typing import ClassVar

import onnxruntime
import pytest
import torch
import torch.distributed as dist
from torch import nn

from compress_core import (
    CalibrationData,
    InitArgs,
    UsageError,
    create_accuracy_aware_training_loop,
    create_compressed_model,
    register_default_init_args,
    show_progress,
)
from compress_core.data import progress as module
from compress_core.data.progress import is_shown, progress, progress_bar
from compress_core.export.side_by_side import interleaved

ROOT = Path(__file__).parents[2]


class Bar:
    """Records bars in place of those of tqdm."""

    made: ClassVar[list["Bar"]] = []
    open: ClassVar[list["Bar"]] = []

    def __init__(self, **options):
        self.options, self.done, self.inside = options, options["initial"], [bar.options["desc"] for bar in self.open]
        Bar.made.append(self)
        Bar.open.append(self)

    def update(self, count):
        self.done += count

    def set_postfix(self, **values):
        self.values = values

    def close(self):
        Bar.open.remove(self)


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(Bar, "open", [])
    monkeypatch.setattr(module, "tqdm", Bar)
    yield Bar.made
    assert not Bar.open, "a bar is left"


def named(bars):
    return [bar.options["desc"] for bar in bars]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def data(count=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def created(*sections, **functions):
    config = {"compression": list(sections), "target_device": "TRIAL"}
    torch.manual_seed(0)
    config = register_default_init_args(config, data(), **functions)
    return create_compressed_model(Net().eval(), config)


RANGES = {"initializer": {"range": {"num_init_samples": 8}}}
PRUNING = {"algorithm": "filter_pruning", "pruning_init": 0.5, "params": {"multiple_of": 1}}


def precision(**keys):
    return {"algorithm": "quantization", "initializer": {**RANGES["initializer"], "precision": keys}}


def searched(kind, **params):
    ranking = {"interlayer_ranking_type": kind, **params}
    return {**PRUNING, "params": {**PRUNING["params"], **ranking}}


def validated(model, loader):
    return 0.5, float(model.fc.weight.abs().sum())


def trained():
    config = {
        "compression": [SPARSE],
        "accuracy_aware_training": {
            "mode": "early_exit",
            "params": {"maximal_absolute_accuracy_degradation": 1.0, "maximal_total_epochs": 2},
        },
    }
    controller, model = create_compressed_model(Net(), config)
    metrics = iter([0.0, 0.0, 5.0, 5.0])
    loop = create_accuracy_aware_training_loop(config, controller, 5.0)
    loop.run(
        model,
        train_epoch_fn=lambda *args, **keywords: 0.0,
        validate_fn=lambda *args, **keywords: next(metrics),
        configure_optimizers_fn=lambda: (torch.optim.SGD(model.parameters(), 0.1), None),
        log_dir=tempfile.mkdtemp(),
    )


SPARSE = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
PASSES = {
    "batch norm": (
        lambda: created({**SPARSE, "initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}}),
        ["batch-norm adaptation"],
    ),
    "reconstruction": (
        lambda: created({**SPARSE, "initializer": {"weight_reconstruction": {"num_samples": 8}}}),
        [
            "reading data for weight reconstruction",
            "weight reconstruction: first forwards",
            "weight reconstruction: error of the outputs",
            "weight reconstruction: layers",
            "weight reconstruction: error of the outputs",
        ],
    ),
    "ranges": (lambda: created({"algorithm": "quantization", **RANGES}), ["ranges of activations"]),
    "sensitivity": (
        lambda: created(precision(type="sensitivity", bits=[4, 8], budget={"average_bits": 6}, num_data_points=8)),
        [
            "ranges of activations",
            "reading data for the precision search",
            "outputs of the unquantized model",
            "precision search: error of each group",
            "precision search: frontier",
            "ranges of activations",
        ],
    ),
    "hawq": (
        lambda: created(
            precision(type="hawq", bits=[4, 8], budget={"average_bits": 6}, num_data_points=8, iter_number=3)
        ),
        [
            "ranges of activations",
            "reading data for the precision search",
            "precision search: traces of the Hessian",
            "ranges of activations",  # with the bits that were chosen
        ],
    ),
    "autoq": (
        lambda: created(precision(type="autoq", bits=[2, 4, 8], iter_number=3, num_data_points=8)),
        [
            "ranges of activations",
            "reading data for the precision search",
            "outputs of the unquantized model",
            "precision search: loss of each group",
            "precision search: swaps",
            "ranges of activations",
        ],
    ),
    "adapted ranking": (
        lambda: created(searched("adapted_ranking", adapted_params={"candidates": 2, "calibration_samples": 8})),
        [
            "reading data for the ranking search",
            "outputs of the uncompressed model",
            "ranking search",
            "batch-norm adaptation",
            "batch-norm adaptation",
        ],
    ),
    "learned ranking": (
        lambda: created(
            searched("learned_ranking", legr_params={"generations": 2, "train_steps": 1}),
            train_steps_fn=lambda *args: None,
            val_loader=data(),
            validate_fn=validated,
        ),
        ["ranking search"],
    ),
    "data-aware importance": (
        lambda: created({**PRUNING, "params": {**PRUNING["params"], "filter_importance": "reconstruction"}}),
        ["moments of the inputs of layers"],
    ),
    "export": (
        lambda: created(SPARSE)[0].export_onnx(Path(tempfile.mkdtemp()) / "model.onnx", data()[0]),
        [
            f"comparing with torch in ONNX Runtime {onnxruntime.__version__}, graph optimizations {on}"
            for on in ("off", "on")
        ],
    ),
    "accuracy-aware training": (lambda: trained(), ["accuracy-aware training"]),
    "timing files": (lambda: interleaved([lambda: None], 3, "timing 1 files"), ["timing 1 files"]),
}


@pytest.mark.parametrize(("run", "expected"), PASSES.values(), ids=PASSES)
def test_every_pass_says_what_is_running(run, expected, bars):
    run()
    assert named(bars) == expected
    for bar in bars:
        assert bar.options["unit"]
        assert bar.options["leave"] is (bar.options["desc"] == "accuracy-aware training")
        # As far as it goes: those that end early have a total that is an upper bound.
        assert bar.done > 0
        assert bar.options["total"] is None or bar.done <= bar.options["total"]


def test_adaptation_of_candidates_is_shown_within_the_search(bars):
    PASSES["adapted ranking"][0]()
    assert [bar.inside for bar in bars[-2:]] == [["ranking search"]] * 2


def test_no_loop_over_data_is_without_one():
    """Whoever reads the user's batches says what for, or shows a bar of its own; and tqdm is used in one place."""
    silent, direct = [], []
    for path in [*ROOT.glob("compress_core/**/*.py"), *ROOT.glob("plugins/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        place = path.relative_to(ROOT).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tqdm"):
                direct.append(place)
            if not (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "batches"
            ):
                continue
            if not ast.unparse(node.func.value).endswith("data"):
                continue
            if len(node.args) < 2 or ast.unparse(node.args[1]) == "None":
                silent.append(place)
    assert direct == ["compress_core/data/progress.py"]
    # The first shows a bar for its forwards, the second reads one batch.
    assert sorted(set(silent)) == ["compress_core/batchnorm/adaptation.py", "compress_core/contract/context.py"]


def test_data_without_a_word_names_the_section_that_needs_it(bars):
    calibration = CalibrationData(InitArgs(data()), "compression.0.params")
    assert len(list(calibration.batches(8))) == 2
    assert named(bars) == ["reading data for compression.0.params"]
    assert (bars[0].options["total"], bars[0].options["unit"], bars[0].done) == (8, "sample", 8)
    assert len(list(calibration.batches(8, None))) == 2
    assert len(bars) == 1


def test_plugins_have_it_in_their_context(bars):
    controller, _ = create_compressed_model(Net(), {"compression": [SPARSE]})
    assert list(controller.context.progress("abc", "search for ranks", unit="candidate")) == list("abc")
    assert list(controller.context.progress(iter("abc"), "without a length")) == list("abc")
    assert [bar.options["total"] for bar in bars] == [3, None]
    assert [bar.done for bar in bars] == [3, 3]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_bar_is_gone_when_the_error_arrives(error, bars):
    """The `bars` fixture alone would not see bars that only the end of the traceback closes."""
    calibration = CalibrationData(InitArgs(data()), "here")
    for begin in (lambda: progress(range(3), "items"), lambda: calibration.batches(8)):
        try:
            for _ in begin():
                assert len(Bar.open) == 1
                raise error
        except error as found:
            assert found.__traceback__ is not None
            assert not Bar.open
    with pytest.raises(error), progress_bar("by hand"):
        raise error
    for item in progress(range(3), "left early"):
        if item:
            break
    assert not Bar.open


class Terminal(io.StringIO):
    def isatty(self):
        return True


Notebook = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
Odd = type("Odd", (), {})


@pytest.fixture
def unset(monkeypatch):
    monkeypatch.delenv(module.ENVIRONMENT_VARIABLE, raising=False)
    show_progress(None)
    yield
    show_progress(None)


@pytest.mark.parametrize(
    ("stream", "seen"), [(Terminal(), True), (Notebook(), True), (io.StringIO(), False), (Odd(), False), (None, False)]
)
def test_where_it_is_shown(stream, seen, unset, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    assert is_shown() is seen
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, "1")
    assert is_shown()
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, "0")
    assert not is_shown()
    show_progress(True)
    assert is_shown()
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, "1")
    show_progress(False)
    assert not is_shown()


def test_a_closed_stream_is_not_shown_to_anybody(unset, monkeypatch):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr("sys.stderr", stream)
    assert not is_shown()


def test_other_values_are_refused(unset, monkeypatch):
    with pytest.raises(UsageError, match="True, False or None, got 1"):
        show_progress(1)
    monkeypatch.setenv(module.ENVIRONMENT_VARIABLE, "off")
    with pytest.raises(UsageError, match="COMPRESS_CORE_PROGRESS='off': use 0 or 1"):
        is_shown()


def test_only_the_first_process_shows_any(unset, monkeypatch):
    show_progress(True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert is_shown() is (rank == 0)


def test_what_is_written_says_what_is_running_and_is_wiped(unset, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(module, "_DELAY_S", 0)
    calibration = CalibrationData(InitArgs(data()), "here")
    for _, _ in calibration.batches(8, "ranges of activations"):
        pass
    text = stream.getvalue()
    assert "ranges of activations" in text and "/8" in text
    assert not text.rpartition("\r")[0].rpartition("\r")[2].strip()  # the last line that is drawn is blank
    show_progress(False)
    monkeypatch.setattr("sys.stderr", quiet := Terminal())
    list(calibration.batches(8, "ranges of activations"))
    assert quiet.getvalue() == ""


def test_a_bar_changes_nothing(unset, monkeypatch):
    states = []
    for shown in (False, True):
        monkeypatch.setattr("sys.stderr", Terminal())
        show_progress(shown)
        _, model = PASSES["reconstruction"][0]()
        states.append([*model.state_dict().values(), torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
