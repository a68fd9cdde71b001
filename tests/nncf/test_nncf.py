"""The names of NNCF: what they do here, and what they say where they cannot."""

import copy
import json
import logging
import pickle

import pytest
import torch
from torch import nn

import compress_core
from compress_core import ConfigError, StateError, UsageError, load_checkpoint, nncf, save_checkpoint
from compress_core.nncf import NNCFConfig, create_compressed_model, load_state, register_default_init_args
from tests.accuracy_aware.loops_helpers import IMAGES, LABELS, PRUNING, QUANTIZATION, SPARSITY, Net, assert_same

INPUT = {"input_info": {"sample_size": [1, 3, 8, 8]}}


def config(*sections, **root):
    return NNCFConfig.from_dict({**INPUT, **root, "compression": copy.deepcopy(list(sections))})


def compressed(*sections, **root):
    made = register_default_init_args(config(*sections, **root), [(IMAGES, LABELS)])
    torch.manual_seed(0)
    return create_compressed_model(Net(), made)


# The config.


def test_a_config_is_a_dict_that_is_checked_when_it_is_used(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"compression": {"algorithm": "magnitude_sparsity"},} // NNCF allows this')
    made = NNCFConfig.from_json(path)
    assert made["compression"]["algorithm"] == "magnitude_sparsity" and made.get("nothing") is None
    made.update({"input_info": {"sample_size": [1, 3, 8, 8]}})
    made["compression"]["sparsity_init"] = 0.5
    controller, _ = create_compressed_model(Net(), made)
    assert controller.scheduler.current_sparsity_level == pytest.approx(0.5, abs=1e-3)
    made["compression"]["sparsity_init"] = 5
    with pytest.raises(ConfigError, match="sparsity_init"):
        create_compressed_model(Net(), made)
    with pytest.raises(ConfigError, match="sparsity_inti"):
        NNCFConfig.from_dict({"compression": {"algorithm": "magnitude_sparsity", "sparsity_inti": 0.5}})
    assert create_compressed_model(Net(), NNCFConfig())[0].algorithms == {}
    assert "properties" in NNCFConfig.schema()


@pytest.mark.parametrize("kind", ["hawq", "autoq"])
def test_the_loss_and_the_metric_of_a_user_reach_the_choice_of_bits(kind):
    seen = []

    def criterion(outputs, target):
        seen.append(target)
        return nn.functional.cross_entropy(outputs, target)

    def evaluate(model, loader):
        seen.append(next(iter(loader))[1])
        return float((model(IMAGES).argmax(1) == LABELS).float().mean())

    ratio = {
        "hawq": {"compression_ratio": 1.0, "iter_number": 2},
        "autoq": {"iter_number": 1, "compression_ratio": 0.2},
    }
    precision = {"type": kind, "bits": [4, 8], **ratio[kind]}
    made = config({**QUANTIZATION, "initializer": {"precision": precision}}, target_device="TRIAL")
    given = (
        {"criterion": criterion} if kind == "hawq" else {"autoq_eval_fn": evaluate, "val_loader": [(IMAGES, LABELS)]}
    )
    create_compressed_model(Net(), register_default_init_args(made, [(IMAGES, LABELS)], **given))
    assert seen and all(torch.equal(target, LABELS[: len(target)]) for target in seen)


def test_extra_structs():
    made = config(QUANTIZATION)
    assert not made.has_extra_struct(nncf.QuantizationRangeInitArgs)
    with pytest.raises(UsageError, match="no QuantizationRangeInitArgs was registered"):
        made.get_extra_struct(nncf.QuantizationRangeInitArgs)
    made.register_extra_structs([nncf.QuantizationRangeInitArgs([(IMAGES, LABELS)])])
    assert made.get_extra_struct(nncf.QuantizationRangeInitArgs).data_loader[0][0] is IMAGES
    _, model = create_compressed_model(Net(), made)
    assert float(model.state_dict()["activation_transforms.input_0.quantization.scale"]) == pytest.approx(
        float(IMAGES.abs().max())
    )


