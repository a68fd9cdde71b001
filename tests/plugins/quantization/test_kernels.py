"""Compiled kernels, eager ones and plain operators: the same values and gradients, on every kind of tensor."""

import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo
from torch import nn

from compress_core.transforms import ACTIVATION_FUNCTIONS
from compress_quantization import kernels
from compress_quantization.fake_quantize import AsymmetricFakeQuantize, SymmetricFakeQuantize
from compress_quantization.kernels import compiled

LARGE = 20_000  # elements; more than what is left to eager operators anyway

KINDS = {
    "tensor": ((1,), (20, 1000), torch.contiguous_format),
    "rows": ((20, 1, 1), (20, 10, 101), torch.contiguous_format),
    "planes": ((1, 8, 1, 1), (5, 8, 25, 25), torch.contiguous_format),
    "columns": ((1, 8, 1, 1), (5, 8, 25, 25), torch.channels_last),
    "columns in fours": ((1, 8, 1, 1), (4, 8, 25, 25), torch.channels_last),
    "small planes": ((1, 30, 1, 1), (40, 30, 4, 5), torch.contiguous_format),
    "odd planes": ((1, 7, 1, 1), (5, 7, 25, 25), torch.contiguous_format),
    "odd tensor": ((1,), (21, 1001), torch.contiguous_format),
    "odd rows": ((21, 1, 1), (21, 10, 101), torch.contiguous_format),
    "last": ((8,), (3000, 8), torch.contiguous_format),
}


SMOOTH = set(ACTIVATION_FUNCTIONS) - {"relu", "relu6"}  # x is kept, and no code
CASES = [
    # How a kernel walks a tensor and what it computes do not know of each other: relu6, which has two ends, is computed
    # on every kind of tensor, and every function on one of them.
    *[(kind, activation) for kind in KINDS for activation in (None, "relu6")],
    *[("tensor", activation) for activation in ACTIVATION_FUNCTIONS if activation != "relu6"],
    *[("planes", "hardswish"), ("columns", "hardswish"), ("small planes", "hardswish")],
]
# Both classes share the kernels' code but for the ends of the range; one activation with both ends stands for all there.
CASES_OF_CLASSES = [
    *[(SymmetricFakeQuantize, *case) for case in CASES],
    *[(AsymmetricFakeQuantize, *case) for case in CASES if not case[0].startswith("odd") or case[1] == "relu6"],
]


def applied(module, x, activation):
    return module(x) if activation is None else module.fused(x, activation)


@pytest.fixture(autouse=True)
def _restored():
    before = kernels.set_compiled(True)
    yield
    kernels.set_compiled(before)


@pytest.fixture
def _needs_compiler():
    SymmetricFakeQuantize((1,))(torch.randn(LARGE))
    if not kernels.is_available():
        pytest.skip("nothing can be compiled here")


def make(kind, cls=SymmetricFakeQuantize, **options):
    shape, size, memory_format = KINDS[kind]
    torch.manual_seed(1)
    module = cls(shape, signed=True, **options)
    low = -torch.rand(shape) - 0.1
    module.set_range(low, low + 2)
    return module, (torch.randn(size) * 3).contiguous(memory_format=memory_format)


def results(module, x, activation=None, *, run=None):
    """Returns the output and all gradients."""
    run = run or (lambda tensor: applied(module, tensor, activation))
    module.zero_grad()
    tensor = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = run(tensor)
    generator = torch.Generator().manual_seed(2)
    out.backward(torch.randn(x.shape, generator=generator).to(x.dtype))
    return out.detach(), tensor.grad, [parameter.grad.clone() for parameter in module.parameters()]


def assert_same(left, right, *, exact_sums=False, exact=True):
    if exact:
        assert torch.equal(left[0], right[0])
        assert torch.equal(left[1], right[1])
    else:  # compilers round smooth functions otherwise: rarely, that is at the middle of two values or at an end
        for ours, theirs, largest in zip(left[:2], right[:2], (0.03, torch.inf), strict=True):
            difference = (ours - theirs).abs()
            assert difference.max() <= largest
            assert (difference > 1e-5).float().mean() < 5e-4
    for ours, theirs in zip(left[2], right[2], strict=True):
        scale = theirs.abs().max().item() or 1.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=(1e-5 if exact_sums else 5e-3) * scale)


