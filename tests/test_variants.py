import csv
from pathlib import Path

import pytest

from repvgg_zoo import VARIANTS
from repvgg_zoo.tools.tables import count_gmacs, count_params
from repvgg_zoo.variants import get_variant

OFFICIAL = list(csv.DictReader((Path(__file__).parent / 'data' / 'variants.csv').open()))


def numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split()))


@pytest.mark.parametrize('row', OFFICIAL, ids=lambda row: row['name'])
def test_variant_equals_the_official_one(row):
    variant, classes = VARIANTS[row['name']], int(row['num_classes'])
    assert variant.strides == numbers(row['strides'])
    assert variant.depths == numbers(row['depths'])
    assert variant.stem_channels == int(row['stem_channels'])
    assert variant.stage_channels == numbers(row['stage_channels'])
    assert count_params(variant, deploy=False, num_classes=classes) == int(row['params_train'])
    assert count_params(variant, deploy=True, num_classes=classes) == int(row['params_deploy'])
    gmacs = count_gmacs(variant, input_px=int(row['gmacs_at_px']), num_classes=classes)
    assert round(gmacs, 3) == float(row['gmacs_deploy'])


def test_variants_have_the_official_models_in_order():
    official = [row['name'] for row in OFFICIAL]
    assert [name for name in VARIANTS if name in official] == official
    assert 'test_repvgg' in VARIANTS


def test_variant_test_repvgg_is_tiny():
    assert 0.3e6 < count_params(VARIANTS['test_repvgg'], deploy=True, num_classes=10) < 0.7e6


def test_get_variant_unknown_name_raises_with_the_nearest():
    with pytest.raises(ValueError, match="unknown variant 'repvgg_b11'; did you mean 'repvgg_b1'"):
        get_variant('repvgg_b11')


def test_variants_need_no_torch():
    source = (Path(__file__).parents[1] / 'repvgg_zoo' / 'variants.py').read_text()
    assert 'torch' not in source