def test_a_copy_of_a_config_has_the_attached_objects():
    made = register_default_init_args(config(QUANTIZATION), [(IMAGES, LABELS)])
    for twin in (made.copy(), copy.copy(made)):
        assert twin == made and isinstance(twin, NNCFConfig)
        assert twin.get_all_extra_structs_for_copy() == made.get_all_extra_structs_for_copy()
        twin.register_extra_structs([nncf.ModelEvaluationArgs(print)])
        assert not made.has_extra_struct(nncf.ModelEvaluationArgs)
    create_compressed_model(Net(), made.copy())


def test_every_argument_of_register_default_init_args_is_kept_or_named(caplog):
    made = config(QUANTIZATION)
    loader = [(IMAGES, LABELS)]
    register_default_init_args(
        made,
        loader,
        criterion=nn.CrossEntropyLoss(),
        train_steps_fn=print,
        validate_fn=print,
        val_loader=loader,
        autoq_eval_fn=print,
        model_eval_fn=print,
        distributed_callbacks=(print, print),
        execution_parameters=nncf.ExecutionParameters(True, None),
        legr_train_optimizer=print,
        device="cpu",
    )
    kinds = {type(struct).__name__ for struct in made.get_all_extra_structs_for_copy()}
    assert kinds == {
        *("QuantizationRangeInitArgs", "BNAdaptationInitArgs", "QuantizationPrecisionInitArgs"),
        *("AutoQPrecisionInitArgs", "LeGRInitArgs", "ModelEvaluationArgs"),
        *("DistributedCallbacksArgs", "ExecutionParameters"),
    }
    assert "distributed_callbacks: not used" in caplog.text and "execution_parameters: not used" in caplog.text
    for arguments, words in [
        ({"criterion_fn": print}, "without criterion"),
        ({"train_steps_fn": print}, "val_loader and validate_fn"),
        ({"legr_train_optimizer": print}, "without train_steps_fn"),
        ({"validate_fn": print}, "validate_fn: is of no use without val_loader"),
    ]:
        with pytest.raises(UsageError, match=words):
            register_default_init_args(config(QUANTIZATION), loader, **arguments)
    with pytest.raises(UsageError, match=r"NNCFConfig\.from_dict"):
        register_default_init_args({}, loader)


def test_a_validation_without_training_decides_an_adapted_ranking(caplog):
    params = {"pruning_target": 0.5, "multiple_of": 1, "interlayer_ranking_type": "adapted_ranking"}
    section = {"algorithm": "filter_pruning", "params": {**params, "adapted_params": {"candidates": 3}}}
    loader = [(IMAGES, LABELS)]
    accuracies = iter([0.25, 0.75, 0.5])
    made = register_default_init_args(
        config(section), loader, validate_fn=lambda model, data: (next(accuracies), 0.0), val_loader=loader
    )
    ranking = create_compressed_model(Net(), made)[0].statistics().filter_pruning.to_dict()["ranking"]
    assert (ranking["measure"], ranking["value"]) == ("accuracy", 0.75)
    register_default_init_args(config(section), loader, val_loader=loader)
    assert "val_loader: is for validate_fn and autoq_eval_fn" in caplog.text


class TakesAPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.kinds = []

    def forward(self, x, y=None):
        self.kinds.append((type(x), y is None))
        return self.fc(x[0] + x[1] if isinstance(x, tuple | list) else x)


