"""Bad input: an error that names the place, the value and the remedy, and nothing is changed."""

import collections
import json
import logging

import pytest
import torch
from torch import nn

from compress_core import (
    CompressionError,
    ConfigError,
    DataError,
    ModelError,
    StateError,
    TransformError,
    UsageError,
    create_compressed_model,
    register_default_init_args,
)
from compress_core.testing import fingerprint
from tests.zoo import ResidualNet, images, trained

PATH = "compression.magnitude_sparsity.initializer.batchnorm_adaptation"


def config(samples=16, **section):
    adaptation = {"batchnorm_adaptation": {"num_bn_adaptation_samples": samples}}
    section = {"initializer": adaptation} | section
    return {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3, **section}}


def assert_refused(error, parts, document=None, model=None, **keywords):
    model = model or trained(ResidualNet(), (images(),))
    before = fingerprint(model)
    with pytest.raises(error) as caught:
        create_compressed_model(model, config() if document is None else document, **keywords)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("batch", "parts"),
    [
        (torch.randn(4, 3), ["the model failed on a calibration batch: ", "The batch: Tensor (4, 3) torch.float32"]),
        (torch.randn(4, 5, 8, 8), ["(4, 5, 8, 8)", "5 channels instead"]),
        (torch.ones(4, 3, 8, 8, dtype=torch.long), ["torch.int64"]),
        (torch.tensor(1.0), ["The batch: Tensor () torch.float32"]),
        ({"foo": images()}, ["dict with batch['foo'] = Tensor (4, 3, 8, 8)", "takes (x)", "model(x=batch['foo'])"]),
        ((torch.arange(4), images()), ["tuple with batch[0] = Tensor (4,) torch.int64", "model(x=batch[1])"]),
    ],
)
def test_batch_that_the_model_cannot_take(batch, parts):
    assert_refused(DataError, [PATH, "forward_fn=lambda model, batch", *parts], init_loader=[batch])


@pytest.mark.parametrize(
    ("loader", "part"),
    [
        (list, "needs an iterable of batches, such as a DataLoader, got the class list"),
        (3, "got int"),
        ("text", "got str"),
        (torch.tensor(1.0), "cannot be iterated over"),
        ([], "gave no sample"),
        ([torch.randn(0, 3, 8, 8)], "gave no sample"),
        (iter([]), "a generator that was read before is empty"),
        ([float("nan") * images()], "hold NaN or infinity on the calibration data"),
    ],
)
def test_loader_that_is_none(loader, part):
    assert_refused(DataError, [PATH, part], init_loader=loader)


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"device": "cuda:0"}, "the device 'cuda:0' cannot be used here"),
        ({"device": "foo"}, "the device 'foo' cannot be used here"),
        ({"forward_fn": 3}, "forward_fn must be a function (model, batch), got 3"),
        (
            {"forward_fn": lambda model: model},
            "forward_fn failed on a calibration batch: <lambda>() takes 1 positional",
        ),
        ({"forward_fn": lambda model, batch: None}, "no batch norm was reached"),
    ],
)
def test_init_args_that_cannot_work(keywords, part):
    if "cuda" in part and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert_refused(DataError, [PATH, part], register_default_init_args(config(), [images()], **keywords))


