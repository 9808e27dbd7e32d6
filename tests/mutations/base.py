"""Files, locks, recipes, and how commands end."""

from __future__ import annotations

from .mutant import Mutant

MUTANTS = (
    Mutant(
        "a_failed_write_leaves_its_half", "s2/files.py",
        "    except BaseException:\n        temporary.unlink(missing_ok=True)\n        raise",
        "    except BaseException:\n        os.replace(temporary, path)\n        raise",
        ("test_files.py",),
    ),
    Mutant(
        "folders_of_others_are_removed", "s2/files.py",
        "    require_marked(folder)\n    listed = ",
        "    listed = ",
        ("test_files.py",),
    ),
    Mutant(
        "aside_overwrites_what_is_there", "s2/files.py",
        "    number = 1\n    while os.path.lexists",
        "    number = 1\n    while False and os.path.lexists",
        ("test_files.py",),
    ),
    Mutant(
        "damage_of_content_is_not_seen", "s2/files.py",
        'if checksums and "xxh3_128" in was and checksum(path) != was["xxh3_128"]:',
        'if checksums and "xxh3_128" not in was and checksum(path) != was["xxh3_128"]:',
        ("test_files.py",),
    ),
    Mutant(
        "packages_without_metadata_have_no_version", "s2/versions.py",
        "with suppress(PackageNotFoundError):\n        return",
        "if True:\n        return",
        ("test_versions.py",),
    ),
    Mutant(
        "two_writers_hold_a_lock", "s2/locks.py",
        "fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        ("test_locks.py",),
    ),
    Mutant(
        "a_release_forgets_its_record", "s2/locks.py",
        "os.ftruncate(self._stream.fileno(), 0)",
        "os.fstat(self._stream.fileno())",
        ("test_locks.py",),
    ),
    Mutant(
        "a_lock_of_another_host_is_taken", "s2/locks.py",
        "return read_record(file) is not None\n    return False",
        "return False\n    return False",
        ("test_locks.py",),
    ),
    Mutant(
        "without_flock_a_holder_counts_as_dead", "s2/locks.py",
        "        return None\n    return True",
        "        return True\n    return True",
        ("test_locks.py",),
    ),
    Mutant(
        "what_stands_in_the_way_of_a_folder_is_refused", "s2/files.py",
        "if os.path.lexists(final) and kind_of(final) != kind:",
        "if os.path.lexists(final) and kind_of(final) == MARK:",
        ("test_files.py",),
    ),
    Mutant(
        "bad_input_ends_as_a_crash", "s2/ending.py",
        "return BAD_INPUT if isinstance(error, ValueError | OSError) else CRASH",
        "return BAD_INPUT if isinstance(error, OSError) else CRASH",
        ("test_ending.py",),
    ),
    Mutant(
        "an_override_of_a_list_takes_the_next_entry", "s2/recipe.py",
        "            index = int(part)\n",
        "            index = int(part) - 1\n",
        ("test_recipe.py",),
    ),
    Mutant(
        "yes_is_a_boolean", "s2/recipe.py",
        '("bool", r"true|false", "tf")',
        '("bool", r"true|false|no", "tfn")',
        ("test_recipe.py",),
    ),
)  # fmt: skip
