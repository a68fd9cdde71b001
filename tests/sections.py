"""Sections of every algorithm and mode, for laws that hold for all of them; each epoch of training is steady at its end."""

from __future__ import annotations

import contextlib

import pytest

from compress_quantization import kernels
from compress_quantization.kernels import eager

SPARSITY = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.5}


def sparsity(**params):
    params = {"sparsity_target": 0.5, "sparsity_target_epoch": 2, **params}
    return {**SPARSITY, "params": {key: value for key, value in params.items() if value is not None}}


def quantization(mode="symmetric", *, per_channel=False, root=None, **section):
    group = {"mode": mode, "per_channel": per_channel, **(root or {})}
    initializer = {"range": {"num_init_samples": 4}}
    return {"algorithm": "quantization", "weights": group, "activations": group, "initializer": initializer, **section}


def pruning(**params):
    params = {
        "prune_first_conv": True,
        "prune_downsample_convs": True,
        "multiple_of": 1,
        "pruning_target": 0.5,
        **params,
    }
    return {"algorithm": "filter_pruning", "pruning_init": 0.25, "params": params}


ADAPTATION = {"batchnorm_adaptation": {"num_bn_adaptation_samples": 4}, "weight_reconstruction": {"num_samples": 4}}
SECTIONS = {
    "sparsity, global": [sparsity()],
    "sparsity, local": [sparsity(sparsity_level_setting_mode="local", weight_importance="abs")],
    "sparsity, adaptive": [sparsity(schedule="adaptive", sparsity_target_epoch=None)],
    "sparsity, multistep": [
        sparsity(
            schedule="multistep",
            multistep_steps=[1],
            multistep_sparsity_levels=[0.5, 0.6],
            sparsity_target=None,
            sparsity_target_epoch=None,
        )
    ],
    "pruning": [pruning()],
    "pruning, one ranking": [pruning(all_weights=True, filter_importance="geometric_median", prune_batch_norms=False)],
    "quantization, symmetric": [quantization()],
    "quantization, symmetric per channel": [quantization(per_channel=True)],
    "quantization, asymmetric": [quantization("asymmetric")],
    "quantization, asymmetric per channel": [quantization("asymmetric", per_channel=True)],
    "quantization, logarithms": [quantization(root={"logarithm_scale": True})],
    "quantization, logarithms of widths": [
        quantization("asymmetric", per_channel=True, root={"logarithm_scale": True})
    ],
    "quantization, 4 bits, outputs": [quantization(root={"bits": 4}, quantize_outputs=True)],
    "quantization, all off": [
        quantization(params={"activations_quant_start_epoch": 9, "weights_quant_start_epoch": 9})
    ],
    "quantization, staged": [quantization(params={"activations_quant_start_epoch": 1, "weights_quant_start_epoch": 0})],
    "all": [pruning(), sparsity(), {**quantization(), "initializer": {**ADAPTATION, "range": {"num_init_samples": 4}}}],
}


@contextlib.contextmanager
def quantized_as_without_compiler():
    """Quantizers compute with the operators that a GPU without a compiler gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "is_host", lambda device: False)
        before = kernels.set_compiled(False)
        try:
            yield
        finally:
            kernels.set_compiled(before)