def test_the_first_item_of_a_batch_is_one_argument():
    """`((a, b), y)` is model((a, b)) as in NNCF; compress-core itself calls model(a, b)."""
    pair = (torch.ones(2, 4), torch.ones(2, 4))
    made = NNCFConfig.from_dict({"compression": {"algorithm": "quantization"}})
    register_default_init_args(made, [(pair, torch.zeros(2))])
    model = TakesAPair()
    kinds = model.kinds
    create_compressed_model(model, made)
    assert kinds == [] or all(kind in (tuple, list) and alone for kind, alone in kinds)

    class Loader(nncf.PTInitializingDataLoader):
        def get_inputs(self, item):
            return (item["a"],), {"y": item["b"]}

    made = NNCFConfig.from_dict({"compression": {"algorithm": "quantization"}})
    register_default_init_args(made, Loader([{"a": torch.ones(2, 4), "b": torch.ones(2)}]))
    create_compressed_model(TakesAPair(), made)


# Creating.


def test_a_dummy_forward_stands_in_for_input_info():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 2)

        def forward(self, x, scale):
            return self.fc(self.conv(x).relu().mean((2, 3)) * scale)

    made = NNCFConfig.from_dict({"compression": {"algorithm": "filter_pruning", "params": {"prune_first_conv": True}}})
    model = Two()
    before = copy.deepcopy(model.state_dict())
    controller, model = create_compressed_model(
        model,
        made,
        dummy_forward_fn=lambda model: model(torch.ones(1, 3, 6, 6), scale=torch.ones(1, 1)),
        wrap_inputs_fn=lambda args, kwargs: (args, kwargs),
        dump_graphs=False,
    )
    assert controller.pruned_module_groups_info == {0: ["conv"]}
    assert not model._forward_pre_hooks
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
    with pytest.raises(UsageError, match="did not"):
        create_compressed_model(Two(), made, dummy_forward_fn=lambda model: None)


class Chooses(nn.Module):
    """Computes another layer for large inputs, and takes arguments that are no tensors."""

    def __init__(self):
        super().__init__()
        self.small, self.large, self.last = nn.Linear(4, 16), nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, x, mask=None, scale=1.0):
        hidden = (self.large if x.sum() > 100 else self.small)(x).relu()
        return self.last(hidden if mask is None else hidden * mask) * scale


def test_the_values_of_a_dummy_forward_count_and_it_serves_a_resumed_model_too():
    made = NNCFConfig.from_dict({"compression": QUANTIZATION})
    made["compression"]["initializer"] = {"range": {"num_init_samples": 0}}

    def dummy(model):
        model(torch.full((2, 4), 1000.0), None, scale=2.0)

    controller, model = create_compressed_model(Chooses(), made, dummy_forward_fn=dummy)
    assert sorted(controller.weight_quantizers) == ["large|WEIGHT", "last|WEIGHT"]
    state = json.loads(json.dumps(controller.get_compression_state()))
    again, twin = create_compressed_model(Chooses(), made, state, dummy_forward_fn=dummy)
    load_state(twin, model.state_dict(), is_resume=True)
    for found in (controller, pickle.loads(pickle.dumps(controller)), again):
        args, kwargs = found.context.example("a test").batch
        assert float(args[0].min()) == 1000 and args[1:] == (None,) and kwargs == {"scale": 2.0}
    with pytest.raises(UsageError, match="must be a function"):
        create_compressed_model(Chooses(), made, dummy_forward_fn=3)


def test_a_teacher_is_asked_for_by_name_when_a_training_is_resumed():
    distillation = {"algorithm": "knowledge_distillation", "type": "mse"}
    controller, model = compressed(distillation)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        model.fc.weight.add_(0.1)
    state = controller.get_compression_state()
    with pytest.raises(UsageError, match="uncompressed_model="):
        create_compressed_model(Net(), config(distillation), state)
    again, twin = create_compressed_model(Net(), config(distillation), state, uncompressed_model=teacher)
    load_state(twin, model.state_dict(), is_resume=True)
    losses = []
    for one, student in ((controller, model), (again, twin)):
        torch.manual_seed(1)
        student.train()(IMAGES)
        losses.append(one.loss().item())
    assert losses[0] == losses[1] > 0


