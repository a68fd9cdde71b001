"""All or nothing, with models that make it hard."""

import signal

import pytest
import torch
from torch import nn

from compress_core import ModelError, PluginError, create_compressed_model, hookimpl
from compress_core.testing import fingerprint
from compress_core.transforms.containers import SavedContainer
from compress_core.transforms.interrupts import interrupts_held
from compress_core.transforms.snapshot import ModelSnapshot
from tests import ctrl_c
from tests.plugin_helpers import algorithm, contributing
from tests.zoo import ResidualNet

SPARSE = {"compression": {"algorithm": "magnitude_sparsity", "sparsity_init": 0.3}}


@pytest.fixture
def _ctrl_c():
    with ctrl_c.python_handles_it():
        yield


class Failing:
    """An observer that fails once everything is committed."""

    @hookimpl
    def compress_initialize(self):
        raise RuntimeError("injected")


def assert_rolls_back(model, config=SPARSE):
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="injected"):
        create_compressed_model(model, config, observers=[Failing()])
    assert fingerprint(model) == before


def test_module_with_a_setattr_of_its_own():
    class ReadOnly(nn.Linear):
        def __setattr__(self, name, value):
            if name.startswith("__"):
                raise RuntimeError(f"readonly {name}")
            super().__setattr__(name, value)

    model = nn.Sequential(ReadOnly(6, 3))
    assert_rolls_back(model)
    controller, _ = create_compressed_model(model, SPARSE)
    assert controller.sparsity_level == pytest.approx(0.3, abs=0.05)
    assert type(controller.strip()[0]) is ReadOnly


ODD_TENSORS = {
    "quantized": lambda: torch.quantize_per_tensor(torch.randn(2), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "conjugate": lambda: torch.randn(2, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(2, dtype=torch.complex64).conj().imag,
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    "empty": lambda: torch.empty(0, 3),
    "boolean": lambda: torch.tensor([True, False]),
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_odd_buffers(kind):
    model = nn.Sequential(nn.Linear(6, 3))
    model.register_buffer("odd", ODD_TENSORS[kind]())
    before = model.odd
    with pytest.raises(RuntimeError, match="injected"):
        create_compressed_model(model, SPARSE, observers=[Failing()])
    assert model.odd is before
    assert type(model[0]) is nn.Linear
    create_compressed_model(model, SPARSE)


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(6, 3))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert_rolls_back(model)


def test_overwritten_expanded_parameter_comes_back(registry):
    def commit(self, model):
        model[0].weight.data[:1].fill_(7)

    members = {
        "compress_plan": hookimpl(lambda self, model, context: context.plan_weights(model, self)),
        "compress_commit": hookimpl(commit),
        "changes_in_place": True,
    }
    registry.register(contributing(algorithm(**members)), "demo")
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.randn(1, 6).expand(6, 6))
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match="injected"):
        create_compressed_model(model, {"compression": {"algorithm": "mine"}}, observers=[Failing()])
    assert torch.equal(model[0].weight, before)


def test_gradients_lists_and_tensor_attributes_come_back():
    model = ResidualNet()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model.history = [1, 2]
    model.constant = torch.ones(3)
    before = fingerprint(model)
    history, constant = model.history, model.constant

    class Vandal:
        @hookimpl
        def compress_commit(self, model):
            model.conv1._parameters["weight"].grad.zero_()
            model.history.append(3)
            model.constant.mul_(5)
            model.extra = 1
            model.conv2._parameters["weight"].requires_grad_(False)
            model.register_forward_hook(lambda *_: None)
            model.bn1.eval()
            torch.rand(1)
            raise RuntimeError("injected")

    with pytest.raises(RuntimeError, match="injected"):
        create_compressed_model(model, SPARSE, observers=[Vandal()])
    assert fingerprint(model) == before
    assert model.history is history
    assert history == [1, 2]
    assert model.constant is constant
    assert torch.equal(constant, torch.ones(3))


