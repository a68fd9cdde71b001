"""Each page of docs/recipes is one program. It runs here, where its library is installed, and does what the page says.

A program runs in a process of its own, because ultralytics replaces functions of torch when it is imported. `make recipes`
has all libraries.
"""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGES = ROOT / "docs" / "recipes"

# Torchvision's operators, where they are missing; timm imports it, too.
PREPARE = """
from benchmarks.torchvision_operators import replace_missing_operators

replace_missing_operators()
"""
SEED = """
import torch

torch.manual_seed(0)
"""
NEEDS = {"timm": [], "torchvision": ["torchvision"], "ultralytics": ["ultralytics", "torchvision", "cv2", "PIL"]}

# What is added to a program: nothing decays a scale, half of the weights are zeros in a plain model, the run was resumed.
COMMON = """
def check(controller, optimizer, stripped, level=0.5):
    decays = {id(p): g.get("weight_decay", 0.0) for g in optimizer.param_groups for p in g["params"]}
    scales = [p for name, p in controller.model.named_parameters() if "_transforms." in name]
    assert scales and all(decays[id(p)] == 0.0 for p in scales), "a scale decays"
    assert any(decay > 0 for decay in decays.values())
    assert abs(controller.statistics().magnitude_sparsity.sparsity_level - level) < 0.2
    plain = dict(stripped.named_parameters())
    assert not [name for name in plain if "_transforms." in name]
    weights = [p for p in plain.values() if p.ndim == 4]
    share = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    assert abs(share - level) < 0.2, share
"""
CHECKS = {
    "timm": """
check(controller, optimizer, stripped)
assert read_checkpoint("timm.pt").extra["epoch"] == 2 and controller.scheduler.current_epoch == 2
""",
    "torchvision": """
check(controller, optimizer, stripped)
assert read_checkpoint("detector.pt").extra["epoch"] == 1
for one, other in zip(expected, found):
    assert len(one["boxes"]) and all(torch.allclose(one[key], other[key], atol=1e-3) for key in one)
""",
    "ultralytics": """
check(trainer.controller, trainer.optimizer, stripped)
assert (first.epoch, trainer.start_epoch, trainer.epoch) == (0, 1, 1)
assert trainer.ema.updates > first.ema.updates
with torch.no_grad():
    assert bool(predictions.isfinite().all()) and predictions.shape[1] == 5
""",
}


def program(page):
    return "\n".join(re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text(), re.DOTALL))


def test_every_page_is_run_and_listed():
    pages = {path.stem for path in PAGES.glob("*.md")} - {"README"}
    assert pages == set(CHECKS)
    assert pages <= set(re.findall(r"\]\((\w+)\.md\)", (PAGES / "README.md").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("page", CHECKS)
def test_recipe_runs(page, tmp_path):
    missing = [name for name in NEEDS[page] if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: make recipes")
    prepare = PREPARE if importlib.util.find_spec("torchvision") else ""
    (tmp_path / "recipe.py").write_text(prepare + SEED + program(page) + COMMON + CHECKS[page])
    paths = [str(ROOT), *(str(path) for path in (ROOT / "plugins").iterdir() if path.is_dir())]
    places = {"PYTHONPATH": os.pathsep.join(paths), "YOLO_CONFIG_DIR": str(tmp_path), "HOME": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "recipe.py"],
        cwd=tmp_path,
        env={**os.environ, **places, "COMPRESS_QUANTIZATION_KERNELS": "eager"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