def test_a_state_of_ours_is_resumed_and_one_of_nncf_is_refused():
    controller, model = compressed(SPARSITY, QUANTIZATION)
    state = json.loads(json.dumps(controller.get_compression_state()))
    _, twin = create_compressed_model(Net(), config(SPARSITY, QUANTIZATION), compression_state=state)
    assert load_state(twin, model.state_dict(), is_resume=True) == len(model.state_dict())
    assert_same(model.state_dict(), twin.state_dict())
    with pytest.raises(StateError, match=r"load_state\(model, checkpoint\['state_dict'\]\)"):
        create_compressed_model(Net(), config(SPARSITY), compression_state={"builder_state": {}, "ctrl_state": {}})


# The controller.


def test_the_controller_stays_one_for_everything_else(tmp_path, caplog):
    controller, model = compressed(PRUNING, SPARSITY, QUANTIZATION)
    assert isinstance(controller, compress_core.CompressionController)
    save_checkpoint(tmp_path / "a.pt", controller)
    load_checkpoint(tmp_path / "a.pt", controller)
    twin = copy.deepcopy(controller)
    assert twin.scheduler.owner is twin and twin.model is not model
    controller.scheduler.epoch_step()
    controller.scheduler.step()
    assert controller.scheduler.current_pruning_level == controller.pruning_level
    children = controller.child_ctrls
    assert [child.name for child in children] == ["filter_pruning", "magnitude_sparsity", "quantization"]
    assert children[1].compression_stage() == controller.compression_stages()["magnitude_sparsity"]
    assert children[1].statistics().to_dict() == controller.statistics().magnitude_sparsity.to_dict()
    assert children[0].pruning_level == controller.pruning_level
    children[1].freeze(True)
    assert controller.algorithms["magnitude_sparsity"].frozen
    with pytest.raises(UsageError, match=r"controller\.loss"):
        children[0].loss()
    assert controller.full_flops == controller.statistics().filter_pruning.full_flops > controller.current_flops
    assert controller.full_params_num > controller.current_params_num
    for name in ("disable_scheduler", "get_state", "nodes_flops"):
        with pytest.raises(UsageError, match=f"no '{name}' here; use"):
            getattr(controller, name)
    with pytest.raises(StateError, match=r"saved by NNCF.*epoch_step\(next_epoch\)"):
        controller.scheduler.load_state({"current_step": 7, "current_epoch": 1})
    with pytest.raises(UsageError, match="sparsity_target_epoch"):
        _ = controller.scheduler.target_epoch
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = controller.nothing_of_the_kind
    controller.distributed()
    controller.prepare_for_export()
    assert "prepare_for_export() does nothing" in caplog.text
    assert type(controller.strip_model(model, do_copy=True)).__name__ == "Net"


def test_the_stages_of_children_add_up_to_that_of_the_whole():
    distillation = {"algorithm": "knowledge_distillation", "type": "mse"}
    for sections in ([distillation], [distillation, QUANTIZATION], [distillation, SPARSITY, QUANTIZATION]):
        controller, _ = compressed(*sections)
        stages = [child.compression_stage() for child in controller.child_ctrls]
        total = stages[0]
        for stage in stages[1:]:
            total = total + stage
        assert total == controller.compression_stage()


def test_the_highest_rate_is_in_the_unit_of_the_rate():
    """The formulas of NNCF: 1, unless operations are counted: then what is left if each group keeps one channel."""
    for sections in ([], [QUANTIZATION], [SPARSITY], [PRUNING, QUANTIZATION]):
        assert compressed(*sections)[0].maximal_compression_rate == 1.0
    params = {"pruning_flops_target": 0.25, "multiple_of": 1, "prune_first_conv": True}
    controller, _ = compressed({"algorithm": "filter_pruning", "params": params}, SPARSITY)
    full, least = (2 * (3 * 9 * a * 64 + a * 9 * b * 64 + b * 4) for a, b in ((16, 8), (1, 1)))
    assert controller.maximal_compression_rate == pytest.approx(1 - least / full, rel=1e-12)