def test_error_of_the_models_own_keeps_its_type_and_says_where():
    def fail(model, batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        create_compressed_model(ResidualNet(), register_default_init_args(config(), [images()], forward_fn=fail))
    assert any("compress_initialize() of 'batchnorm_adaptation'" in note for note in caught.value.__notes__)


def test_short_loader_is_a_warning_with_both_numbers(caplog):
    create_compressed_model(ResidualNet(), config(100), init_loader=[images()])
    assert "100 samples were asked for, the data loader gave 4" in caplog.text


def test_single_value_has_no_variance():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert_refused(
        DataError, [PATH, "'1' has seen one value for each channel"], model=model, init_loader=[torch.randn(1, 3)]
    )


def test_dict_like_batches_are_dicts():
    batch = collections.UserDict({"x": images(16), "labels": torch.zeros(16)})
    controller, _ = create_compressed_model(ResidualNet(), config(), init_loader=[batch])
    assert controller.statistics().batchnorm_adaptation.report.samples == 16


def test_unreached_layers_are_named(caplog):
    model = ResidualNet()
    model.other = nn.BatchNorm2d(3)
    create_compressed_model(model, config(), init_loader=[images(16)])
    assert "1 layers were not reached and are not changed: ['other']" in caplog.text


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_weights_that_cannot_be_ranked(dtype):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.ones(3, 3, dtype=dtype), requires_grad=False)
    assert_refused(ModelError, ["'1.weight' has the dtype", "ignored_scopes"], config(0), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_work(dtype):
    model = ResidualNet().to(dtype)
    controller, model = create_compressed_model(model, config(), init_loader=[images(16).to(dtype)])
    assert controller.sparsity_level == pytest.approx(0.3, abs=1e-3)
    assert model.bn1.running_mean.dtype is dtype
    assert torch.isfinite(model.bn1.running_var).all()


def test_model_whose_weights_are_empty():
    controller, _ = create_compressed_model(nn.Sequential(nn.Linear(0, 3)), config(0))
    controller.scheduler.epoch_step()
    assert controller.sparsity_level == 0


STATE_DAMAGE = {
    "algorithms is none": lambda s: s.update(algorithms=None),
    "algorithms is a list": lambda s: s.update(algorithms=[]),
    "algorithm is none": lambda s: s["algorithms"].update(magnitude_sparsity=None),
    "no scheduler": lambda s: s.pop("scheduler"),
    "no plan": lambda s: s["algorithms"]["magnitude_sparsity"].pop("plan"),
    "no config": lambda s: s["algorithms"]["magnitude_sparsity"].pop("config"),
    "no state": lambda s: s["algorithms"]["magnitude_sparsity"].pop("state"),
    "no targets": lambda s: s["algorithms"]["magnitude_sparsity"]["plan"].pop("targets"),
    "no level": lambda s: s["algorithms"]["magnitude_sparsity"]["state"].pop("level"),
    "level is text": lambda s: s["algorithms"]["magnitude_sparsity"]["state"].update(level="x"),
    "level below 0": lambda s: s["algorithms"]["magnitude_sparsity"]["state"].update(level=-5),
    "frozen is text": lambda s: s["algorithms"]["magnitude_sparsity"]["state"].update(frozen="x"),
    "no schedule": lambda s: s["algorithms"]["magnitude_sparsity"]["state"].update(schedule=None),
    "epoch is none": lambda s: s["scheduler"].update(epoch=None),
    "epoch is infinite": lambda s: s["scheduler"].update(epoch=float("inf")),
    "unknown algorithm": lambda s: s["algorithms"].update(wavelets={}),
    "report is none": lambda s: s["initializers"].update(batchnorm_adaptation={"x": 1}),
}


@pytest.mark.parametrize("damage", STATE_DAMAGE)
def test_damaged_state(damage):
    controller, _ = create_compressed_model(ResidualNet(), config(), init_loader=[images(16)])
    state = json.loads(json.dumps(controller.get_compression_state()))
    STATE_DAMAGE[damage](state)
    assert_refused(StateError, [], config(), compression_state=state)


def test_adaptation_is_remembered_across_resuming():
    model = trained(ResidualNet(), (images(),))
    model.bn1.eval()  # frozen
    controller, model = create_compressed_model(model, config(), init_loader=[images(16)])
    state = json.loads(json.dumps(controller.get_compression_state()))
    resumed, other = create_compressed_model(ResidualNet(), config(), compression_state=state, init_loader=[images(16)])
    other.load_state_dict(model.state_dict())
    assert resumed.get_compression_state() == state
    assert resumed.statistics().batchnorm_adaptation.to_str() == controller.statistics().batchnorm_adaptation.to_str()
    other.eval()
    before = other.bn1.running_mean.clone()
    assert resumed.adapt_batchnorm([images(16)]).method == "exact"  # nothing is left to pair with
    assert torch.equal(other.bn1.running_mean, before)


@pytest.mark.parametrize("call", ["step", "epoch_step"])
@pytest.mark.parametrize("index", ["x", [1], float("nan"), 1.5, -5, True])
def test_scheduler_takes_indices_only(call, index):
    controller, _ = create_compressed_model(ResidualNet(), config(0))
    with pytest.raises(UsageError, match="a whole number from 0 on, got"):
        getattr(controller.scheduler, call)(index)
    assert (controller.scheduler.current_epoch, controller.scheduler.current_step) == (-1, -1)


def test_failing_tick_moves_neither_clock_nor_masks():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    params = {"sparsity_level_setting_mode": "local", "sparsity_target_epoch": 2}
    controller, _ = create_compressed_model(model, config(0, params=params))
    controller.scheduler.epoch_step()
    before = controller.statistics().magnitude_sparsity
    with torch.no_grad():
        model.get_submodule("1")._parameters["weight"][0, 0] = float("nan")
    for change in (controller.scheduler.epoch_step, lambda: controller.set_sparsity_level(0.9)):
        with pytest.raises(ModelError, match=r"'1\.weight' holds NaN"):
            change()
        assert controller.scheduler.current_epoch == 0
        assert controller.statistics().magnitude_sparsity == before


def test_refused_rate_leaves_masks_frozen():
    controller, _ = create_compressed_model(ResidualNet(), config(0))
    controller.freeze()
    with pytest.raises(UsageError, match=r"\[0, 1\), got 5"):
        controller.compression_rate = 5
    assert controller.frozen
    with pytest.raises(UsageError, match="freeze takes True or False, got 'x'"):
        controller.freeze("x")


@pytest.mark.parametrize("name", ["sparsity_level", "frozen", "target_level"])
def test_measured_values_cannot_be_written_over(name):
    controller, _ = create_compressed_model(ResidualNet(), config(0))
    with pytest.raises(AttributeError, match=f"'{name}' belongs to magnitude_sparsity and cannot be set"):
        setattr(controller, name, 0.9)


def test_controller_of_a_stripped_model_says_so():
    controller, _ = create_compressed_model(ResidualNet(), config(0))
    controller.strip(do_copy=False)
    assert "stripped" in repr(controller)
    calls = (
        controller.statistics, controller.compression_stage, controller.loss, controller.strip, controller.scheduler.step,
        controller.get_compression_state, controller.adapt_batchnorm, lambda: controller.compression_rate,
        lambda: controller.sparsity_level, lambda: controller.set_sparsity_level(0.5),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match="stripped in place"):
            call()


def test_parametrizing_a_compressed_layer_is_refused_and_its_bias_may_be():
    controller, model = create_compressed_model(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)), config(0))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Identity())
    x = torch.randn(2, 6)
    expected = model(x)
    assert torch.equal(controller.strip()(x), expected)
    with pytest.raises(TransformError, match="apply parametrize, weight_norm or prune before compression"):
        nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Identity())