class TestCodes:
    """Compiled kernels keep the rounding error of an element as one byte, in 1/240 of a step; eager ones keep x."""

    @pytest.mark.usefixtures("_needs_compiler")
    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize("kind", ["tensor", "planes"])
    @pytest.mark.parametrize("factor", [1.0, 1e-12, 1e12])
    def test_gradients_of_ranges_are_within_the_bound(self, kind, cls, factor):
        module, x = make(kind, cls)
        low, high = module.range()
        module.set_range(low * factor, high * factor)
        compiled = results(module, x * factor)
        assert kernels.is_available()
        kernels.set_compiled(False)
        exact = results(module, x * factor)
        # All gradients but the one of the scale or the width are sums of whole elements.
        *_, found = compiled[2]
        *_, wanted = exact[2]
        for ours, theirs in zip(compiled[2][:-1], exact[2][:-1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        generator = torch.Generator().manual_seed(2)
        size = torch.randn(x.shape, generator=generator).abs()
        size = size.sum() if kind == "tensor" else size.sum((0, 2, 3), keepdim=True)
        smallest, largest = module.levels()
        bound = size / 480 / (largest - smallest)
        assert ((found - wanted).abs() <= bound + 1e-4).all()
        # The bound says something: rounding errors differ in sign, so that most of it is not used.
        assert (bound < 0.1 * size / (largest - smallest)).all()


class TestAgreement:
    @pytest.mark.usefixtures("_needs_compiler")
    @pytest.mark.parametrize(("cls", "kind", "activation"), CASES_OF_CLASSES)
    def test_compiled_and_eager(self, cls, kind, activation):
        module, x = make(kind, cls)
        compiled = results(module, x, activation)
        assert kernels.is_available()
        kernels.set_compiled(False)
        # Codes of one byte round the error of each element, where rows (weights) and eager kernels keep x itself.
        exact_sums = activation in SMOOTH or (kind == "rows" and activation is None)
        exact = activation not in SMOOTH
        assert_same(compiled, results(module, x, activation), exact_sums=exact_sums and exact, exact=exact)

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    @pytest.mark.parametrize(("kind", "activation"), CASES)
    def test_eager_and_operators_that_compilers_follow(self, kind, cls, activation):
        torch._dynamo.reset()  # the function below is compiled for each case, and there is a limit of eight
        module, x = make(kind, cls)
        kernels.set_compiled(False)
        ours = results(module, x, activation)
        run = torch.compile(
            lambda t: applied(module, t, activation),
            backend="eager",
            fullgraph=True,
        )
        # What is not contiguous meets torch's vectorized functions in another order, with another last bit.
        exact = activation not in SMOOTH
        assert_same(ours, results(module, x, run=run), exact_sums=exact, exact=exact)

    @pytest.mark.usefixtures("_needs_compiler")
    @pytest.mark.parametrize(("kind", "activation"), CASES)
    def test_compiled_kernels_that_are_switched_off_before_backward(self, kind, activation):
        module, x = make(kind)
        expected = results(module, x, activation)

        def run(tensor):
            kernels.set_compiled(True)
            out = applied(module, tensor, activation)
            kernels.set_compiled(False)
            return out

        exact = activation not in SMOOTH  # x is kept, and eager kernels compute the function anew
        assert_same(expected, results(module, x, run=run), exact_sums=exact, exact=exact)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_of_other_dtypes(self, dtype):
        module, x = make("tensor")
        x = x.to(dtype)
        compiled = results(module, x)
        kernels.set_compiled(False)
        assert_same(compiled, results(module, x))

    @pytest.mark.parametrize("kind", list(KINDS))
    def test_with_and_without_gradients(self, kind):
        module, x = make(kind)
        with_graph = module(x.requires_grad_()).detach()
        with torch.no_grad():
            assert torch.equal(module(x), with_graph)

    @pytest.mark.parametrize("enabled", [True, False], ids=["compiled", "eager"])
    @pytest.mark.parametrize("kind", list(KINDS))
    def test_in_place_where_there_is_no_graph(self, kind, enabled):
        module, x = make(kind)
        kernels.set_compiled(enabled)
        expected, given = module(x).detach(), x.clone(memory_format=torch.preserve_format)
        assert torch.equal(module.forward_owned(x).detach(), expected)
        assert torch.equal(x, given)
        with torch.no_grad():
            out = module.forward_owned(x)
        assert out is x
        assert torch.equal(out, expected)

    @pytest.mark.parametrize("enabled", [True, False], ids=["compiled", "eager"])
    @pytest.mark.parametrize("activation", [None, "relu6", "hardswish"])
    def test_under_another_default_device(self, activation, enabled):
        module, x = make("tensor")
        kernels.set_compiled(enabled)
        expected = results(module, x, activation)

        def run(tensor):
            with torch.device("meta"):
                out = applied(module, tensor, activation)
                out.sum().backward(retain_graph=True)
            module.zero_grad()
            tensor.grad = None
            return out

        assert_same(expected, results(module, x, run=run), exact_sums=True)

    def test_with_a_block_that_ends_in_the_middle_of_a_row(self):
        # Rows longer than a block of the eager kernels, and a number of rows that blocks do not divide.
        kernels.set_compiled(False)
        module = SymmetricFakeQuantize((3, 1), signed=True)
        x = torch.randn(3, 140_001)
        ours = results(module, x)
        for row in range(3):
            single = SymmetricFakeQuantize((1,), signed=True)
            tensor = x[row].clone().requires_grad_()
            assert torch.equal(single(tensor).detach(), ours[0][row])


class TestCompilation:
    @pytest.mark.usefixtures("_needs_compiler")
    def test_other_shapes_need_no_other_kernels(self):
        weights, activations = SymmetricFakeQuantize((16, 1, 1, 1), signed=True), SymmetricFakeQuantize((1,))

        def steps(size):
            weight = torch.randn(16, 3 + size, 11, 13, requires_grad=True)
            batch = torch.randn(1 + size, 5, 50, 41 + size, requires_grad=True)
            (weights(weight).sum() + activations(batch).sum() + activations.fused(batch, "relu").sum()).backward()

        # Numbers of elements that four does not divide have kernels of their own: the first sizes have both.
        for size in (1, 2, 3):
            steps(size)
        before = kernels.kernel_count()
        for size in (*range(4, 14), 44):
            steps(size)
        assert kernels.kernel_count() == before

    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    def test_in_a_model_that_the_user_compiles(self, cls, backend):
        module, x = make("planes", cls)
        model = nn.Sequential(nn.Identity(), module)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        kernels.set_compiled(False)
        assert_same(results(module, x), results(module, x, run=compiled))

    @pytest.mark.parametrize("cls", [SymmetricFakeQuantize, AsymmetricFakeQuantize])
    def test_in_a_model_that_is_exported(self, cls):
        module, x = make("planes", cls)
        program = torch.export.export(nn.Sequential(module).eval(), (x,), strict=False)
        assert torch.equal(program.module()(x), module(x))

    def test_under_vmap(self):
        module, x = make("tensor")
        assert torch.equal(torch.vmap(module)(x), module(x))

    def test_on_meta_and_fake_tensors(self):
        module = SymmetricFakeQuantize((1,)).to("meta")
        assert module(torch.empty(2, 3, device="meta")).shape == (2, 3)


def in_a_process(script, tmp_path, **environment):
    """Runs Python code without a compiler in reach, and returns what it prints."""
    hidden = {key: value for key, value in os.environ.items() if key not in {"CXX", "CC", "PATH"}}
    script = "import logging, torch\nlogging.basicConfig(level='WARNING')\n" + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**hidden, "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


STEP = """
    from compress_quantization.fake_quantize import SymmetricFakeQuantize
    torch.manual_seed(0)
    module, x = SymmetricFakeQuantize((1,), signed=True), torch.randn(20000, requires_grad=True)
    for _ in range(2):
        module.fused(x, "relu").sum().backward()
    print(x.grad.sum().item(), module.scale.grad.item())
"""


class TestWithoutCompiler:
    def test_eager_kernels_do_the_work_and_one_line_says_so(self, tmp_path):
        done = in_a_process(STEP, tmp_path)
        assert done.returncode == 0, done.stderr
        torch.manual_seed(0)
        x = torch.randn(20000)
        passed, _ = (float(number) for number in done.stdout.split())
        assert passed == 2 * ((x > 0) & (x <= 1)).sum().item()
        assert done.stderr.count("fake-quantize kernels cannot be compiled") == 1
        assert len(done.stderr.strip().splitlines()) == 1

    def test_eager_kernels_on_request_are_silent(self, tmp_path):
        done = in_a_process(STEP, tmp_path, COMPRESS_QUANTIZATION_KERNELS="eager")
        assert done.returncode == 0
        assert done.stderr == ""

    def test_compiled_kernels_on_request_fail(self, tmp_path):
        done = in_a_process(STEP, tmp_path, COMPRESS_QUANTIZATION_KERNELS="compiled")
        assert done.returncode != 0

    def test_unknown_value_is_refused(self, tmp_path):
        done = in_a_process(STEP, tmp_path, COMPRESS_QUANTIZATION_KERNELS="fast")
        assert "UsageError" in done.stderr
        assert "'fast'" in done.stderr


def test_a_kernel_that_compiles_and_does_not_run_is_not_used(monkeypatch, caplog):
    def broken(function, tensors):
        def kernel(*arguments):
            raise NameError("name 's75' is not defined")  # as torch 2.14.1 does

        return kernel

    monkeypatch.setattr(compiled, "compile_graph", broken)
    monkeypatch.setattr(compiled, "_state", compiled._State())
    module, x = SymmetricFakeQuantize((1,), signed=True), torch.linspace(-1, 1, 20000)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        assert torch.allclose(module(x), x, atol=0.005)
    assert "NameError: name 's75' is not defined" in caplog.text
    assert "another version of torch" in caplog.text
    assert not compiled.is_available()
