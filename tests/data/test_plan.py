"""Plans of interrupted preparations: parts stay what they were, as far as their files do."""

from data.corpus.sources import Source
from data.prepare.plan import _renumbered


def parts_of(folder, part_bytes):
    return Source(str(folder / "*.jsonl"), name="s").parts(part_bytes)[0]


def files(parts):
    return [(number, [name[0] for _, name in part.files], part.span) for number, part in parts]


def write(folder, **sizes):
    for name, size in sizes.items():
        (folder / f"{name}.jsonl").write_bytes(b"x" * size)


def test_without_a_change_every_part_stays_as_it_is(tmp_path):
    write(tmp_path, a=300, b=400, c=500, d=2500, e=10, f=0, g=990)
    old = list(enumerate(parts_of(tmp_path, 1000)))
    assert files(old)[:3] == [(0, ["a", "b"], None), (1, ["c"], None), (2, ["d"], (0, 833))]
    assert _renumbered(parts_of(tmp_path, 1000), old) == old


def test_files_that_shared_a_part_share_it_still(tmp_path):
    write(tmp_path, a=300, c=600, d=300, e=600, g=300, i=600)
    old = [(number + 3, part) for number, part in enumerate(parts_of(tmp_path, 1000))]
    assert files(old) == [(3, ["a", "c"], None), (4, ["d", "e"], None), (5, ["g", "i"], None)]
    write(tmp_path, a=10, b=20, f=700, h=2100, z=5)  # a shrinks; b, f, h and z are new
    (tmp_path / "e.jsonl").unlink()
    new = _renumbered(parts_of(tmp_path, 1000), old)
    assert files(new) == [
        (3, ["a", "b", "c"], None),
        (4, ["d"], None),
        (6, ["f"], None),
        (5, ["g"], None),
        (7, ["h"], (0, 700)),
        (8, ["h"], (700, 1400)),
        (9, ["h"], (1400, 2100)),
        (10, ["i"], None),  # what stands between two files divides their part
        (11, ["z"], None),
    ]
    assert [part.size for _, part in new] == [630, 300, 700, 300, 700, 700, 700, 600, 5]
