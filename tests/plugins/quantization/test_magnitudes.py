"""Right at every magnitude: what is quantized may be scaled by any factor, and the relative error stays what it was.

Powers of two change no digit, so with them results are equal to the last bit.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from compress_core import DataError, create_compressed_model, register_default_init_args
from compress_quantization import kernels
from compress_quantization.config import RangeConfig
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from compress_quantization.quantizer_config import QuantizerSpec
from compress_quantization.quantizers import NativeFakeQuantize
from compress_quantization.ranges import collector_for

RANGES = ["min_max", "mixed_min_max", "mean_min_max", "threesigma", "percentile", "mean_percentile"]
# Exponents at which values of about 1, and what is computed from them, have all digits of the dtype.
EXPONENTS = {torch.float32: (-95, 100), torch.float64: (-95, 100), torch.bfloat16: (-95, 100), torch.float16: (-4, 12)}
LAYOUTS = {"tensor": ((1,), (30, 100)), "rows": ((30, 1), (30, 100)), "planes": ((1, 6, 1), (5, 6, 100))}


@pytest.fixture(autouse=True)
def _restored():
    before = kernels.set_compiled(False)
    yield
    kernels.set_compiled(before)


@pytest.fixture(params=["eager", "compiled", "traceable"])
def kernel(request, monkeypatch):
    kernels.set_compiled(request.param == "compiled")
    if request.param == "traceable":
        monkeypatch.setattr(kernels.function, "_is_ordinary", lambda x: False)
    return request.param


@st.composite
def cases(draw, dtypes=tuple(EXPONENTS)):
    """A quantizer, a tensor of about the size of its range, and an exponent."""
    shape, size = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    dtype = draw(st.sampled_from(dtypes))
    cls = draw(st.sampled_from([SymmetricFakeQuantize, AsymmetricFakeQuantize]))
    options = {"half_range": draw(st.booleans()), "logarithm_scale": draw(st.booleans())}
    module = cls(shape, signed=draw(st.booleans()), **options)
    if dtype == torch.float64:
        module.double()
    torch.manual_seed(draw(st.integers(0, 1000)))
    x = torch.randn(size) + draw(st.sampled_from([-3.0, 0.0, 0.5, 3.0]))
    return module, x.to(dtype), draw(st.integers(*EXPONENTS[dtype]))


def calibrated(module, x, factor):
    module = copy.deepcopy(module)
    wide = x.double()
    dims = [dim for dim in range(x.ndim) if len(module.shape) != x.ndim or module.shape[dim] == 1]
    low, high = wide.amin(dims, keepdim=True) * factor, wide.amax(dims, keepdim=True) * factor
    # Not the whole range, so that something is clipped.
    module.set_range((0.8 * low).reshape(module.shape), (0.8 * high).reshape(module.shape))
    return module


def results(module, x):
    """Returns what comes out, and the gradients of the input and of the range."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype))
    return out.detach(), x.grad, [parameter.grad for parameter in module.parameters()]


