import pytest

from vit_jax.models.variants import VARIANTS, Variant, decode_variant
from vit_jax.system.errors import UserError


def test_base_large_and_huge_are_table_1():
    assert decode_variant("B/16") == (Variant(12, 768, 3072, 12), 16)
    assert decode_variant("L/32") == (Variant(24, 1024, 4096, 16), 32)
    assert decode_variant("H/14") == (Variant(32, 1280, 5120, 16), 14)


def test_any_patch_size():
    assert decode_variant("So400m/9") == (VARIANTS["So400m"], 9)


@pytest.mark.parametrize("name", ["B", "B/", "B/0", "B/16/2", "/16", "B/x", ""])
def test_a_name_that_does_not_read_says_how_to_write_it(name):
    with pytest.raises(UserError, match=r"model\.variant is .*'B/16'"):
        decode_variant(name)


def test_an_unknown_size_suggests_the_nearest_and_lists_all():
    with pytest.raises(UserError, match=r"'G-op/14'.*did you mean 'G-opt/14'.*So400m"):
        decode_variant("G-op/14")
