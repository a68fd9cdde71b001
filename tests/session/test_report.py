"""`controller.report` shows what is, changes nothing, and stays small, whatever the network and the plugins are."""

import copy
import json

import pytest
import torch
from torch import nn

from compress_core import (
    ByLayer,
    ExportError,
    FileError,
    Plan,
    PluginError,
    Stage,
    Statistics,
    Table,
    TableStatistics,
    UsageError,
    create_compressed_model,
    hookimpl,
    mask_weight,
)
from compress_core.pages import Grid, Text, page
from compress_core.session.figures import in_words
from compress_core.testing.fingerprint import fingerprint
from compress_core.transforms import raw_parameter
from tests.html_helpers import cells, check
from tests.integration.processes import as_rank, run_in_processes
from tests.plugin_helpers import algorithm, contributing
from tests.zoo import ZOO, ResidualNet, images, trained_model

ADAPTED = {"initializer": {"batchnorm_adaptation": {"num_bn_adaptation_samples": 8}}}
RANGES = {"initializer": {"range": {"num_init_samples": 8}}}
SECTIONS = {
    "magnitude_sparsity": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5, **ADAPTED},
    "rb_sparsity": {"algorithm": "rb_sparsity", "sparsity_init": 0.2},
    "const_sparsity": {"algorithm": "const_sparsity"},
    "movement_sparsity": {
        "algorithm": "movement_sparsity",
        "params": {"warmup_start_epoch": 1, "warmup_end_epoch": 2, "importance_regularization_factor": 0.1},
        "sparse_structure_by_scopes": [{"mode": "fine", "target_scopes": "{re}.*"}],
    },
    "filter_pruning": {
        "algorithm": "filter_pruning",
        "pruning_init": 0.3,
        "params": {"pruning_target": 0.5, "prune_first_conv": True, "multiple_of": 1},
    },
    "quantization": {"algorithm": "quantization", **RANGES},
    "knowledge_distillation": {"algorithm": "knowledge_distillation", "type": "mse"},
}
COMPOSED = [SECTIONS["filter_pruning"], SECTIONS["magnitude_sparsity"], SECTIONS["quantization"]]
CASES = {**SECTIONS, "composed": COMPOSED}


def loader(count=4):
    return list(images(8 * count).split(8))


def create(sections, model=None, **more):
    config = {"compression": copy.deepcopy(sections), "input_info": {"sample_size": [1, 3, 8, 8]}}
    return create_compressed_model(model or trained_model("resnet"), config, **{"init_loader": loader(), **more})


def written(controller, folder, **options):
    path = folder / "report.html"
    controller.report(path, **{"latency": False, **options})
    text = path.read_text()
    check(text)
    return text