class TestQuantizers:
    @given(data=st.data())
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_powers_of_two_change_no_digit(self, kernel, data):
        # Each dtype has kernels of its own, which take seconds to compile.
        module, x, exponent = data.draw(cases((torch.float32,) if kernel == "compiled" else tuple(EXPONENTS)))
        assume(not module.logarithm_scale)
        factor = 2.0**exponent
        ours = results(calibrated(module, x, 1.0), x)
        theirs = results(calibrated(module, x, factor), x * factor)
        assert torch.equal(ours[0] * factor, theirs[0])
        # The output moves with the range as it did: both have the unit of the tensor.
        assert torch.equal(ours[1], theirs[1])
        for left, right in zip(ours[2], theirs[2], strict=True):
            assert torch.equal(left, right)

    @given(cases((torch.float32, torch.float64)))
    @settings(max_examples=60, deadline=None)
    def test_any_factor_keeps_the_relative_error(self, case):
        module, x, exponent = case
        factor = 2.0**exponent * 1.37
        y, grad_x, of_range = results(calibrated(module, x, 1.0), x)
        scaled = x * factor
        other, other_x, other_range = results(calibrated(module, scaled / factor, factor), scaled)
        error, other_error = (y - x).double(), (other - scaled).double() / factor
        assert other_error.norm().item() == pytest.approx(error.norm().item(), rel=0.03)
        assert (grad_x != other_x).float().mean() < 0.01
        # A logarithm has no unit, so its gradient has that of the output.
        is_log = [module.logarithm_scale and name in {"scale", "input_range"} for name, _ in module.named_parameters()]
        for left, right, logarithmic in zip(of_range, other_range, is_log, strict=True):
            unit = factor if logarithmic else 1.0
            norm = left.double().norm()
            assert (right.double() / unit - left.double()).norm() <= 0.1 * norm + 1e-3 * x.shape.numel() ** 0.5

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("bits", [2, 8, 16])
    @pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 3e-33, 1e-32, 1e-30, 1e30, 5e37])
    def test_the_ends_of_float32_give_a_finite_grid(self, cls, bits, magnitude):
        for low, high in [(-0.3, 1.0), (0.2, 1.0), (-1.0, -0.5), (-1.0, 1e-3), (1.0, 1.0), (0.0, 1.0)]:
            module = cls((1,), bits, signed=low < 0)
            module.set_range(torch.tensor(low * magnitude), torch.tensor(high * magnitude))
            x = torch.linspace(low, high, 50) * magnitude
            out, grad, of_range = results(module, x)
            assert all(value.isfinite().all() for value in (out, grad, *of_range))
            grid = module.grid()
            assert grid.scale >= torch.finfo(torch.float32).tiny
            assert torch.equal(grid.values(grid.integers(x)), out)
            if magnitude >= 1e-30:
                assert (out - x).abs().max() <= 0.51 * grid.scale
                assert grid.scale <= 2.1 * magnitude / (2 ** (bits - 1) - 1 + (bits == 2))

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("bad", [1e38, float("inf"), float("nan"), 1e300])
    def test_what_float32_cannot_take_is_refused(self, cls, bad):
        with pytest.raises(DataError, match=r"maximum of a quantizer's range.*float32"):
            cls((1,)).set_range(torch.tensor(0.0).double(), torch.tensor(bad).double())

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("logarithm_scale", [False, True])
    def test_a_channel_of_zeros_gets_the_scale_of_the_largest(self, cls, logarithm_scale):
        for largest in (1e-20, 1.0, 1e20):
            module = cls((4, 1), signed=True, logarithm_scale=logarithm_scale)
            low = torch.tensor([[0.0], [-1.0], [-1e-40 / largest], [0.0]], dtype=torch.float64) * largest
            module.set_range(low, torch.tensor([[0.0], [0.5], [0.0], [1e-3]]) * largest)
            low, high = module.range()
            width = (high - low).flatten().tolist()
            assert width[0] == width[2] >= 0.99 * largest
            assert high[3].item() == pytest.approx(1e-3 * largest, rel=1e-4)
            assert not module(torch.zeros(4, 5)).any()

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    def test_a_constant_learns_its_range(self, cls):
        module = cls((1,))
        module.set_range(torch.tensor(5.0), torch.tensor(5.0))
        module(torch.full((9,), 7.0)).sum().backward()
        assert all(parameter.grad.abs() > 0 for parameter in module.parameters())

    @pytest.mark.usefixtures("kernel")
    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    def test_the_end_of_the_grid_does_not_overflow_float16(self, cls):
        module = cls((1,), signed=True)
        module.set_range(torch.tensor(-65504.0), torch.tensor(65504.0))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.003)
        x = torch.linspace(-65504, 65504, 5000).half()
        for value in (x, x.clone().requires_grad_()):
            found = module(value).detach()
            assert found.isfinite().all()
            assert (found.float() - x.float()).abs().max() < 65504 * 2.02 / 255