def test_statistics_have_the_names_that_scripts_read():
    """The figures are counted here from the model itself."""
    names = ["conv1", "conv2", "fc"]
    controller, model = compressed({**SPARSITY, "sparsity_init": 0.5}, QUANTIZATION)
    figures = controller.statistics(quickly_collected_only=True)
    sparsity, quantization = figures.magnitude_sparsity, figures.quantization
    masked = {name: float((model.get_submodule(name).weight == 0).float().mean()) for name in names}
    summary = {
        layer.name.removesuffix(".weight"): layer for layer in sparsity.model_statistics.sparsified_layers_summary
    }
    assert {name: layer.sparsity_level for name, layer in summary.items()} == pytest.approx(masked)
    assert summary["fc"].weight_shape == list(model.fc.weight.shape)
    assert sum(layer.weight_percentage for layer in summary.values()) == pytest.approx(100)
    sizes = {name: model.get_submodule(name).weight.numel() for name in names}
    zeros = sum(masked[name] * sizes[name] for name in names)
    assert sparsity.model_statistics.sparsity_level_for_layers == pytest.approx(zeros / sum(sizes.values()))
    everything = sum(parameter.numel() for parameter in Net().parameters())
    assert sparsity.model_statistics.sparsity_level == pytest.approx(zeros / everything)
    assert sparsity.target_sparsity_level == 0.5
    with pytest.raises(UsageError, match=r"no 'thresholds' here; use 'layers'"):
        _ = sparsity.thresholds
    quantizers = controller.all_quantizations
    weights = [quantizers[name] for name in controller.weight_quantizers]
    counter = quantization.wq_counter
    assert counter.total_count == counter.potential_count == len(weights) == 3
    assert counter.num_symmetric + counter.num_asymmetric == counter.num_signed + counter.num_unsigned == 3
    assert counter.num_per_channel == sum(len(one.scale) > 1 for one in weights)
    assert quantization.aq_counter.total_count == len(controller.non_weight_quantizers)
    assert quantization.num_wq_per_bitwidth == {8: 3}
    assert quantization.num_aq_per_bitwidth == {8: len(controller.non_weight_quantizers)}
    assert quantization.ratio_of_enabled_quantizations == 100
    children = {child.name: child.statistics() for child in controller.child_ctrls}
    assert children["quantization"].wq_counter == counter
    assert copy.deepcopy(quantization).wq_counter == counter
    assert figures.to_dict()["magnitude_sparsity"] == sparsity.to_dict()
    with pytest.raises(AttributeError, match="no statistics of 'rb_sparsity'"):
        _ = figures.rb_sparsity
    with pytest.raises(AttributeError, match="has no 'wq_counter'"):
        _ = sparsity.wq_counter


def test_shares_of_weights_are_of_those_that_are_sparsified():
    controller, _ = compressed({**SPARSITY, "ignored_scopes": ["{re}fc"]})
    layers = controller.statistics().magnitude_sparsity.model_statistics.sparsified_layers_summary
    assert [layer.weight_percentage for layer in layers] == pytest.approx([100 * 432 / 1584, 100 * 1152 / 1584])


def test_statistics_of_pruning_have_the_names_that_scripts_read():
    controller, _ = compressed(PRUNING)
    found = controller.statistics().filter_pruning
    assert found.model_statistics.full_flops == controller.full_flops
    assert found.model_statistics.current_params_num == controller.current_params_num
    assert found.current_pruning_level == found.model_statistics.pruning_level == controller.pruning_level
    assert found.target_pruning_level == controller.statistics().to_dict()["filter_pruning"]["requested_level"]
    with pytest.raises(UsageError, match="pruned_layers_summary"):
        _ = found.pruned_layers_summary