def train(controller, model, epochs=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    model.train()
    for _ in range(epochs):
        controller.scheduler.epoch_step()
        for inputs in loader(2):
            controller.scheduler.step()
            optimizer.zero_grad()
            (model(inputs).square().mean() + controller.loss()).backward()
            optimizer.step()
        controller.log_epoch(loss=0.5)


@pytest.mark.parametrize("name", CASES)
def test_nothing_changes(name, tmp_path):
    controller, model = create(CASES[name])
    train(controller, model)
    data = torch.utils.data.DataLoader(images(8), 4, shuffle=True, generator=torch.Generator().manual_seed(2))
    before, state = fingerprint(model), json.dumps(controller.get_compression_state())
    drawn = data.generator.get_state()
    text = written(controller, tmp_path, latency=True)
    assert fingerprint(model) == before
    assert json.dumps(controller.get_compression_state()) == state
    assert torch.equal(data.generator.get_state(), drawn)
    for part in controller.algorithms:
        assert f'id="of-{part.replace("_", "-")}"' in text


@pytest.mark.parametrize("name", ["composed", "rb_sparsity", "knowledge_distillation"])
def test_training_ends_with_the_same_bits(name, tmp_path):
    ends = []
    for reports in (False, True):
        torch.manual_seed(5)
        controller, model = create(CASES[name])
        for _ in range(2):
            train(controller, model)
            if reports:
                written(controller, tmp_path, evaluate_fn=lambda m: float(m(images()).mean()))
        ends.append({key: value.clone() for key, value in model.state_dict().items()})
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_loader_draws_what_it_would_have_drawn(tmp_path):
    data = torch.utils.data.DataLoader(images(16), 4, shuffle=True, generator=torch.Generator().manual_seed(2))
    controller, _ = create(SECTIONS["quantization"], init_loader=data)
    before = data.generator.get_state()
    written(controller, tmp_path)
    assert torch.equal(data.generator.get_state(), before)


def test_values_are_those_of_the_statistics(tmp_path):
    controller, _ = create(COMPOSED)
    text = written(controller, tmp_path, latency=True, accuracy={"float": 0.93, "pruned": 0.5})
    found = controller.statistics()
    rows = cells(text, "Layers in the order of the forward")
    heads = rows[0]
    by_name = {row[1]: row for row in rows[1:]}
    for layer in found.magnitude_sparsity.layers:
        assert by_name[layer.name][heads.index("masked")] == f"{100 * layer.level:.1f} %"
    for layer in found.filter_pruning.layers:
        assert by_name[layer.name][heads.index("filters pruned")] == f"{100 * layer.level:.1f} %"
    for quantizer in found.quantization.quantizers:
        if quantizer.parameter:
            assert by_name[quantizer.parameter][heads.index("bits")] == str(quantizer.bits)
    names = [row[1] for row in rows[1:]]
    assert names[:2] == ["input", "conv1.weight"]
    assert names[-2:] == ["fc.weight", "output"]
    assert "add" in names
    drift = cells(text, "Drift of the running statistics")
    assert [row[0] for row in drift[1:]] == [layer.name for layer in found.batchnorm_adaptation.report.layers]
    left = cells(text, "Left as it is")[1:]
    expected = {(n, a, r) for a, p in controller._lifecycle.plans.items() for n, r in p.skipped.items()}
    assert {tuple(row) for row in left} >= {(n, a, r.replace("'", "&#39;")) for n, a, r in expected}
    assert cells(text, "Accuracy by step")[1:] == [["float", "0.93"], ["pruned", "0.5"]]
    stripped = controller.strip()
    assert f'<dt>Parameters</dt><dd class="value">{sum(p.numel() for p in stripped.parameters())}</dd>' in text
    assert "Certificate" in text
    assert "median of" in text


def test_epochs_are_drawn(tmp_path):
    controller, model = create(
        {
            "algorithm": "magnitude_sparsity",
            "params": {
                "schedule": "multistep",
                "multistep_steps": [1],
                "multistep_sparsity_levels": [0.1, 0.8],
            },
        }
    )
    assert "has not been trained with this controller" in written(controller, tmp_path)
    train(controller, model, epochs=2)
    text = written(controller, tmp_path)
    assert "<dt>loss</dt>" in text
    rows = cells(text, "After each epoch")
    column = rows[0].index("magnitude_sparsity/sparsity_level")
    expected = [row.measured["magnitude_sparsity/sparsity_level"] for row in controller.history]
    assert [float(row[column]) for row in rows[1:]] == pytest.approx(expected, rel=1e-3)


class Counting:
    """A function that judges a model, and tries to spoil it."""

    def __init__(self):
        self.models = []

    def __call__(self, model):
        self.models.append(model)
        assert not model.training
        model.train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return torch.tensor(0.25 * len(self.models))


def test_what_evaluate_fn_measures(tmp_path):
    judge = Counting()
    controller, model = create(SECTIONS["magnitude_sparsity"])
    before = fingerprint(model)
    text = written(controller, tmp_path, accuracy={"float": 0.9}, evaluate_fn=judge)
    assert fingerprint(model) == before
    assert cells(text, "Accuracy by step")[1:] == [["float", "0.9"], ["compressed, measured", "0.25"]]
    judge = Counting()
    controller, model = create(SECTIONS["knowledge_distillation"])
    text = written(controller, tmp_path, evaluate_fn=judge)
    assert cells(text, "Accuracy by step")[1:] == [["uncompressed, measured", "0.25"], ["compressed, measured", "0.5"]]
    assert all(judged is not model and judged is not controller.context.teacher for judged in judge.models)
    assert controller.context.teacher.conv1.weight.any()


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("report.pdf", {}, r"must end in \.html"),
        ("report.html", {"accuracy": 0.9}, "must be numbers by name"),
        ("report.html", {"accuracy": {"float": "high"}}, r"accuracy\['float'\] must be a number, got str"),
        ("report.html", {"evaluate_fn": 3}, "must be a function of the model"),
        ("report.html", {"evaluate_fn": lambda model: None}, "what evaluate_fn returns must be a number, got NoneType"),
    ],
)
def test_what_is_refused(path, options, message, tmp_path):
    controller, model = create(SECTIONS["magnitude_sparsity"])
    before = fingerprint(model)
    with pytest.raises(UsageError, match=message):
        controller.report(tmp_path / path, latency=False, **options)
    assert not list(tmp_path.iterdir())
    assert fingerprint(model) == before