class TestNative:
    """torch's own operator, in which `strip` leaves activation quantizers."""

    @pytest.mark.parametrize("shape", [(1,), (1, 2, 1)])
    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
    def test_saturates_however_large_the_value(self, shape, cls, dtype):
        module = cls(shape, signed=True)
        module.set_range(torch.full(shape, -1e-25), torch.full(shape, 3e-25))
        if dtype == torch.float16:
            module.set_range(torch.full(shape, -60000.0), torch.full(shape, 66000.0))
        x = torch.tensor([1.0, 6e4, 1e17, 1e30, float("inf")]).to(dtype)
        x = torch.cat([x, -x]).repeat(3, 2, 1)
        found = NativeFakeQuantize(module)(x)
        # The operator takes the scale in float32.
        rounding = 1e-6 if dtype == torch.float64 else 0.0
        torch.testing.assert_close(found, module(x).detach(), rtol=rounding, atol=0)
        assert found.isfinite().all()


class TestState:
    """What was stored when S was |scale| + 1e-16, and calibrated scales were at least 0.1."""

    @given(st.floats(1e-8, 1e30), st.sampled_from([1.0, -1.0]), st.booleans())
    @settings(max_examples=100, deadline=None)
    def test_means_what_it_meant(self, scale, sign, signed):
        module = SymmetricFakeQuantize((1,), signed=signed)
        module.load_state_dict({"scale": torch.tensor([scale * sign])})
        largest = module.levels()[1]
        assert torch.equal(module.grid().scale, (torch.tensor(scale * sign).abs() + 1e-16) / largest)

    @given(st.floats(-1e3, 1e3), st.floats(1e-8, 1e30))
    @settings(max_examples=100, deadline=None)
    def test_means_what_it_meant_with_two_ends(self, low, width):
        module = AsymmetricFakeQuantize((1,))
        before = copy.deepcopy(module)
        module.load_state_dict({"input_low": torch.tensor([low]), "input_range": torch.tensor([width])})
        width = (torch.tensor(width).abs() + 1e-16).item()
        before.load_state_dict({"input_low": torch.tensor([low]), "input_range": torch.tensor([width])})
        for ours, theirs in zip(module.step_low_high(), before.step_low_high(), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16)])
    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("logarithm_scale", [False, True])
    @pytest.mark.parametrize("magnitude", [1e-20, 1e-3, 1e20])
    def test_ranges_keep_their_precision_in_a_converted_model(self, convert, cls, logarithm_scale, magnitude):
        module = cls((1,), signed=True, logarithm_scale=logarithm_scale)
        module.set_range(torch.tensor(-0.31 * magnitude), torch.tensor(0.77 * magnitude))
        before = [value.clone() for value in module.step_low_high()]
        model = convert(nn.Sequential(nn.Linear(2, 2), module))
        assert model[0].weight.dtype != torch.float32
        assert all(torch.equal(a, b) for a, b in zip(before, module.step_low_high(), strict=True))
        assert all(parameter.dtype == torch.float64 for parameter in model.double()[1].parameters())


class TestStatistics:
    @pytest.mark.parametrize("kind", RANGES)
    @given(data=st.data())
    @settings(max_examples=25, deadline=None)
    def test_scale_with_the_values(self, kind, data):
        spec = QuantizerSpec(
            mode=data.draw(st.sampled_from(["symmetric", "asymmetric"])), per_channel=data.draw(st.booleans())
        )
        dtype = data.draw(st.sampled_from(sorted(EXPONENTS, key=str)))
        exponent = data.draw(st.integers(*EXPONENTS[dtype]))
        torch.manual_seed(data.draw(st.integers(0, 1000)))
        batches = [(torch.randn(4, 3, 5) + data.draw(st.sampled_from([0.0, 1.0]))).relu().to(dtype) for _ in range(3)]
        is_weight = data.draw(st.booleans())
        ranges = []
        for factor in (1.0, 2.0**exponent):
            dim = 1 if spec.per_channel else None
            statistics = collector_for(RangeConfig(type=kind), spec, is_weight=is_weight, name="x", channel_dim=dim)
            for batch in batches[: 1 if is_weight else None]:
                statistics.update(batch * factor)
            ranges.append(statistics.finalize())
        for ours, theirs in zip(*ranges, strict=True):
            assert torch.equal(ours * 2.0**exponent, theirs)


