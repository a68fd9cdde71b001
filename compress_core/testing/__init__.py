"""The conformance kit: what every algorithm must keep, as checks that plugin authors run too.

Example:
    ```python
    import pytest
    from compress_core.testing import Case, conformance_checks

    @pytest.mark.parametrize("check", conformance_checks(), ids=lambda check: check.__name__)
    def test_contract(check):
        config = {"compression": {"algorithm": "mine"}}
        check(Case(make_model=MyModel, inputs=(torch.randn(2, 3, 8, 8),), config=config))
    ```
"""

from compress_core.testing.case import Case
from compress_core.testing.checks import CheckResult, Report, conformance_checks, run_checks
from compress_core.testing.fingerprint import fingerprint
from compress_core.testing.tags import TAGS, tags_of

__all__ = ["TAGS", "Case", "CheckResult", "Report", "conformance_checks", "fingerprint", "run_checks", "tags_of"]