def test_replaced_data_and_modules_come_back():
    model = ResidualNet()
    before = fingerprint(model)

    class Vandal:
        @hookimpl
        def compress_commit(self, model):
            model.conv1.weight.data = torch.zeros(1)
            model.fc = nn.Identity()
            del model.bn2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_compressed_model(model, SPARSE, observers=[Vandal()])
    assert fingerprint(model) == before


@pytest.mark.usefixtures("_ctrl_c")
def test_interrupt_during_rollback_is_held_until_it_is_done():
    model = ResidualNet()
    snapshot = ModelSnapshot(model)
    before = fingerprint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)

    class Interrupting(SavedContainer):
        """A container whose restoring is when the user presses Ctrl-C."""

        def restore(self):
            super().restore()
            ctrl_c.press()

    snapshot._modules[0].containers.append(Interrupting({}))
    with pytest.raises(KeyboardInterrupt):
        snapshot.restore()
    assert fingerprint(model) == before


@pytest.mark.usefixtures("_ctrl_c")
def test_held_interrupts_arrive_afterwards_and_only_then():
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        ctrl_c.press()
        reached.append(1)
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("kind", ["lazy", "meta", "fake"])
def test_models_without_values_are_named(kind):
    if kind == "lazy":
        model = nn.Sequential(nn.LazyLinear(3))
    elif kind == "meta":
        model = nn.Sequential(nn.Linear(2, 3)).to("meta")
    else:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(ModelError, match=r"the (parameter|tensor) '0.weight' is (lazy|on the meta device or fake)"):
        create_compressed_model(model, SPARSE)


def test_inside_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ModelError, match="call it outside"):
        create_compressed_model(ResidualNet(), SPARSE)


def test_class_that_cannot_be_subclassed_is_named_with_the_remedy():
    class Final(nn.Linear):
        def __init_subclass__(cls, **keywords):
            raise TypeError("final")

    model = nn.Sequential(Final(3, 3), nn.Linear(3, 3))
    with pytest.raises(RuntimeError, match=r"Final cannot be subclassed.*ignored_scopes"):
        create_compressed_model(model, SPARSE)
    assert type(model[1]) is nn.Linear
    config = {"compression": {**SPARSE["compression"], "ignored_scopes": "0"}}
    create_compressed_model(model, config)


def test_layers_compiled_by_torchscript_stay_out_of_it():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 3))), nn.Linear(3, 3))
    controller, _ = create_compressed_model(model, SPARSE)
    assert controller.sparsified_module_info == ["1.weight"]
    x = torch.randn(2, 3)
    assert torch.equal(controller.strip()(x), model(x))


def test_hooks_of_tensors_go_and_those_of_the_user_stay():
    model = ResidualNet()
    own = model.conv1.weight.register_hook(lambda gradient: gradient * 2)
    before = fingerprint(model)

    class Hooking(Failing):
        @hookimpl
        def compress_commit(self, model):
            own.remove()
            model.conv1._parameters["weight"].register_hook(lambda gradient: gradient * 3)
            model.fc._parameters["weight"].register_post_accumulate_grad_hook(lambda parameter: None)

    with pytest.raises(RuntimeError, match="injected"):
        create_compressed_model(model, SPARSE, observers=[Hooking()])
    assert fingerprint(model) == before
    own.remove()
    assert not model.conv1.weight._backward_hooks


def test_module_that_is_replaced_unasked_is_refused_with_its_own_remedy(registry):
    def commit(self, model):
        model.fc = nn.Linear(8, 5)

    members = {
        "compress_plan": hookimpl(lambda self, model, context: context.plan_weights(model, self)),
        "compress_commit": hookimpl(commit),
    }
    registry.register(contributing(algorithm(**members)), "demo")
    with pytest.raises(PluginError, match=r"no longer part of the model.*declare replaces_modules = True"):
        create_compressed_model(ResidualNet(), {"compression": {"algorithm": "mine"}})
