"""What tests of quantization share."""

from compress_core.config.scopes import ScopedModule
from compress_quantization.config import QuantizationConfig
from compress_quantization.quantizer_names import QuantizerPlace


def section(**values):
    return QuantizationConfig.model_validate({"algorithm": "quantization", **values})


def place(name="conv", group="weights", operator="conv2d", port=None, nncf=(), **more):
    port = port or ("WEIGHT" if group == "weights" else "OUTPUT")
    return QuantizerPlace((ScopedModule(name, nncf),), group, operator, port, **more)
