import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from compress_core import Stage, TransformError, mask_weight
from compress_core.transforms import (
    WeightMask,
    add_weight_transform,
    bypass_transforms,
    get_weight_transform,
    has_transforms,
    raw_parameter,
    transformed_weights,
)
from tests.zoo import StackedLSTM, Transformer, tokens


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, weight):
        return weight * self.factor


class Add(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, weight):
        return weight + self.value


def half_mask(shape):
    return (torch.arange(torch.Size(shape).numel()) % 2).reshape(shape)


def test_transform_changes_what_the_layer_computes_and_keeps_the_parameter():
    layer = nn.Linear(4, 3)
    weight, x = layer.weight.detach().clone(), torch.randn(2, 4)
    handle = add_weight_transform(layer, "weight", Scale(2.0), stage=Stage.PRECISION)
    assert torch.equal(layer.weight, weight * 2)
    assert torch.allclose(layer(x), x @ (2 * weight).T + layer.bias)
    assert torch.equal(raw_parameter(layer, "weight"), weight)
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"
    assert [name for name, _ in layer.named_parameters()][:2] == ["weight", "bias"]
    handle.remove()
    assert type(layer) is nn.Linear
    assert list(layer._modules) == []
    assert torch.equal(layer.weight, weight)
    with pytest.raises(TransformError, match="has no transform named 'scale'"):
        handle.remove()


def test_transforms_run_in_the_order_of_their_stages_whatever_the_order_of_adding():
    outputs = []
    for order in ((Stage.PRECISION, Stage.SPARSITY), (Stage.SPARSITY, Stage.PRECISION)):
        layer = nn.Linear(2, 2)
        nn.init.ones_(layer.weight)
        for stage in order:
            transform = Scale(3.0) if stage is Stage.PRECISION else Add(1.0)
            add_weight_transform(layer, "weight", transform, stage=stage)
        outputs.append(layer.weight.detach())
    assert torch.equal(outputs[0], torch.full((2, 2), 6.0))  # (1 + 1) * 3
    assert torch.equal(outputs[1], outputs[0])


def test_shared_parameter_has_one_transform_at_all_its_places():
    model = Transformer()
    mask = mask_weight(model, "embedding.weight", half_mask(model.embedding.weight.shape))
    assert get_weight_transform(model, "head.weight", "mask") is mask
    assert torch.equal(model.head.weight, model.embedding.weight)
    twin = copy.deepcopy(model)
    assert get_weight_transform(twin, "head.weight", "mask") is get_weight_transform(twin, "embedding.weight", "mask")
    assert raw_parameter(twin, "head.weight") is raw_parameter(twin, "embedding.weight")
    twin(tokens()).sum().backward()
    gradient = raw_parameter(twin, "head.weight").grad
    assert not gradient[half_mask(gradient.shape) == 0].any()
    assert gradient[half_mask(gradient.shape) == 1].any()


def test_transformed_weights_are_listed_with_all_their_places_and_can_be_freed():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    plain = [layer.weight.detach().clone() for layer in model]
    assert transformed_weights(model) == []
    add_weight_transform(model, "0.weight", Add(1.0), stage=Stage.PRECISION, key="late")
    add_weight_transform(model, "0.weight", Scale(2.0), stage=Stage.STRUCTURE, key="early")
    add_weight_transform(model, "1.weight", Scale(3.0), stage=Stage.STRUCTURE)
    tied, other = transformed_weights(model)
    assert tied.parameter is raw_parameter(model, "2.weight")
    assert tied.places == ((model[0], "weight"), (model[2], "weight"))
    assert [name for name, _ in tied.chain.named_children()] == ["early", "late"]
    assert torch.equal(tied.chain(tied.parameter), 2 * plain[0] + 1)
    tied.remove_transforms()
    assert transformed_weights(model) == [other]
    assert [type(layer) is nn.Linear for layer in model] == [True, False, True]
    assert model[2].weight is model[0].weight is tied.parameter


def test_mask_changes_in_place_and_checks_what_it_is_given():
    layer = nn.Linear(4, 3)
    first = mask_weight(layer, "weight", torch.zeros(3, 4, dtype=torch.bool))
    assert not layer.weight.any()
    assert mask_weight(layer, "weight", torch.ones(3, 1)) is first
    assert torch.equal(layer.weight, raw_parameter(layer, "weight"))
    with pytest.raises(TransformError, match=r"shape \(4, 3\) does not broadcast to the weight's \(3, 4\)"):
        mask_weight(layer, "weight", torch.ones(4, 3))
    with pytest.raises(TransformError, match="other values than 0 and 1"):
        mask_weight(layer, "weight", torch.full((3, 4), 0.5))
    with pytest.raises(TransformError, match=r"no parameter 'wieght'; Linear has \['weight', 'bias'\]"):
        mask_weight(layer, "wieght")
    with pytest.raises(TransformError, match="no module 'fc'"):
        mask_weight(layer, "fc.weight")


