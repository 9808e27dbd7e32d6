"""Plans of interrupted preparations: parts stay what they were, as far as their files do."""

from dataclasses import asdict, replace

from data.corpus.sources import Source
from data.prepare.plan import _plan
from tests.data.preparing import spec


def parts_of(folder, part_bytes):
    return Source(str(folder / "*.jsonl"), name="s").parts(part_bytes)[0]


def files(parts):
    return [(number, [file.name[0] for file in part.files], part.span) for number, part in parts]


def planned_again(folder, old):
    """Numbers and parts of a plan for the files as they are now."""
    asked = spec(folder / "*.jsonl", folder / "out")
    begun = {"revision": None, "parts": [{**asdict(part), "number": number} for number, part in old]}
    plan = _plan(asked, {}, {"part_bytes": 1000, "sources": [begun]})
    return [(part.number, part) for part in plan.sources[0]]


def write(folder, **sizes):
    for name, size in sizes.items():
        (folder / f"{name}.jsonl").write_bytes(b"x" * size)


def test_without_a_change_every_part_stays_as_it_is(tmp_path):
    write(tmp_path, a=300, b=400, c=500, d=2500, e=10, f=0, g=990)
    old = [(number, replace(part, number=number)) for number, part in enumerate(parts_of(tmp_path, 1000))]
    assert files(old)[:3] == [(0, ["a", "b"], None), (1, ["c"], None), (2, ["d"], (0, 833))]
    assert planned_again(tmp_path, old) == old


def test_parts_whose_files_stand_together_keep_their_numbers(tmp_path):
    write(tmp_path, a=300, c=600, d=300, e=600, g=300, i=600, k=300, m=600)
    old = [(number + 3, part) for number, part in enumerate(parts_of(tmp_path, 1000))]
    assert files(old) == [
        (3, ["a", "c"], None),
        (4, ["d", "e"], None),
        (5, ["g", "i"], None),
        (6, ["k", "m"], None),
    ]
    write(tmp_path, a=10, h=2100, z=5)  # a shrinks; h and z are new
    (tmp_path / "e.jsonl").unlink()
    new = planned_again(tmp_path, old)
    assert files(new) == [
        (3, ["a", "c"], None),
        (7, ["d"], None),
        (8, ["g"], None),  # what stands between two files divides their part
        (9, ["h"], (0, 700)),
        (10, ["h"], (700, 1400)),
        (11, ["h"], (1400, 2100)),
        (12, ["i"], None),
        (6, ["k", "m"], None),
        (13, ["z"], None),
    ]
    assert [part.size for _, part in new] == [610, 300, 300, 700, 700, 700, 600, 900, 5]