def test_an_existing_report_stays_if_there_is_an_error(tmp_path, monkeypatch):
    controller, _ = create(SECTIONS["magnitude_sparsity"])
    text = written(controller, tmp_path)
    page._template.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "jinja2", None)
        with pytest.raises(ExportError, match=r"pip install 'compress-core\[report\]'"):
            controller.report(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text
    with pytest.raises(FileError):
        controller.report(tmp_path / "no such folder" / "report.html", latency=False)
    controller.strip(do_copy=False)
    with pytest.raises(UsageError, match="stripped in place"):
        controller.report(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text


def test_a_model_whose_schedule_has_not_ended_is_called_that(tmp_path):
    section = {
        "algorithm": "filter_pruning",
        "params": {"pruning_target": 0.5, "pruning_steps": 2, "prune_first_conv": True, "multiple_of": 1},
    }
    controller, model = create([section, SECTIONS["quantization"]])
    words = "is compressed less than the config asks for: filter_pruning is uncompressed"
    assert words in written(controller, tmp_path)
    train(controller, model, epochs=3)
    assert "than the config asks for" not in written(controller, tmp_path)


class TwoOutputs(nn.Linear):
    """Its second output is NaN."""

    def forward(self, x):
        return super().forward(x), super().forward(x) * torch.nan


def test_nan_is_no_agreement(tmp_path):
    config = {"compression": SECTIONS["magnitude_sparsity"], "input_info": {"sample_size": [2, 8]}}
    config["compression"] = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
    controller, _ = create_compressed_model(TwoOutputs(8, 8), config)
    text = written(controller, tmp_path)
    assert "there is NaN in their outputs" in text and "bit for bit" not in text


@pytest.mark.parametrize(
    "value",
    [torch.rand(2), torch.rand(2).numpy(), 10**400, None, "0.5"],
    ids=["tensor", "array", "beyond floats", "nothing", "text"],  # the same in every process
)
def test_accuracies_that_are_no_number(tmp_path, value):
    controller, _ = create(SECTIONS["magnitude_sparsity"])
    with pytest.raises(UsageError, match="must be a number, got"):
        controller.report(tmp_path / "report.html", evaluate_fn=lambda model: value)
    with pytest.raises(UsageError, match=r"accuracy\['float'\] must be a number, got"):
        controller.report(tmp_path / "report.html", accuracy={"float": value})


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path):
    controller, _ = create(SECTIONS["magnitude_sparsity"])
    paths = {"report.txt": UsageError, 5: UsageError, b"report.html": UsageError, "no/such/report.html": FileError}
    for path, error in paths.items():
        place = tmp_path / path if isinstance(path, str) else path
        with pytest.raises(error, match=r"path: |the folder must exist"):
            controller.report(place, evaluate_fn=lambda model: pytest.fail("was called"))
    assert not list(tmp_path.iterdir())


def test_inputs_that_do_not_fit(tmp_path):
    controller, _ = create(SECTIONS["magnitude_sparsity"])
    for wrong in (torch.rand(2, 1, 8, 8), "text", torch.rand(0, 3, 8, 8)):
        text = written(controller, tmp_path, args=wrong, title="half \ud800")
        assert "half \\ud800" in text
        assert len(wrong) == 0 or "There are no inputs that the model takes, so nothing was run" in text


class Keyed(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs["pixels"])


def test_inputs_without_a_key_that_the_model_reads(tmp_path):
    config = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}}
    controller, _ = create_compressed_model(Keyed(8, 8), config)
    text = written(controller, tmp_path, args=({"image": torch.rand(1, 8)},))
    assert "There are no inputs that the model takes, so nothing was run: KeyError: &#39;pixels&#39;" in text


def test_a_time_with_rounding_says_so(tmp_path):
    controller, _ = create(SECTIONS["quantization"])
    assert "rounding included" in written(controller, tmp_path, latency=True).partition("Time of a forward: median")[0]