def test_bypass_gives_the_stored_weights_and_ends_with_the_context():
    layer = nn.Linear(4, 3)
    mask_weight(layer, "weight", torch.zeros(3, 4))
    with bypass_transforms(layer):
        assert torch.equal(layer.weight, raw_parameter(layer, "weight"))
    assert not layer.weight.any()


def test_attribute_error_in_a_transform_is_not_swallowed():
    class Broken(nn.Module):
        def forward(self, weight):
            return self.missing * weight

    layer = nn.Linear(2, 2)
    add_weight_transform(layer, "weight", Broken(), stage=Stage.SPARSITY)
    with pytest.raises(TransformError, match="a weight transform of 'weight' in Linear failed"):
        layer(torch.ones(1, 2))


@pytest.mark.parametrize("name", ["weight_norm", "parametrize", "prune"])
def test_weight_that_somebody_else_computes_is_refused_with_the_remedy(name):
    layer = nn.Linear(3, 3)
    if name == "weight_norm":
        torch.nn.utils.weight_norm(layer)
        remedy = "remove_weight_norm"
    elif name == "prune":
        prune.random_unstructured(layer, "weight", 0.5)
        remedy = "prune.remove"
    else:
        parametrize.register_parametrization(layer, "weight", Add(1.0))
        remedy = "remove_parametrizations"
    with pytest.raises(TransformError, match=remedy):
        add_weight_transform(layer, "weight", Scale(2.0), stage=Stage.SPARSITY)
    assert not has_transforms(layer)


def test_incomplete_checkpoint_of_a_transform_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

        def forward(self, weight):
            return weight * self.a + self.b

    layer = nn.Linear(2, 2)
    plain = copy.deepcopy(layer.state_dict())
    add_weight_transform(layer, "weight", Two(), stage=Stage.PRECISION)
    full = layer.state_dict()
    layer.load_state_dict(plain)
    layer.load_state_dict(full)
    del full["weight_transforms.weight.two.b"]
    with pytest.raises(RuntimeError, match=r"weight_transforms\.weight\.two\.b"):
        layer.load_state_dict(full)


def test_key_that_is_taken_is_refused():
    layer = nn.Linear(2, 2)
    add_weight_transform(layer, "weight", Scale(2.0), stage=Stage.SPARSITY, key="mine")
    with pytest.raises(TransformError, match="already has a transform named 'mine'"):
        add_weight_transform(layer, "weight", Scale(2.0), stage=Stage.SPARSITY, key="mine")


def test_learned_transform_is_trained_and_saved():
    layer = nn.Linear(2, 2)
    add_weight_transform(layer, "weight", Scale(2.0), stage=Stage.PRECISION)
    layer(torch.ones(1, 2)).sum().backward()
    factor = dict(layer.named_parameters())["weight_transforms.weight.scale.factor"]
    assert factor.grad == raw_parameter(layer, "weight").sum()
    assert "weight_transforms.weight.scale.factor" in layer.state_dict()


def test_lstm_computes_with_masked_weights():
    model, plain = StackedLSTM(), StackedLSTM()
    masks = {}
    for name, parameter in model.lstm.named_parameters():
        if name.startswith("weight"):
            masks[name] = half_mask(parameter.shape)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, mask in masks.items():
            plain.lstm.get_parameter(name).mul_(mask)
    for name, mask in masks.items():
        mask_weight(model, f"lstm.{name}", mask)
    x = torch.randn(3, 5, 6)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    model(x).sum().backward()
    gradient = raw_parameter(model, "lstm.weight_hh_l1").grad
    assert not gradient[masks["weight_hh_l1"] == 0].any()


def test_user_class_with_its_own_reduce_is_pickled(monkeypatch):
    import pickle

    monkeypatch.setattr(Custom, "calls", 0)
    layer = Custom(3, 2)
    mask_weight(layer, "weight", half_mask((2, 3)))
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin.weight, layer.weight)
    assert Custom.calls == 1
    assert type(twin) is type(layer)


class Custom(nn.Linear):
    calls = 0

    def __reduce__(self):
        Custom.calls += 1
        return (Custom, (self.in_features, self.out_features), self.__dict__)


def test_functional_call_and_assignment_go_through_the_mask():
    layer = nn.Linear(3, 2)
    mask = half_mask((2, 3))
    mask_weight(layer, "weight", mask)
    new = torch.randn(2, 3)
    out = torch.func.functional_call(layer, {"weight": new}, (torch.eye(3),))
    assert torch.allclose(out, (new * mask).T + layer.bias)
    layer.weight = nn.Parameter(new)
    assert torch.equal(layer.weight, new * mask)


