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

from compress_core.testing.conformance import Case, conformance_checks
from compress_core.testing.fingerprint import fingerprint

__all__ = ["Case", "conformance_checks", "fingerprint"]