def test_without_data_and_inputs(tmp_path):
    config = {"compression": SECTIONS["const_sparsity"]}
    controller, _ = create_compressed_model(trained_model("resnet"), config)
    text = written(controller, tmp_path, latency=True)
    assert "There are no inputs that the model takes, so nothing was run" in text
    names = [row[1] for row in cells(text, "Layers in the order of the forward")[1:]]
    assert names == ["conv1.weight", "conv2.weight", "fc.weight"]
    given = written(controller, tmp_path, args=images())
    assert "There are no inputs" not in given
    assert cells(given, "Layers in the order of the forward")[1][1] == "input"


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_network(name, tmp_path):
    inputs = ZOO[name][1]()
    kind = "long" if inputs[0].dtype == torch.long else "float"
    section = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}
    config = {"compression": section, "input_info": {"sample_size": list(inputs[0].shape), "type": kind}}
    controller, _ = create_compressed_model(trained_model(name), config)
    rows = cells(written(controller, tmp_path), "Layers in the order of the forward")[1:]
    weights = {layer.name for layer in controller.statistics().magnitude_sparsity.layers}
    assert weights <= {row[1] for row in rows}
    assert not any("not reached" in cell for row in rows for cell in row), rows


def test_resumed_and_shrunk(tmp_path):
    controller, model = create(COMPOSED)
    train(controller, model)
    state, weights = controller.get_compression_state(), model.state_dict()
    resumed, twin = create(COMPOSED, compression_state=state)
    twin.load_state_dict(weights)
    first, second = written(controller, tmp_path), written(resumed, tmp_path)
    for table in ("Layers in the order of the forward", "After each epoch", "Ranges and what was seen"):
        assert cells(first, table) == cells(second, table)
    controller.shrink()
    text = written(controller, tmp_path, latency=True)
    assert (
        "The model as it is has other parameters than before compression"
        in text.replace("model as it is", "model as it is")
        or "nothing to compare with" in text
    )
    assert "Certificate" in text


class Deep(nn.Module):
    """200 layers with shortcuts, as small as they can be."""

    def __init__(self, width=4):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(200)])

    def forward(self, x):
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + second(torch.relu(first(x)))
        return x