def test_export_model(tmp_path):
    pytest.importorskip("onnxruntime")
    controller, _ = compressed(QUANTIZATION)
    controller.export_model(str(tmp_path / "a.onnx"), "onnx_13", input_names=["image"])
    import onnx

    saved = onnx.load(tmp_path / "a.onnx")
    assert saved.opset_import[0].version == 13 and saved.graph.input[0].name == "image"
    with pytest.raises(UsageError, match="save_format"):
        controller.export_model(str(tmp_path / "b.onnx"), "openvino")
    with pytest.raises(UsageError, match="model_args"):
        controller.export_model(str(tmp_path / "b.onnx"), model_args=(1,))


# Names.


def test_marks_in_a_model_run_and_say_once_what_they_do_not_do(caplog):
    from compress_core.nncf import marks

    marks._told.clear()

    class Marked(Net):
        def forward(self, x):
            x = nncf.nncf_model_input(x)
            with nncf.no_nncf_trace():
                x = x * 1.0
            return nncf.nncf_model_output(super().forward(x))

    model = Marked()
    _, model = create_compressed_model(model, config(SPARSITY))
    assert model(IMAGES).shape == (8, 4)
    model(IMAGES)
    assert caplog.text.count("no_nncf_trace() has no effect") == 1
    assert nncf.register_operator()(len) is len


def test_what_is_not_here_says_what_to_use():
    with pytest.raises(UsageError, match=r"controller\.strip"):
        from compress_core.nncf import strip  # noqa: F401
    with pytest.raises(ImportError, match="quantise"):
        from compress_core.nncf import quantise  # noqa: F401
    for name in nncf._ELSEWHERE:
        with pytest.raises(UsageError, match=name):
            getattr(nncf, name)
    for name in nncf.__all__:
        assert getattr(nncf, name) is not None


# load_state.


def of_nncf(model, *, prefix="", operand="op", masks=None, filters=None, bits=8):
    """The `state_dict` that NNCF would have of a model with the same compression, with made-up numbers."""
    plain = {name: value.clone() for name, value in model.state_dict().items() if "transforms" not in name}
    found = {name: value + 0.25 if value.is_floating_point() else value for name, value in plain.items()}
    for layer in ("conv1", "conv2", "fc"):
        weight, number = plain[f"{layer}.weight"], 0
        if filters is not None and layer in filters:
            found[f"{layer}.pre_ops.{number}.{operand}._binary_filter_pruning_mask"] = filters[layer]
            number += 1
        if masks is not None:
            found[f"{layer}.pre_ops.{number}.{operand}._binary_mask"] = masks[layer]
            number += 1
        if bits:
            scale = torch.rand(len(weight), *[1] * (weight.ndim - 1)) + 0.5
            base = f"{layer}.pre_ops.{number}.{operand}"
            found |= {f"{base}.scale": scale, f"{base}.signed_tensor": torch.tensor([1])}
            found |= {f"{base}._num_bits": torch.tensor([bits]), f"{base}.enabled": torch.tensor([1])}
    if filters is not None:
        found[f"bn.pre_ops.0.{operand}._binary_filter_pruning_mask"] = filters["conv1"]
    if bits:
        for number, name in enumerate(("/nncf_model_input_0", "Net/relu_0", "Net/relu_1", "Net/mean_0")):
            base = f"_nncf.external_quantizers.{name}|OUTPUT"
            found |= {
                f"{base}.scale": torch.tensor([1.5 + number]),
                f"{base}.signed_tensor": torch.tensor([number == 0]),
            }
            found |= {f"{base}._num_bits": torch.tensor([8]), f"{base}.enabled": torch.tensor([1])}
    for layer in ("conv1", "conv2"):
        found[f"{layer}.nncf_padding_value"] = torch.zeros(1)
    return {prefix + name: value for name, value in found.items()}


def masks_of(model):
    generator = torch.Generator().manual_seed(2)
    names = ("conv1", "conv2", "fc")
    return {n: (torch.rand(model.get_submodule(n).weight.shape, generator=generator) > 0.4).float() for n in names}