def test_class_of_a_compressed_layer_makes_plain_layers():
    _, model = create_compressed_model(nn.Sequential(nn.Linear(6, 8)), config(0))
    layer = type(model[0])(3, 4)
    assert torch.equal(layer.weight, layer._parameters["weight"])


@pytest.mark.parametrize(
    ("document", "parts"),
    [
        ({"COMPRESSION": {}}, ["COMPRESSION: unknown key", "Did you mean 'compression'?"]),
        ({"compress": {}}, ["compress: unknown key", "Did you mean 'compression'?"]),
        ({"algorithm": "magnitude_sparsity"}, ["algorithm: unknown key", "It belongs in 'compression'."]),
        ({"compression": {"algorithmx": "magnitude_sparsity"}}, ["'algorithm' is required, is it misspelt as 'algorithmx'?"]),
        ({"compression": {"algorithm": "MAGNITUDE_SPARSITY"}}, ["Did you mean 'magnitude_sparsity'?"]),
        (config(0, params={"schedule": "multistep", "multistep_steps": [2, 2], "multistep_sparsity_levels": [0.3, 0.4, 0.5]}), ["multistep_steps: names an epoch twice: [2, 2]"]),
        (config(0, params={"schedule": "multistep", "multistep_steps": [-1]}), ["multistep_steps.0: input should be greater than or equal to 0"]),
        (config(0, sparsity_init=0.9, params={"schedule": "multistep", "multistep_steps": [1], "multistep_sparsity_levels": [0.2, 0.4]}), ["multistep_sparsity_levels: ends at 0.4, below sparsity_init 0.9"]),
        (config(0, initializer={"batchnorm_adaptation": {"num_bn_adaptation_samples": 4, "ignored_scopes": ["bn99"]}}), [f"{PATH}.ignored_scopes.0: the scope 'bn99' matches no layer"]),
        (config(0, ignored_scopes=["ResidualNet/__add___0"]), ["ignored_scopes.0: the scope 'ResidualNet/__add___0' matches no layer"]),
    ],
)  # fmt: skip
def test_documents(document, parts):
    assert_refused(ConfigError, parts, document, init_loader=[images()])


