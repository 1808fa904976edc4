"""A file is there whole, or it is not there."""

import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from esmflow import files
from esmflow.failures import Failure, Reason, one_line, read_failures, write_failures
from esmflow.files import (
    LEFT_OVER_SECONDS,
    atomic_folder,
    atomic_path,
    file_sha256,
    read_json,
    remove_left_overs,
    stats_below,
    write_json,
)


def test_the_target_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "target.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == tmp_path
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(tmp_path) == ["target.txt"]


def test_an_error_leaves_nothing_behind_and_the_old_file_in_place(tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("old")
    with pytest.raises(TypeError), atomic_path(target) as temporary, open(temporary, "w") as handle:
        handle.writelines(["ha", None])
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["target.txt"]


def test_a_killed_writer_leaves_the_old_file_in_place(tmp_path):
    target = tmp_path / "target.txt"
    target.write_text("old")
    code = (
        "import os, sys; from esmflow.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('ha'); os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(files.__file__).rsplit("/", 2)[0]}
    ended = subprocess.run([sys.executable, "-c", code, str(target)], env=environment)
    assert ended.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    (left,) = set(os.listdir(tmp_path)) - {"target.txt"}
    of_others = [f".target.{left[-13:]}", ".target.txt.mine.part", f".target.txt{left[-13:-5]}"]
    for name in of_others:
        (tmp_path / name).touch()
    remove_left_overs([target], LEFT_OVER_SECONDS)
    assert (tmp_path / left).exists()
    remove_left_overs([target])
    assert set(os.listdir(tmp_path)) == {"target.txt", *of_others}


def test_a_reader_never_sees_a_part_of_a_file(tmp_path):
    target = tmp_path / "target.txt"
    write_json(target, ["a"] * 20_000)
    seen, stop = set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(len(read_json(target)))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        write_json(target, ["b"] * 20_000)
    stop.set()
    reader.join()
    assert seen == {20_000}


def test_writers_of_one_target_do_not_disturb_each_other(tmp_path):
    target = tmp_path / "target.txt"
    with atomic_path(target) as first, atomic_path(target) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["target.txt"]


def test_folders_that_are_missing_are_made(tmp_path):
    write_json(tmp_path / "a" / "b" / "c.json", {"x": 1})
    assert read_json(tmp_path / "a" / "b" / "c.json") == {"x": 1}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_a_file_has_the_permissions_of_any_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_json(tmp_path / "ours.json", {})
        (tmp_path / "plain.json").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "ours.json").stat().st_mode) == 0o666 & ~mask
    assert (tmp_path / "ours.json").stat().st_mode == (tmp_path / "plain.json").stat().st_mode


@pytest.mark.parametrize("letter", ["n", "é", "蛋"])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path, letter):
    name = letter * (255 // len(letter.encode()))
    with atomic_path(tmp_path / name) as temporary:
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == [name]


def test_what_a_folder_takes_is_that_of_everything_in_it_and_no_link_is_followed(tmp_path):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "a").write_bytes(b"12345")
    (tmp_path / "folder" / "inner" / "b").write_bytes(b"123")
    (tmp_path / "folder" / "link").symlink_to(tmp_path)
    found = list(stats_below(tmp_path / "folder"))
    assert len(found) == 5
    assert sum(each.st_size for each in found if stat.S_ISREG(each.st_mode)) == 8
    assert [each.st_size for each in stats_below(tmp_path / "folder" / "a")] == [5]
    assert list(stats_below(tmp_path / "none")) == []


# A folder is there whole, or it is not there.


def make_folder(target, content="whole"):
    with atomic_folder(target) as temporary:
        (temporary / "file").write_text(content)
        assert temporary.parent == target.parent
        assert not (target / "file").exists() or (target / "file").read_text() != content


def test_a_folder_appears_only_when_the_block_ends_and_replaces_the_one_before(tmp_path):
    target = tmp_path / "target"
    make_folder(target, "old")
    (target / "more").write_text("of the old one")
    make_folder(target, "new")
    assert os.listdir(target) == ["file"]
    assert (target / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["target"]


def test_an_error_in_a_folder_leaves_nothing_behind_and_the_old_one_in_place(tmp_path):
    target = tmp_path / "target"
    make_folder(target, "old")
    with pytest.raises(TypeError), atomic_folder(target) as temporary, open(temporary / "file", "w") as handle:
        handle.writelines(["ha", None])
    assert (target / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_a_killed_writer_of_a_folder_leaves_the_old_one_in_place(tmp_path):
    target = tmp_path / "target"
    make_folder(target, "old")
    code = (
        "import os, sys; from esmflow.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as temporary:\n"
        "    (temporary / 'file').write_text('ha'); os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(files.__file__).rsplit("/", 2)[0]}
    ended = subprocess.run([sys.executable, "-c", code, str(target)], env=environment)
    assert ended.returncode == -signal.SIGKILL
    assert (target / "file").read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["target"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_a_folder_has_the_permissions_of_any_new_folder(tmp_path, mask):
    before = os.umask(mask)
    try:
        make_folder(tmp_path / "ours")
        (tmp_path / "plain").mkdir()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == 0o777 & ~mask
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_in_folders_that_are_missing_and_with_a_long_name_is_made(tmp_path):
    target = tmp_path / "a" / ("n" * 255)
    make_folder(target)
    assert os.listdir(target.parent) == [target.name]


def test_a_digest_is_that_of_the_content(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


# The ledger


def test_a_ledger_reads_as_it_was_written(tmp_path):
    failures = [Failure(f"{n:032x}", reason, f'detail "{n}" of naïve') for n, reason in enumerate(Reason)]
    write_failures(tmp_path / "failures.tsv", failures)
    assert read_failures(tmp_path / "failures.tsv") == failures


def test_a_detail_of_many_lines_becomes_one_line_of_the_ledger(tmp_path):
    failure = Failure("ab", Reason.WORKER_ERROR, "Traceback\n  File\t\"x\"\r\n\nRuntimeError: 'y'")
    write_failures(tmp_path / "failures.tsv", [failure, failure])
    assert len((tmp_path / "failures.tsv").read_text().splitlines()) == 3
    assert [f.detail for f in read_failures(tmp_path / "failures.tsv")] == [one_line(failure.detail)] * 2
    assert one_line(failure.detail) == "Traceback File \"x\" RuntimeError: 'y'"


def test_an_empty_ledger_has_its_header(tmp_path):
    write_failures(tmp_path / "failures.tsv", [])
    assert (tmp_path / "failures.tsv").read_text() == "digest\treason\tdetail\n"
    assert read_failures(tmp_path / "failures.tsv") == []