@pytest.mark.parametrize(("prefix", "operand"), [("", "op"), ("module.", "op"), ("module.nncf_module.", "operand")])
def test_masks_scales_and_weights_of_nncf_are_loaded(caplog, prefix, operand):
    caplog.set_level(logging.INFO)
    controller, model = compressed(SPARSITY, QUANTIZATION)
    given = of_nncf(model, prefix=prefix, operand=operand, masks=(masks := masks_of(model)))
    count = load_state(model, given, is_resume=True)
    idle = [name for name in given if name.endswith("nncf_padding_value")]
    assert count == len(given) - len(idle)
    state = model.state_dict()
    for layer, mask in masks.items():
        assert torch.equal(state[f"{layer}.weight_transforms.weight.magnitude_sparsity.mask"], mask.bool())
        number = 1
        scale = given[f"{prefix}{layer}.pre_ops.{number}.{operand}.scale"]
        assert torch.equal(state[f"{layer}.weight_transforms.weight.quantization.scale"], scale)
        assert torch.equal(state[f"{layer}.weight"], given[f"{prefix}{layer}.weight"])
    quantizers = controller.algorithms["quantization"].non_weight_quantizers
    assert [float(q.scale) for q in quantizers.values()] == [1.5, 2.5, 3.5, 4.5]
    assert [q.signed for q in quantizers.values()] == [True, False, False, False]
    total = sum(mask.numel() for mask in masks.values())
    level = 1 - sum(float(mask.sum()) for mask in masks.values()) / total
    assert controller.sparsity_level == pytest.approx(level)
    assert f"{count} of {len(given)} tensors" in caplog.text
    # The model computes with the masks: nothing is recomputed when it is read.
    assert float((model.fc.weight == 0).float().mean()) >= float((masks["fc"] == 0).float().mean())


def test_masks_of_nncf_are_those_of_const_sparsity():
    controller, model = compressed({"algorithm": "const_sparsity"})
    given = of_nncf(model, masks=(masks := masks_of(model)), bits=0)
    assert load_state(model, given, is_resume=True) == len(given) - 2
    for layer, mask in masks.items():
        assert torch.equal(model.get_submodule(layer).weight != 0, mask.bool())
    kept, total = (sum(float(f(mask)) for mask in masks.values()) for f in (torch.sum, torch.numel))
    assert controller.sparsity_level == pytest.approx(1 - kept / total)


def test_scores_of_nncf_are_those_of_rb_sparsity():
    _, model = compressed({"algorithm": "rb_sparsity"})
    masks = masks_of(model)
    given = of_nncf(model, masks=masks, bits=0)
    for layer, mask in masks.items():  # as NNCF saves it: the scores, the mask that they last led to, the noise
        base = f"{layer}.pre_ops.0.op."
        given |= {f"{base}_mask": (mask - 0.5) * 3, f"{base}uniform": torch.rand(mask.shape)}
    assert load_state(model, given, is_resume=True) == len(given) - 2
    model.eval()
    for layer, mask in masks.items():
        scores = model.state_dict()[f"{layer}.weight_transforms.weight.rb_sparsity.scores"]
        assert torch.equal(scores, (mask - 0.5) * 3)
        assert torch.equal(model.get_submodule(layer).weight != 0, mask.bool())


def test_filters_of_nncf_are_pruned_in_all_that_belongs_to_them():
    controller, model = compressed(PRUNING)
    filters = {"conv1": torch.ones(16), "conv2": torch.ones(8)}
    filters["conv1"][[1, 5, 6]] = 0
    given = of_nncf(model, filters=filters, bits=0)
    assert load_state(model, given, is_resume=True) == len(given) - 2
    assert controller.pruning_level == pytest.approx(3 / 24)
    assert (model.conv1.weight.flatten(1).abs().sum(1) == 0).nonzero().flatten().tolist() == [1, 5, 6]
    stripped = controller.strip()
    assert stripped.conv1.weight.shape[0] == 13


