"""Files and folders that are written whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

from crosslm.errors import RunError
from crosslm.runs.rundir import METRICS, RunDir
from crosslm.support import files
from crosslm.support.files import ASIDE, clear_partial, made_beside, replace_folder
from crosslm.support.writing import made_anew


def written(text):
    def write(folder):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "weights").write_text(text)

    return write


def found(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_takes_the_place_of_another_with_all_its_bytes_on_the_disk(tmp_path, monkeypatch):
    target, done = tmp_path / "models" / "north", []
    replace_folder(target, written("first"))

    def told(owner, name, what):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: done.append(what(*given)) or function(*given))

    told(files, "sync", lambda path: f"sync {path.name}")
    told(Path, "rename", lambda path, new: f"{path.name} -> {new.name}")
    told(Path, "replace", lambda path, new: f"{path.name} -> {new.name}")
    replace_folder(target, written("second"))
    assert found(tmp_path) == {"models/north/deep/weights": "second"}
    assert set(done[:3]) == {"sync weights", "sync deep", "sync north.partial"}
    assert done[3:] == [f"north -> north{ASIDE}", "north.partial -> north", "sync models"]


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_folder_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch, fails):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def half(folder):
        written("half")(folder)
        full()

    target = tmp_path / "north"
    replace_folder(target, written("first"))
    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(files, "sync", full)
        if fails == "replace":
            patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            replace_folder(target, half if fails == "write" else written("second"))
    assert found(tmp_path) == {"north/deep/weights": "first"}


@pytest.mark.parametrize("is_named", [False, True])
def test_what_a_process_left_that_was_killed_in_between_is_put_right(tmp_path, is_named):
    """Killed before the new folder had its name the old one is put back; killed after it the old one is deleted."""
    written("old")(tmp_path / "slm" / f"north{ASIDE}")
    written("new")(tmp_path / "slm" / ("north" if is_named else "north.partial"))
    (tmp_path / "synthetic.partial").write_text("half")
    clear_partial(tmp_path)
    assert found(tmp_path) == {"slm/north/deep/weights": "new" if is_named else "old"}


def test_the_next_folder_of_that_name_puts_it_right_too(tmp_path):
    def fails(folder):
        raise RuntimeError("no weights")

    written("old")(tmp_path / f"north{ASIDE}")
    with pytest.raises(RuntimeError):
        replace_folder(tmp_path / "north", fails)
    assert found(tmp_path) == {"north/deep/weights": "old"}


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
@pytest.mark.parametrize("is_locked_first", [False, True])
def test_a_new_run_folder_is_its_owners_alone_and_another_keeps_its_rights(config, tmp_path, is_locked_first):
    def made(path):
        if is_locked_first:  # as a run does it
            with RunDir(path).locked():
                RunDir.create(path, config)
        else:
            RunDir.create(path, config)
        return path.stat().st_mode & 0o777

    assert made(tmp_path / "runs" / "tickets-1") == 0o700
    assert (tmp_path / "runs").stat().st_mode & 0o777 == 0o755
    (tmp_path / "shared").mkdir(mode=0o750)
    assert made(tmp_path / "shared") == 0o750


@pytest.mark.usefixtures("usual_umask")
def test_a_folder_made_beside_another_has_a_name_that_nothing_has(tmp_path):
    mine = tmp_path / "out.partial"
    mine.mkdir()
    with made_beside(tmp_path / "out") as work:
        (work / "a").write_text("whole")
        assert not (tmp_path / "out").exists()
    assert found(tmp_path) == {"out/a": "whole"}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    with pytest.raises(RuntimeError), made_beside(tmp_path / "other"):
        raise RuntimeError("half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_events_are_on_the_disk_before_a_checkpoint_counts_them(tmp_path, monkeypatch):
    run, synced = RunDir(tmp_path), []
    run.event("note", message="x")
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor)))
    assert run.keep_events() == (tmp_path / METRICS).stat().st_size
    assert [file.st_ino for file in synced] == [(tmp_path / METRICS).stat().st_ino]


def test_a_folder_that_cannot_be_made_anew_is_named_and_what_fails_in_it_is_not_put_down_to_it(tmp_path):
    (tmp_path / "file").write_text("")
    target, hint = tmp_path / "file" / "new", "or name another --output"
    with (
        pytest.raises(RunError, match=f"{target}: cannot be written: .*; make it writable, {hint}"),
        made_anew(target, hint),
    ):
        pytest.fail("made")
    with pytest.raises(FileNotFoundError), made_anew(tmp_path / "new", hint) as work:
        (work / "none").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
