"""Layout strings: which layer gets which pattern, and errors that name the part that is wrong."""

import pytest

from s2.attention import LayerLayout


def dense_layers(layout):
    return [i for i, pattern in enumerate(layout) if pattern.is_dense]


@pytest.mark.parametrize(
    ("spec", "layers", "dense"),
    [
        ("L8V16", 4, []),
        ("dense", 3, [0, 1, 2]),
        ("L4V24+dense10-22", 32, list(range(10, 23))),
        ("L8V16+dense0,1", 24, [0, 1]),
        ("L8V16+dense0,2-3,7", 8, [0, 2, 3, 7]),
        ("L8V16-inter", 6, [1, 3, 5]),
        ("L8V16+sink2+dense0", 3, [0]),
        ("W16-inter+dense0", 4, [0, 1, 3]),
        ("2*dense|6*L8V4<64V16+sink1-inter+dense0", 4, [0, 1, 3]),
    ],
)
def test_dense_layers(spec, layers, dense):
    layout = LayerLayout.parse(spec, num_layers=layers)
    assert len(layout) == layers
    assert dense_layers(layout) == dense


def test_block_size_and_sinks_reach_the_patterns():
    layout = LayerLayout.parse("L8V16+sink2+dense0", num_layers=3, block_size=32)
    assert layout[1].block_size == 32 and layout[1].sinks == 2


def test_rotation_skips_dense_layers():
    layout = LayerLayout.parse("L1V16-inter", num_layers=6)
    assert [layout.rotations[i] for i in (0, 2, 4)] == [0, 1, 2]
    # with 8 heads two consecutive sparse layers are complete together, whatever lies between them
    pattern = layout[0]
    assert pattern.union_coverage(48, 8, layer=layout.rotations[0], num_layers=2) == 1.0


def test_layout_density_averages_layers():
    layout = LayerLayout.parse("L8V16+dense0", num_layers=4)
    sparse = layout[1].density(4096, 16)
    assert layout.density(4096, 16) == pytest.approx((1 + 3 * sparse) / 4)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("L8X16", "L8X16"),
        ("L8V16+dense", "expected a layer or a range like 10-22 of dense layers, at its end"),
        ("L8V16+dense30-40", "layer 40"),
        ("L8V16+dense9-3", "'9-3'"),
        ("L8V16+dense1,a", "at character 14 ('a')"),
        ("L8V16-outer", "at character 6 ('-outer')"),
        ("2*dense|L8V16x", "at character 14 ('x')"),
        ("", "''"),
        ("L0V2+dense1", "L0V2"),
        ("1000000000000*dense", "at most 65536, at character 1"),
    ],
)
def test_errors_name_the_wrong_part(spec, names):
    with pytest.raises(ValueError) as error:
        LayerLayout.parse(spec, num_layers=32)
    assert names in str(error.value)
    assert "attention_layout" in str(error.value)


def test_a_layout_prints_as_the_string_it_was_read_from():
    assert str(LayerLayout.parse("L8V16+sink1+dense1", 4)) == "L8V16+sink1+dense1"