# Whole models.


def audio():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(1, 8, 9, bias=False),
        nn.ReLU(),
        nn.Conv1d(8, 8, 9, bias=False),
        nn.ReLU(),
        nn.Conv1d(8, 1, 1, bias=False),
    )


def error(model, data, **section):
    """Returns the error of the compressed model, relative to what it computes."""
    section.setdefault("initializer", {"range": {"num_init_samples": 8, "type": "min_max"}})
    config = {"compression": {"algorithm": "quantization", **section}}
    plain = copy.deepcopy(model).eval()
    controller, model = create_compressed_model(model, register_default_init_args(config, data))
    with torch.no_grad():
        wanted, found = (net(data[0][0]).double() for net in (plain, model.eval()))
        stripped = controller.strip()(data[0][0]).double()
    assert (stripped - found).norm() <= 1e-3 * found.norm()
    return ((found - wanted).norm() / wanted.norm()).item()


PER_TENSOR = {"weights": {"per_channel": False}}
EACH = 2.0 ** torch.linspace(-40, 40, 16).round()  # a factor for each channel
SECTIONS = [
    {},
    {"preset": "mixed"},
    {"weights": {"mode": "asymmetric"}},
    PER_TENSOR,
    {"overflow_fix": "enable"},
    {"weights": {"logarithm_scale": True}, "activations": {"logarithm_scale": True, "mode": "asymmetric"}},
    *[{"initializer": {"range": {"num_init_samples": 8, "type": kind}}} for kind in RANGES],
]


class TestModels:
    @pytest.mark.parametrize(
        ("section", "amplitude"),
        [*[(section, 2.0**-90) for section in SECTIONS], ({}, 2.0**-10), (SECTIONS[1], 2.0**90)],
    )
    def test_quiet_and_loud_inputs(self, section, amplitude):
        torch.manual_seed(1)
        inputs = [torch.randn(2, 1, 64) for _ in range(4)]
        expected = error(audio(), [(x, 0) for x in inputs], **section)
        found = error(audio(), [(x * amplitude, 0) for x in inputs], **section)
        # Equal but for what a logarithm rounds.
        assert found == pytest.approx(expected, rel=1e-3 if "logarithm" in str(section) else 1e-9)

    @pytest.mark.parametrize(
        ("section", "factor"),
        [
            *[(section, 2.0**-8) for section in SECTIONS[:6]],
            *[(section, EACH) for section in SECTIONS[:6] if section != PER_TENSOR],
            *[({}, 2.0**-90), (SECTIONS[2], 2.0**60)],
        ],
    )
    def test_weights_of_any_size_before_a_normalization(self, section, factor):
        torch.manual_seed(1)
        data = [(torch.randn(4, 3, 12, 12), 0) for _ in range(4)]
        found = []
        for by in (1.0, factor):
            torch.manual_seed(0)
            norm = nn.BatchNorm2d(16, eps=0.0)
            model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(16, 4, 1))
            with torch.no_grad():
                outputs = model[0](data[0][0])
                norm.running_mean.copy_(outputs.mean((0, 2, 3)) * by)
                norm.running_var.copy_(outputs.var((0, 2, 3)))
                model[0].weight.mul_(torch.as_tensor(by).reshape(-1, 1, 1, 1))
                # Its variance would be beyond float32, so the factor is taken back before.
                norm.running_mean.div_(by)
                model.insert(1, Scaled(by))
            found.append(error(model, data, **section))
        assert found[1] == pytest.approx(found[0], rel=1e-3)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_other_dtypes(self, dtype):
        data = [(torch.randn(2, 1, 64).to(dtype), 0) for _ in range(4)]
        for amplitude in (1.0, 2.0**-12):
            assert error(audio().to(dtype), [(x * amplitude, 0) for x, _ in data]) < 0.05

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("section", [{}, SECTIONS[1], SECTIONS[5]], ids=str)
    def test_other_dtypes_train_and_resume(self, dtype, section):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
        model = model.to(dtype)
        fresh = copy.deepcopy(model)
        config = {"compression": {"algorithm": "quantization", **section}}
        x = torch.randn(4, 3, 6, 6).to(dtype)
        with torch.no_grad():
            largest = fresh[0].weight.double().abs().amax((1, 2, 3))
        controller, model = create_compressed_model(model, register_default_init_args(config, [(x, 0)]))
        _, high = controller.weight_quantizers["0|WEIGHT"].range()
        assert (high.flatten().double() / largest - 1).abs().max() < 1e-5
        model.train()(x).square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in gradients)
        torch.optim.SGD(model.parameters(), 1e-3).step()
        found = model.eval()(x)
        assert found.dtype == dtype
        assert found.isfinite().all()
        rounding = 1e-6 if dtype == torch.float64 else 0.0  # of scales, which are float32
        assert (controller.strip()(x) - found).abs().max() <= rounding
        assert all(np.isfinite([q.low, q.high]).all() for q in controller.statistics().quantization.quantizers)
        state = controller.get_compression_state()
        _, resumed = create_compressed_model(fresh, config, compression_state=state)
        resumed.load_state_dict(model.state_dict())
        assert torch.equal(resumed.eval()(x), found)

    def test_what_counts_as_zero_is_said(self, caplog):
        data = [(torch.randn(2, 1, 64) * 1e-36, 0) for _ in range(4)]
        model = audio()
        config = register_default_init_args({"compression": {"algorithm": "quantization"}}, data)
        create_compressed_model(model, config)
        assert "counts as zero" in caplog.text
        assert np.isfinite(model(data[0][0]).detach().numpy()).all()