def test_root_scope_may_mean_a_batch_norm():
    model = trained(ResidualNet(), (images(),))
    before = model.bn1.running_mean.clone()
    create_compressed_model(model, {**config(), "ignored_scopes": ["bn1"]}, init_loader=[images(16)])
    assert torch.equal(model.bn1.running_mean, before)


def test_nncf_scope_of_an_operator_is_not_the_subtree():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    section = config(0, ignored_scopes=["Sequential/Sequential[0]/__add___0"], validate_scopes=False)
    controller, _ = create_compressed_model(model, section)
    assert controller.sparsified_module_info == ["0.0.weight", "1.weight"]


def test_value_that_the_program_has_read_is_unread_for_the_ledger():
    from compress_core import CompressionConfig

    loaded = CompressionConfig.from_dict(config(0, params={"patience": 3}))
    assert loaded.sections[0].params.patience == 3
    with pytest.raises(ConfigError, match=r"params\.patience: the value 3 can have no effect"):
        create_compressed_model(ResidualNet(), loaded)


def test_check_finds_values_without_effect():
    from compress_core import check_config

    with pytest.raises(ConfigError, match=r"params\.patience: the value 3 can have no effect"):
        check_config(config(0, params={"patience": 3}))
    check_config({"unused_values": "warn", **config(0, params={"patience": 3})})


@pytest.mark.parametrize("observers", [5, nn.Linear(1, 1), [object()]])
def test_observers_that_are_none(observers):
    assert_refused(CompressionError, [], config(0), observers=observers)


def test_adaptive_schedule_is_not_frozen_before_its_end(caplog):
    model = nn.Linear(100, 100)
    params = {"schedule": "adaptive", "patience": 20, "sparsity_target": 0.5}
    controller, _ = create_compressed_model(model, config(0, sparsity_init=0.0, params=params))
    with caplog.at_level(logging.WARNING):
        for _ in range(230):
            controller.scheduler.epoch_step()
    assert controller.sparsity_level == pytest.approx(0.5)


def test_embedding_that_rewrites_its_weight_is_left_alone_and_said_so():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, 4))
    controller, _ = create_compressed_model(model, config(0))
    assert controller.sparsified_module_info == ["1.weight"]
    plan = controller.get_compression_state()["algorithms"]["magnitude_sparsity"]["plan"]
    assert plan["skipped"] == {"0.weight": "its max_norm rewrites the weight in every forward"}
