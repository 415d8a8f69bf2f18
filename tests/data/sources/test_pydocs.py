"""The embedded source, on a small stand-in for the interpreter's own files (reading those takes ten seconds)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lightlm.data.sources import pydocs
from lightlm.errors import DataError

PROSE = "This sentence is long enough to be kept, since it explains at length what the object before it is good for. "


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(pydocs, "_roots", lambda: [((), tmp_path)])
    monkeypatch.setattr(pydocs, "_topics", lambda: iter([]))
    pydocs.pydocs_documents.cache_clear()
    yield tmp_path
    pydocs.pydocs_documents.cache_clear()


def test_a_module_becomes_one_document_with_headings(library: Path) -> None:
    (library / "package").mkdir()
    (library / "package" / "module.py").write_text(
        f'"""The module. {PROSE * 3}"""\n'
        "import nothing_that_exists\n"
        "raise SystemExit('documentation must be read without running the module')\n"
        f'class Thing:\n    """A thing. {PROSE}"""\n'
        f'    def work(self, amount, *rest, fast=True):\n        """Work.\n\n        {PROSE}\n        """\n'
        f'add_docstr(torch.abs, r"""The magnitude. {PROSE}\n\n======  ======\n{{input}}\n""".format(**common))\n',
        encoding="utf-8",
    )
    (document,) = pydocs.pydocs_documents()
    assert document.startswith("Module package.module\n\nThe module.")
    assert "\n\nclass Thing\n\nA thing." in document
    assert f"\n\nThing.work(amount, *rest, fast)\n\nWork.\n\n{PROSE.strip()}" in document
    assert "\n\ntorch.abs\n\nThe magnitude." in document
    assert "====" not in document
    assert "{input}" not in document


def test_repeats_tests_stubs_and_broken_modules_are_left_out(library: Path) -> None:
    unique = "".join(f"Sentence number {n} is found nowhere else in the library. " for n in range(9))
    (library / "a.py").write_text(f'"""Of a. {unique}"""\ndef f():\n    """{PROSE}"""\n', encoding="utf-8")
    (library / "b.py").write_text(f'"""Of b. {unique}"""\ndef g():\n    """{PROSE}"""\n', encoding="utf-8")
    (library / "short.py").write_text('"""Too short."""\n', encoding="utf-8")
    (library / "broken.py").write_text(f'"""{unique}"""\ndef (:\n', encoding="utf-8")
    (library / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    (library / "tests").mkdir()
    (library / "tests" / "a.py").write_text(f'"""Of a test. {unique}"""\n', encoding="utf-8")
    documents = pydocs.pydocs_documents()
    assert sorted(document.splitlines()[0] for document in documents) == ["Module a", "Module b"]
    assert "".join(documents).count(PROSE.strip()) == 1
    pydocs.pydocs_documents.cache_clear()
    assert documents == pydocs.pydocs_documents()


def test_licences_tables_and_lone_surrogates_are_cleaned() -> None:
    table = "\n".join("0x1f, 0x8b, 0x08, 0x00, 0x00, 0x12, 0x99, 0x75, 0x31" for _ in range(9))
    text = f"{PROSE}\n\nCopyright (c) 2001 Somebody.\nAll rights reserved.\n\n{table}\n\nThe end \ud800."
    assert pydocs._clean(text) == f"{PROSE.strip()}\n\nThe end ?."


def test_an_interpreter_without_sources_says_what_to_do(library: Path) -> None:
    with pytest.raises(DataError, match=r"no documentation found.*lightlm prepare-data PATH"):
        pydocs.pydocs_documents()


def test_the_real_interpreter_has_the_places_that_are_read() -> None:
    """The language topics and the packages' folders are found, without reading them all."""
    titles = [title for title, _ in pydocs._topics()]
    assert "The Python language: while" in titles
    assert {package for package, _ in pydocs._roots()} == {(), ("torch",), ("numpy",)}
    assert "torch" in pydocs.PydocsSource().revision