def test_what_does_not_fit_is_named_and_refused_on_resume(caplog):
    _, model = compressed(SPARSITY)
    given = of_nncf(model, masks=masks_of(model))  # it has quantizers, which the model has not
    given["extra.weight"] = torch.zeros(3)
    given["fc.bias"] = torch.zeros(7)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="not loaded") as caught:
        load_state(model, given, is_resume=True)
    assert "fc.bias" in str(caught.value) and "is_resume=False" in str(caught.value)
    assert_same(model.state_dict(), before)
    caplog.clear()
    count = load_state(model, given, keys_to_ignore=["extra.weight"])
    assert "'fc.bias' (its shape is (7,), and that of the model (4,))" in caplog.text
    assert "extra.weight" not in caplog.text and "conv1.pre_ops.1.op.scale" in caplog.text
    assert count == len(before) - 1


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("ignored", [["fc.weight"], "fc.weight", ["module.fc.weight"]])
def test_ignored_names_stay_as_they_are_with_any_prefix_and_on_resume(prefix, ignored, caplog):
    _, model = compressed(SPARSITY)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {f"{prefix}{name}": value + value.is_floating_point() for name, value in before.items()}
    assert load_state(model, given, is_resume=True, keys_to_ignore=ignored) == len(before) - 1
    after = model.state_dict()
    assert torch.equal(after["fc.weight"], before["fc.weight"])
    assert torch.equal(after["fc.bias"], before["fc.bias"] + 1)
    assert "keys_to_ignore" not in caplog.text
    load_state(model, given, keys_to_ignore=["fc.wieght"])
    assert "keys_to_ignore: neither the file nor the model has 'fc.wieght'" in caplog.text


def test_what_a_file_has_twice_or_is_no_tensor_is_named(caplog):
    _, model = compressed(SPARSITY)
    given = dict(model.state_dict())
    twice = {"fc.weight": given["fc.weight"] + 1, **{f"module.{name}": value for name, value in given.items()}}
    expected = twice["fc.weight"]
    assert load_state(model, twice) == len(given)
    assert torch.equal(model.state_dict()["fc.weight"], expected)
    assert "'module.fc.weight' (the file has 'fc.weight' besides" in caplog.text
    load_state(model, {**given, "fc.bias": 3})
    assert "'fc.bias' (it is no tensor but a int)" in caplog.text


def test_masks_that_have_no_place_are_never_dropped_silently(caplog):
    _, model = compressed(QUANTIZATION)
    given = of_nncf(model, masks=masks_of(model))
    load_state(model, given)
    assert "'conv1.pre_ops.0.op._binary_mask' (the model has nothing" in caplog.text


def test_quantizers_of_other_bits_are_not_taken(caplog):
    _, model = compressed(QUANTIZATION)
    before = model.state_dict()["fc.weight_transforms.weight.quantization.scale"].clone()
    load_state(model, of_nncf(model, bits=4))
    assert torch.equal(model.state_dict()["fc.weight_transforms.weight.quantization.scale"], before)
    assert "conv1.pre_ops.0.op.scale" in caplog.text and "fc.weight_transforms" in caplog.text


def test_missing_masks_are_named(caplog):
    _, model = compressed(SPARSITY)
    load_state(model, of_nncf(model, bits=0))
    assert (
        "3 tensors of the model stay as they are: 'conv1.weight_transforms.weight.magnitude_sparsity.mask'"
        in caplog.text
    )


def test_plain_models_and_strange_arguments():
    net, other = Net(), Net()
    assert load_state(net, {f"module.{k}": v for k, v in other.state_dict().items()}, is_resume=True) == len(
        other.state_dict()
    )
    assert_same(net.state_dict(), other.state_dict())
    with pytest.raises(UsageError, match="checkpoint"):
        load_state(net, 3)
    with pytest.raises(UsageError, match="pass the model"):
        load_state(compressed(SPARSITY)[0], {})
    wrapped = nn.Sequential()
    _, model = compressed(SPARSITY)
    wrapped.module = model
    load_state(wrapped, {f"module.{k}": v for k, v in model.state_dict().items()}, is_resume=True)
