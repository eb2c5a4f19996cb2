"""The table in docs/FAMILIES.md is true: what it says is supported still passes every proof, and what is refused is refused by us."""

import re
import sys
from pathlib import Path

import pytest
import transformers
from transformers import CONFIG_MAPPING

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import families as tiny  # noqa: E402
from table_of_families import examine  # noqa: E402

PAGE = (ROOT / "docs" / "FAMILIES.md").read_text(encoding="utf-8")
TABLE = dict(re.findall(r"^\| `([^`]+)` \| (supported|refused) \|", PAGE, re.MULTILINE))
IS_OF_THIS_VERSION = f"transformers {transformers.__version__} " in PAGE
SUPPORTED = [family for family, verdict in TABLE.items() if verdict == "supported"]


def test_at_least_forty_families_are_supported():
    assert len(SUPPORTED) >= 40
    assert f"**{len(SUPPORTED)} supported, {len(TABLE) - len(SUPPORTED)} refused.**" in PAGE
    assert set(tiny.FAMILIES) <= set(SUPPORTED)


@pytest.mark.skipif(not IS_OF_THIS_VERSION, reason="the table is of another version of transformers")
def test_the_table_has_every_causal_language_model_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert set(TABLE) == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("family", TABLE)
def test_a_family_is_what_the_table_says(family):
    if not IS_OF_THIS_VERSION and (family not in CONFIG_MAPPING or family not in SUPPORTED):
        pytest.skip(f"transformers {transformers.__version__} may refuse it otherwise, or not have it")
    verdict, why = examine(family)
    assert verdict == TABLE[family], why