@pytest.mark.usefixtures("fast_exporter")
class TestExport:
    @pytest.mark.parametrize(("weights", "amplitude"), [(1e-20, 1.0), (1e-3, 1e-25), (1e12, 1e12), (1e-4, 1e-4)])
    @pytest.mark.parametrize("section", [{}, SECTIONS[1]], ids=str)
    def test_files_compute_the_same(self, weights, amplitude, section, export):
        torch.manual_seed(0)
        model = nn.Sequential(
            *[nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()],
            *[nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)],
        ).eval()
        with torch.no_grad():
            model[3].weight.mul_(weights)
            for name in ("weight", "bias"):
                getattr(model[1], name).mul_(amplitude)
            model[3].bias.mul_(weights * amplitude)
        x = torch.randn(4, 3, 6, 6)
        config = register_default_init_args({"compression": {"algorithm": "quantization", **section}}, [(x, 0)])
        controller, model = create_compressed_model(model, config)
        _, file = export(controller, x)
        found, wanted = torch.from_numpy(file.run(x)[0]).double(), model(x).detach().double()
        assert (found - wanted).norm() < 0.02 * wanted.norm()

    def test_ends_beyond_float16(self, export):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).half().eval()
        with torch.no_grad():
            model[0].weight.mul_(3000)
            model[2].weight.mul_(1e-3)
        x = torch.randn(64, 8).half()
        x = x * (65000 / model[0](x).relu().max().item())
        config = register_default_init_args({"compression": {"algorithm": "quantization"}}, [(x, 0)])
        controller, model = create_compressed_model(model, config)
        with torch.no_grad():
            for quantizer in controller.non_weight_quantizers.values():
                quantizer.scale.mul_(1.01)
        _, file = export(controller, x)
        found = torch.from_numpy(file.run(x.float())[0])  # files compute in float32
        assert found.isfinite().all()
        assert torch.allclose(found.float(), model(x).detach().float(), rtol=0.02, atol=0.05 * float(found.abs().max()))


class Scaled(nn.Module):
    """Takes a factor back that weights before it were given."""

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.as_tensor(factor).reshape(-1, 1, 1)

    def forward(self, x):
        return x / self.factor
