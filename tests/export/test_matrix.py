"""Whatever torch's own exporter takes as a plain model is exported when it is compressed, and runtimes agree with torch."""

from __future__ import annotations

import pytest
import torch

from compress_core import create_compressed_model
from tests.export.matrix_models import MATRIX

pytest.importorskip("openvino")


EVERY_WAY = {
    "onnxruntime": {(is_batch, optimized) for is_batch in (False, True) for optimized in (False, True)},
    "openvino": {(is_batch, optimized) for is_batch in (False, True) for optimized in (False, True)},
}


# What differs from another model of the matrix in a function that both runtimes compute in floating point alike, or in
# integers of the weights alone.
ALIKE = {
    *(
        "leaky relu",
        "gelu",
        "hardswish",
        "instance norm",
        "prelu",
        "padding by reflection",
        "dilated, strided, grouped",
    ),
    *("mixer", "two inputs", "several outputs", "asymmetric weights", "weights of one scale", "four bits"),
}
CASES = [(name, target) for name in MATRIX for target in EVERY_WAY if target == "onnxruntime" or name not in ALIKE]


@pytest.mark.parametrize(("name", "target"), CASES)
def test_the_compressed_model_is_exported_and_agrees(name, target, tmp_path):
    small = MATRIX[name]
    torch.manual_seed(0)
    model = small.make().eval()
    torch.manual_seed(1)
    batches = [small.inputs() for _ in range(2)]
    document = {"compression": {"algorithm": "quantization", **small.section}, **small.root}
    info = [{"sample_size": list(x.shape), "type": str(x.dtype).removeprefix("torch.")} for x in batches[0]]
    loader = [(batch if len(batch) > 1 else batch[0], 0) for batch in batches]
    controller, _ = create_compressed_model(model, {"input_info": info, **document}, init_loader=loader)
    # An export that is wrong raises; a tolerance that is given holds even if only roundings add up.
    report = controller.export(tmp_path / "model.onnx", small.inputs(), target=target, tolerance=0.03)
    assert {(a.batch_size > 1, a.optimized) for a in report.agreements} == EVERY_WAY[target]
    assert not any("takes batches of" in note for note in report.notes)
    assert report.work, "each of these models multiplies"
