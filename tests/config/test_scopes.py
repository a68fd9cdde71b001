from collections import OrderedDict

import pytest
from torch import nn

from compress_core import ConfigError, create_compressed_model
from compress_core.config.scopes import ScopeFilter
from tests.zoo import MobileNet, ResidualNet


def names(model, *scopes):
    scope_filter = ScopeFilter(model, {str(i): s for i, s in enumerate(scopes)})
    return [name for name, _ in model.named_modules() if scope_filter.reason_to_skip([name])]


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ("features.0", ["features.0"]),
        ("classifier", ["classifier", "classifier.0", "classifier.1"]),
        ("features.[036]", ["features.0", "features.3", "features.6"]),
        ("class*", ["classifier", "classifier.0", "classifier.1"]),
        ("{re}^classifier\\.1$", ["classifier.1"]),
        ("{re}conv2d_0$", ["features.0", "features.3", "features.6"]),
        ("{re}NNCFConv2d\\[3\\]", ["features.3"]),
        ("{re}/Conv2d\\[3\\]", ["features.3"]),
        ("MobileNet/Sequential[features]/NNCFConv2d[3]/conv2d_0", ["features.3"]),
        ("Model/Seq[features]/Conv2d[3]/conv2d_0", ["features.3"]),
        ("MobileNet/Sequential[classifier]/NNCFLinear[1]/linear_0", ["classifier.1"]),
        ("Model/relu_0", []),
        ("feature", []),
    ],
)
def test_forms_of_a_scope(scope, expected):
    assert names(MobileNet(), scope) == expected


def test_dotted_name_does_not_match_longer_names():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(12)])
    assert names(model, "1") == ["1"]


def test_names_stay_the_same_once_the_model_is_compressed():
    from compress_core import create_compressed_model

    model = ResidualNet()
    before = names(model, "{re}NNCFConv2d\\[conv1\\]/conv2d_0")
    create_compressed_model(model, {"compression": {"algorithm": "magnitude_sparsity"}})
    assert names(model, "{re}NNCFConv2d\\[conv1\\]/conv2d_0") == before == ["conv1"]


@pytest.mark.parametrize(
    ("root_ignored", "ignored", "root_target", "target", "expected"),
    [
        ([], [], [], [], {"conv1", "conv2", "fc"}),
        (["fc"], ["conv1"], [], [], {"conv2"}),
        ([], [], ["{re}conv"], [], {"conv1", "conv2"}),
        ([], [], ["{re}conv"], ["{re}1$"], {"conv1"}),
        ([], ["conv1"], ["{re}conv"], ["{re}conv", "fc"], {"conv2"}),
    ],
)
def test_root_and_section_scopes_both_count(root_ignored, ignored, root_target, target, expected):
    from compress_core import create_compressed_model

    section = {
        "algorithm": "magnitude_sparsity",
        "ignored_scopes": ignored,
        **({"target_scopes": target} if target else {}),
    }
    config = {"ignored_scopes": root_ignored, "compression": section}
    if root_target:
        config["target_scopes"] = root_target
    controller, _ = create_compressed_model(ResidualNet(), config)
    assert {name.removesuffix(".weight") for name in controller.sparsified_module_info} == expected


def test_validate_scopes_false_accepts_dead_scopes():
    from compress_core import create_compressed_model

    section = {"algorithm": "magnitude_sparsity", "ignored_scopes": ["Model/relu_0"], "validate_scopes": False}
    controller, _ = create_compressed_model(ResidualNet(), {"compression": section})
    assert len(controller.sparsified_module_info) == 3


def test_a_scope_of_the_document_without_a_match_is_sent_to_a_section():
    document = {
        "ignored_scopes": ["fc|OUTPUT"],
        "compression": {"algorithm": "magnitude_sparsity", "ignored_scopes": ["fd"]},
    }
    model = nn.Sequential(OrderedDict(fc=nn.Linear(2, 2), fd=nn.Linear(2, 2)))
    with pytest.raises(
        ConfigError, match=r"^ignored_scopes.0: .*move it to the section of the algorithm that it is meant for"
    ):
        create_compressed_model(model, document)
