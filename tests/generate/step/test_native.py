"""Where nothing can be compiled, torch's operations do the work; what was compiled is used again."""

import os
import shutil
import stat
import subprocess
import sys
import time

import pytest
import torch

from lightlm.generate.step import native
from lightlm.generate.step.fast import FastForward
from tests.shapes import build

COMPILER = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


@pytest.fixture
def library(monkeypatch, tmp_path):
    """The function, with an empty cache and the compiler under a name of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if COMPILER:
        monkeypatch.setenv("CC", COMPILER)
    return native.library.__wrapped__


def kept(tmp_path):
    return sorted((tmp_path / "cache/lightlm").iterdir())


def script(tmp_path, monkeypatch, text):
    path = tmp_path / "cc"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CC", str(path))


@needs_compiler
def test_it_is_compiled_once(library, tmp_path, monkeypatch):
    assert library() is not None
    [file] = kept(tmp_path)
    written = file.stat().st_mtime_ns
    assert library() is not None
    assert [each.stat().st_mtime_ns for each in kept(tmp_path)] == [written]
    script(tmp_path, monkeypatch, "exit 1")
    assert library() is None  # another compiler


@needs_compiler
def test_a_damaged_file_is_replaced(library, tmp_path):
    library()
    [file] = kept(tmp_path)
    file.unlink()
    file.write_bytes(b"not a library")
    assert library() is not None
    assert len(file.read_bytes()) > 1000


@needs_compiler
def test_a_library_that_was_cut_off_is_replaced(library, tmp_path):
    """Loading it would end the process by a bus error."""
    library()
    [file] = kept(tmp_path)
    whole = file.read_bytes()
    file.unlink()
    file.write_bytes(whole[: len(whole) // 2])
    assert library() is not None
    assert len(file.read_bytes()) == len(whole)
    assert kept(tmp_path) == [file]


@needs_compiler
def test_where_files_cannot_be_executed_it_is_compiled_in_a_temporary_folder(library, tmp_path, monkeypatch):
    load = native._load

    def refuse(path):
        if path.is_relative_to(tmp_path / "cache"):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(native, "_load", refuse)
    assert library() is not None


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
def test_a_compiler_that_hangs_is_ended_with_what_it_started(library, tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, f"echo >> {tmp_path}/calls; sleep 60 & echo $! > {tmp_path}/child; wait")
    monkeypatch.setattr(native, "_SECONDS", 0.5)
    started = time.monotonic()
    assert library() is None
    assert time.monotonic() - started < 30
    assert len((tmp_path / "calls").read_text()) == 1
    assert kept(tmp_path) == []


@needs_compiler
def test_without_a_cache_folder_it_is_compiled_in_a_temporary_one(library, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library() is not None


@needs_compiler
def test_a_compiler_that_knows_no_processor_compiles_for_any(library, tmp_path, monkeypatch):
    script(tmp_path, monkeypatch, f'case "$*" in *native\\ *) exit 1;; esac; exec {COMPILER} "$@"')
    assert library() is not None


@pytest.mark.skipif(os.name == "nt", reason="shell scripts")
@pytest.mark.parametrize("text", ["exit 1", "exit 0", 'for last; do :; done; echo broken > "$last"'])
def test_a_compiler_that_fails_leaves_torch(library, tmp_path, monkeypatch, text):
    script(tmp_path, monkeypatch, text)
    assert library() is None


@pytest.mark.parametrize("name", ["CC", "PATH"])
def test_without_a_compiler_torch_computes(library, monkeypatch, name):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv(name, "/nowhere")
    assert library() is None
    monkeypatch.setattr("lightlm.generate.step.program.library", library)
    model, tokens_BT = build("llama"), torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        expected_BTV = model(tokens_BT)
    torch.testing.assert_close(FastForward(model)(tokens_BT, model.new_cache(1)), expected_BTV, atol=5e-5, rtol=1e-4)


def test_the_environment_turns_it_off(library, monkeypatch):
    monkeypatch.setenv("LIGHTLM_NATIVE", "0")
    assert library() is None


def test_a_quote_without_an_end_leaves_torch(library, monkeypatch):
    monkeypatch.setenv("CC", 'gcc "')
    assert library() is None


@needs_compiler
def test_only_linux_compiles_unasked(library, monkeypatch):
    monkeypatch.setattr(native.sys, "platform", "darwin")
    assert library() is None
    monkeypatch.setenv("LIGHTLM_NATIVE", "1")
    assert library() is not None


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_computes_with_one_thread():
    """GNU's OpenMP would wait for threads that a fork does not copy."""
    code = (
        "import os, torch; from lightlm.generate.step.program import multiplication; torch.set_num_threads(2);"
        "run = lambda: multiplication([torch.ones(64, 64)])(); run(); child = os.fork();"
        "run(); os._exit(0) if not child else os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 0