@pytest.mark.slow
def test_200_layers_fit_into_a_megabyte(tmp_path):
    sections = [{"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}, SECTIONS["quantization"]]
    controller, _ = create_compressed_model(Deep(), {"compression": sections}, init_loader=[torch.randn(8, 4)])
    text = written(controller, tmp_path)
    assert len(text.encode()) < 1_000_000
    assert len(cells(text, "Layers in the order of the forward")) == 1 + 200 + 100 + 2
    assert len(cells(text, "Ranges and what was seen")) == 1 + len(controller.all_quantizations)


# What third parties add.


def masking(**members):
    def commit(self, model, plan):
        for name in plan.targets:
            weight = raw_parameter(model, name)
            mask_weight(model, name, (torch.arange(weight.numel()) % 4 > 0).view(weight.shape), key=self.name)

    defaults = {
        "compress_plan": hookimpl(lambda self, model, context: context.plan_weights(model, self)),
        "compress_commit": hookimpl(commit),
        "stage": Stage.SPARSITY,
    }
    return algorithm(**{**defaults, **members})


def third_party(registry, tmp_path, sections=({"algorithm": "mine"},), model=None, **members):
    registry.register(contributing(masking(**members)), "demo")
    controller, _ = create(list(sections), model)
    return controller


def test_a_plugin_that_says_nothing(registry, tmp_path):
    text = written(third_party(registry, tmp_path), tmp_path)
    rows = cells(text, "Layers in the order of the forward")
    assert [row[rows[0].index("zeros")] for row in rows if row[1] == "conv1.weight"] == ["25.0 %"]


def test_a_plugin_with_tables(registry, tmp_path):
    statistics = TableStatistics({"zeros": 17}, [Table("By layer", ("layer", "zeros"), [("fc", 3)])], "Mine")
    text = written(third_party(registry, tmp_path, compress_statistics=hookimpl(lambda self: statistics)), tmp_path)
    assert cells(text, "Mine")[1:] == [["zeros", "17"]]
    assert cells(text, "By layer")[1:] == [["fc", "3"]]


class Told(Statistics):
    def tables(self):
        return []

    def to_dict(self):
        return {}

    def by_layer(self):
        return [ByLayer("masked", {"fc.weight": 0.25}, "zeros"), ByLayer("age", {"conv1": 3})]

    def left_alone(self):
        return {"bn1": "is a norm"}

    def blocks(self):
        return [Text("told by the plugin")]


def test_a_plugin_that_says_more(registry, tmp_path):
    def report(self, model, context):
        with torch.no_grad():
            model.fc.bias.fill_(7)
        assert not model.training
        return [Grid("Measured", ("samples",), [(sum(size for _, size in context.report_data("mine").batches(16)),)])]

    members = {"compress_statistics": hookimpl(lambda self: Told()), "compress_report": hookimpl(report)}
    sections = [{"algorithm": "mine"}, SECTIONS["magnitude_sparsity"]]
    controller = third_party(registry, tmp_path, sections, **members)
    before = fingerprint(controller.model)
    text = written(controller, tmp_path)
    assert fingerprint(controller.model) == before
    rows = cells(text, "Layers in the order of the forward")
    assert rows[0][5:] == ["masked (mine)", "age", "masked (magnitude_sparsity)"]
    assert next(row for row in rows if row[1] == "fc.weight")[5] == "25.0 %"
    assert next(row for row in rows if row[1] == "conv1.weight")[6] == "3"
    assert ["bn1", "mine", "is a norm"] in cells(text, "Left as it is")
    assert "told by the plugin" in text
    assert cells(text, "Measured")[1:] == [["16"]]


@pytest.mark.parametrize("returned", [["text"], [3], 3])
def test_a_plugin_that_returns_something_else(registry, tmp_path, returned):
    controller = third_party(registry, tmp_path, compress_report=hookimpl(lambda self: returned))
    with pytest.raises(PluginError, match=r"compress_report\(\) of the algorithm 'mine'"):
        written(controller, tmp_path)


def test_an_error_of_a_plugin_names_it(registry, tmp_path):
    def report(self):
        raise KeyError("lost")

    with pytest.raises(KeyError) as caught:
        written(third_party(registry, tmp_path, compress_report=hookimpl(report)), tmp_path)
    assert "raised in compress_report() of 'mine'" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_hostile_names_and_long_tables(registry, tmp_path):
    hostile = '<script>alert("x")</script>'
    rows = [(f"{hostile}{number}", "y" * 1000) for number in range(2000)]
    statistics = TableStatistics({hostile: float("nan")}, [Table(hostile, (hostile, ""), rows)], hostile)
    plan = hookimpl(lambda self, model: Plan(("fc.weight",), {hostile: hostile}))
    model = ResidualNet()
    model.add_module("<b>&amp;", nn.Linear(2, 2))
    controller = third_party(
        registry,
        tmp_path,
        (({"algorithm": "mine"}),),
        model,
        compress_plan=plan,
        compress_statistics=hookimpl(lambda self: statistics),
    )
    text = written(controller, tmp_path, title=hostile, accuracy={hostile: float("inf"), "b": float("nan")})
    assert "<script" not in text
    assert "<b>" not in text
    assert "1,400 further rows are left out" in text
    assert "not reached" in text
    assert len(text) < 600_000


def by_rank(rank, folder):
    with as_rank(rank, folder):
        controller, model = create(SECTIONS["magnitude_sparsity"], init_loader=[images(8) + rank])
        before = fingerprint(model)
        calls = []
        options = {
            "latency": False,
            "evaluate_fn": lambda m: torch.distributed.all_reduce(torch.ones(1)) or calls.append(m) or 1.0,
        }
        controller.report(f"{folder}/all{rank}.html", **options)
        if rank == 0:
            controller.report(f"{folder}/one.html", latency=False)
        assert len(calls) == 1
        assert fingerprint(model) == before


@pytest.mark.slow
def test_of_two_processes_the_first_writes(tmp_path):
    run_in_processes(by_rank, (str(tmp_path),), 2)
    assert sorted(path.name for path in tmp_path.glob("*.html")) == ["all0.html", "one.html"]
    check((tmp_path / "all0.html").read_text())


def test_sizes_are_those_of_stripped_model_and_file(tmp_path):
    controller, _ = create(COMPOSED)
    text = written(controller, tmp_path)
    stripped = controller.strip()
    size = sum(p.numel() * p.element_size() for p in stripped.parameters())
    # A byte for each element of a quantized weight, and five for each of its scales; the rest as it is.
    quantizers = [q for q in controller.statistics().quantization.quantizers if q.parameter]
    scales = {q.parameter: controller.weight_quantizers[q.name].shape for q in quantizers}
    weights = {name: stripped.get_parameter(name) for name in scales}
    file = size - sum(3 * w.numel() for w in weights.values())
    file += sum(5 * (w.shape[0] if max(scales[name]) > 1 else 1) for name, w in weights.items())
    assert f'<dt>Size</dt><dd class="value">{in_words("size", size)}</dd>' in text
    assert f'<dt>Size of a file</dt><dd class="value">{in_words("size", file)}</dd>' in text
    sparse, _ = create(SECTIONS["magnitude_sparsity"])
    assert "Size of a file" not in written(sparse, tmp_path)
