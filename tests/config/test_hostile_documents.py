"""Documents from a stranger: sentences for what no config is, and work that is proportional to the length."""

import json

import json5
import pytest

from compress_core import CompressionConfig, ConfigError, check_config

SECTION = {"algorithm": "magnitude_sparsity"}


def nested(depth, kind):
    value = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


@pytest.mark.parametrize("size", [2**63, 2**70, 10**5000, -(2**63) - 1], ids=int.bit_length)
def test_sizes_beyond_64_bits(size):
    document = {"compression": SECTION, "input_info": {"sample_size": [size, 3]}}
    with pytest.raises(ConfigError, match=r"^input_info\.sample_size\.0: the number does not fit in 63 bits"):
        check_config(document)


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("depth", [900, 100_000])
def test_depth(depth, kind):
    documents = {
        r"compression\.params\.": {"compression": {**SECTION, "params": nested(depth, kind)}},
        r"compression\.": {"compression": nested(depth, kind)},
        r"mine\.": {"mine": nested(depth, kind), "compression": SECTION},
    }
    for path, document in documents.items():
        with pytest.raises(ConfigError, match=f"^{path}.*nested more than 64 levels deep"):
            check_config(document)


@pytest.mark.parametrize("depth", [900, 100_000])
def test_depth_of_a_file(tmp_path, depth):
    path = tmp_path / "config.json"
    path.write_text('{"compression": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ConfigError, match=r"nested more than 64 levels deep|is not JSON"):
        CompressionConfig.from_json(path)


def test_json_with_comments_and_trailing_commas_does_not_need_the_slow_parser(tmp_path, monkeypatch):
    monkeypatch.setattr(json5, "loads", lambda *args, **keywords: pytest.fail("100 KB would take seconds"))
    path = tmp_path / "config.json"
    names = [f"layer{i}, // no comment, ]" for i in range(5000)] + ['a \\"b" /* c */,]']
    text = json.dumps({"compression": {**SECTION, "ignored_scopes": names}}, indent=1)
    text = '// first\n/* " */' + text.replace("\n ]", ", // last\n ]").replace("}", ",/* x */\n}")
    path.write_text(text)
    assert CompressionConfig.from_json(path).sections[0].ignored_scopes == names


def test_what_only_json5_allows_still_works(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{compression: {'algorithm': 'magnitude_sparsity', sparsity_init: +.5}}")
    assert CompressionConfig.from_json(path).sections[0].sparsity_init == 0.5


@pytest.mark.parametrize("text", ['{"compression": {}, "compression": {}}', "{'compression': {}, compression: {}}"])
def test_repeated_keys_are_refused_by_both_parsers(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match='Duplicate key "compression"'):
        CompressionConfig.from_json(path)