def test_layer_with_an_attribute_of_our_name_is_refused():
    layer = nn.Linear(2, 2)
    layer.weight_transforms = "mine"
    with pytest.raises(TransformError, match="attribute 'weight_transforms' of its own"):
        mask_weight(layer, "weight")
    assert type(layer) is nn.Linear


def test_mask_works_with_any_dtype_of_the_weight():
    layer = nn.Linear(2, 2).to(torch.bfloat16)
    assert mask_weight(layer, "weight", half_mask((2, 2))).mask.dtype is torch.bool
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        layer.to(dtype)
        assert layer.weight.dtype is dtype
        assert torch.equal(layer.weight == 0, half_mask((2, 2)) == 0)
    assert isinstance(get_weight_transform(layer, "weight", "mask"), WeightMask)


def test_user_class_with_its_own_deepcopy_is_copied():
    class Copied(nn.Linear):
        def __deepcopy__(self, memo):
            twin = type(self)(self.in_features, self.out_features)
            twin.load_state_dict(self.state_dict())
            return twin

    model = nn.Sequential(Copied(3, 2))
    mask_weight(model, "0.weight", half_mask((2, 3)))
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0].weight, model[0].weight)
    assert type(twin[0]) is type(model[0])
    assert raw_parameter(twin, "0.weight") is not raw_parameter(model, "0.weight")
    assert get_weight_transform(twin, "0.weight", "mask") is not get_weight_transform(model, "0.weight", "mask")


def ema_of_timm(average, model):
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, 0.1)
        else:
            mine.copy_(theirs)


def ema_of_ultralytics(average, model):
    theirs = model.state_dict()
    for name, mine in average.state_dict().items():
        if mine.dtype.is_floating_point:
            mine *= 0.9
            mine += 0.1 * theirs[name].detach()


def ema_of_the_first_timm(average, model):
    for mine, theirs in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * theirs)


@pytest.mark.parametrize("update", [ema_of_timm, ema_of_ultralytics, ema_of_the_first_timm])
def test_averages_of_a_masked_model_are_masked(update):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    mask = half_mask((4, 4))
    mask_weight(model, "0.weight", mask)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for step in range(3):
            raw_parameter(model, "0.weight").add_(step)
            update(average, model)
    assert torch.equal(average[0].weight == 0, mask == 0)
    assert not torch.equal(raw_parameter(average, "0.weight"), raw_parameter(model, "0.weight"))


def test_swa_keeps_buffers_in_step_with_the_masks():
    model = nn.Linear(4, 4)
    transform = mask_weight(model, "weight", torch.ones(4, 4))
    average = AveragedModel(model)
    average.update_parameters(model)
    transform.mask[:2] = 0
    average.update_parameters(model)
    assert torch.equal(average.module.weight == 0, transform.mask == 0)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_checkpoints_with_masks_of_other_dtypes_load(dtype, assign):
    saved, loaded = nn.Linear(4, 4), nn.Linear(4, 4)
    mask_weight(saved, "weight", half_mask((4, 4)))
    state = saved.state_dict()
    state["weight_transforms.weight.mask.mask"] = half_mask((4, 4)).to(dtype)
    mask_weight(loaded, "weight")
    loaded.load_state_dict(state, assign=assign)
    assert torch.equal(loaded.weight, saved.weight)
    assert get_weight_transform(loaded, "weight", "mask").mask.dtype is torch.bool
    assert state["weight_transforms.weight.mask.mask"].dtype is dtype  # the caller's dict stays as it was


def test_averaged_masks_of_a_checkpoint_are_refused():
    layer = nn.Linear(4, 4)
    mask_weight(layer, "weight", half_mask((4, 4)))
    state = layer.state_dict()
    state["weight_transforms.weight.mask.mask"] = torch.full((4, 4), 0.3)
    with pytest.raises(RuntimeError, match="average of masks"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("shape", [(8, 8), (512, 512)])
def test_gradients_of_masked_weights(shape):
    """Of any order, by autograd and by functorch, of small and of large weights, which are masked in different ways."""
    mask = half_mask(shape)
    transform = WeightMask(mask)
    weight = torch.randn(shape, requires_grad=True)
    (first,) = torch.autograd.grad((transform(weight) ** 3).sum(), weight, create_graph=True)
    assert torch.equal(first, 3 * weight**2 * mask)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.allclose(second, 6 * weight * mask)
    by_functorch = torch.func.grad(lambda w: (transform(w) ** 3).sum())(weight.detach())
    assert torch.equal(by_functorch, first)
    many = torch.func.vmap(transform)(torch.stack([weight, 2 * weight]))
    assert torch.equal(many[1], 2 * weight * mask)
    _, tangent = torch.func.jvp(transform, (weight,), (torch.ones_like(weight),))
    assert torch.equal(tangent, mask.to(weight.dtype))
