"""The built-in default source: the documentation that every machine with LightLM already has.

Several megabytes of English technical prose, read from the interpreter that runs LightLM: the docstrings of the
standard library, torch and numpy, and the language reference in `pydoc_data.topics`. Nothing is imported or executed:
source files are found by path and read with `ast`, so that torch costs no start-up time and no module of the standard
library opens a browser. Nothing is downloaded, and nothing is redistributed.
"""

import ast
import functools
import gc
import inspect
import itertools
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import partial
from importlib import metadata, util
from pathlib import Path

import xxhash

from lightlm.data.chat.conversation import ChatColumns
from lightlm.data.readers.texts import Unit, pack_strings
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError

PYDOCS = "pydocs"

PACKAGES = ("torch", "numpy")

# Calls whose string arguments are documentation of objects written in C: torch._torch_docs, numpy._core._add_newdocs.
DOC_CALLS = frozenset({"add_docstr", "add_docstr_all", "_add_docstr", "add_newdoc", "add_newdoc_for_scalar_type"})

# Folders that hold tests, generated code, vendored copies or tables rather than documentation to read.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor", "lib2to3"}
    | {"turtledemo", "encodings", "pydoc_data", "ensurepip", "_inductor", "_vendored_packages", "_numpy"}
)

MIN_DOCSTRING = 40  # characters; shorter ones ("Return self.") teach repetition
MIN_DOCUMENT = 400  # characters; less than a paragraph is not a document


class PydocsSource:
    """The documentation on this machine."""

    name = spec = PYDOCS
    description = "documentation of the Python standard library, torch and numpy on this machine"

    @property
    def revision(self) -> str:
        """The versions of the interpreter and of the packages, which determine the corpus."""
        return ", ".join([f"python {platform.python_version()}", *(f"{p} {metadata.version(p)}" for p in PACKAGES)])

    @property
    def fingerprint(self) -> str:
        return self.revision

    def units(self) -> Iterator[Unit]:
        yield Unit(PYDOCS, partial(pack_strings, pydocs_documents))


def open_pydocs(spec: str, text_column: str, row_filter: Filter | None) -> PydocsSource:
    """Return the source `pydocs`; see `lightlm.data.sources.base.Opener`."""
    if spec != PYDOCS:
        raise DataError(f"{spec}: {PYDOCS} has no configurations or revisions; write {PYDOCS}")
    if isinstance(text_column, ChatColumns):
        raise DataError(f"{PYDOCS} holds texts and no conversations; leave --format out")
    if row_filter is not None:
        raise DataError(f'--filter "{row_filter.text}": {PYDOCS} has no columns to judge')
    return PydocsSource()


@functools.cache
def pydocs_documents() -> tuple[str, ...]:
    """Return the documents of the corpus, one per module or language topic, in the order of the texts' hashes.

    That order mixes the packages, so that the first documents (on which a tokenizer is trained, or which `--max-tokens`
    keeps) are a fair sample of all. Parsing 70 MB of source takes half a minute, and training a tokenizer reads the
    documents twice, so they are cached.

    Raises DataError where the interpreter has no source files (a frozen or stripped installation).
    """
    seen: set[int] = set()
    gc.disable()  # for millions of syntax-tree nodes without cycles it took 22 s of 32
    try:
        texts = [_assemble(title, sections, seen) for title, sections in itertools.chain(_topics(), _modules())]
    finally:
        gc.enable()
    documents = [text for text in texts if len(text) >= MIN_DOCUMENT]
    if not documents:
        raise DataError(
            f"pydocs: no documentation found under {sysconfig.get_path('stdlib')}; this Python was installed without "
            "its source files. Prepare a text file or folder of your own instead: lightlm prepare-data PATH"
        )
    return tuple(sorted(documents, key=lambda text: (xxhash.xxh3_64_intdigest(text.encode()), text)))


def _assemble(title: str, sections: Iterator[tuple[str, str]], seen: set[int]) -> str:
    """Return one document: its title, then each section's heading and text; texts in `seen` are left out."""
    parts: list[str] = []
    for heading, raw in sections:
        text = _clean(raw)
        digest = xxhash.xxh3_64_intdigest(text.encode())
        if len(text) < MIN_DOCSTRING or digest in seen:
            continue
        seen.add(digest)
        parts.append(f"{heading}\n\n{text}" if heading else text)
    return "\n\n".join([title, *parts]) + "\n" if parts else ""


def _topics() -> Iterator[tuple[str, Iterator[tuple[str, str]]]]:
    """Yield the topics of the language reference (`help("while")`), from the dictionary in pydoc_data.topics."""
    path = Path(sysconfig.get_path("stdlib")) / "pydoc_data" / "topics.py"
    for node in ast.walk(_parse(path) or ast.Module([], [])):
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            text = _literal(value)
            if isinstance(key, ast.Constant) and isinstance(key.value, str) and text is not None:
                yield f"The Python language: {key.value}", iter([("", text)])


def _modules() -> Iterator[tuple[str, Iterator[tuple[str, str]]]]:
    """Yield the title and the sections of each module of the standard library, torch and numpy."""
    for package, root in _roots():
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            skipped = SKIPPED_FOLDERS.intersection(parts[:-1]) or parts[-1].startswith("test_")
            if not skipped and (tree := _parse(path)) is not None:
                name = ".".join((*package, *(part for part in parts if part != "__init__")))
                yield f"Module {name}", itertools.chain([("", ast.get_docstring(tree) or "")], _members(tree.body, ""))


def _roots() -> list[tuple[tuple[str, ...], Path]]:
    """Return the folders to read, each with its module name; nothing is imported."""
    roots: list[tuple[tuple[str, ...], Path]] = [((), Path(sysconfig.get_path("stdlib")))]
    specs = [util.find_spec(package) for package in PACKAGES]
    return roots + [((spec.name,), Path(spec.origin).parent) for spec in specs if spec and spec.origin]


def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file; None if this interpreter cannot read it (a template, another version)."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in docstrings
            return ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return None


def _members(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (heading, text) of each documented class, function and doc-adding call, in order."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{prefix}{node.name}"
            heading = f"class {name}" if isinstance(node, ast.ClassDef) else f"{name}({_arguments(node.args)})"
            yield heading, ast.get_docstring(node) or ""
            if isinstance(node, ast.ClassDef):
                yield from _members(node.body, f"{name}.")
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _doc_call(node.value)
        elif isinstance(node, ast.If | ast.Try):
            yield from _members(node.body, prefix)


def _arguments(args: ast.arguments) -> str:
    """Return the parameter names as in a signature, without defaults and annotations."""
    stars = [f"*{args.vararg.arg}"] if args.vararg else []
    double_stars = [f"**{args.kwarg.arg}"] if args.kwarg else []
    plain, keywords = ([arg.arg for arg in group] for group in (args.posonlyargs + args.args, args.kwonlyargs))
    return ", ".join(name for name in plain + stars + keywords + double_stars if name not in {"self", "cls"})


def _doc_call(call: ast.Call) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of a call like `add_docstr(torch.abs, r\"\"\"...\"\"\")`; see `DOC_CALLS`."""
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if function not in DOC_CALLS or len(call.args) < 2:
        return
    *owner, last = call.args
    name = ".".join(_literal(part) or ast.unparse(part) for part in owner)
    for text in _strings(last):
        yield name, inspect.cleandoc(text)


def _strings(node: ast.expr) -> Iterator[str]:
    """Yield the texts in the last argument: a literal, a literal.format(...), or ("method", literal) pairs."""
    text = _literal(node)
    if text is not None:
        yield text
    elif isinstance(node, ast.Tuple) and node.elts:
        yield from _strings(node.elts[-1])
    elif isinstance(node, ast.List):
        for element in node.elts:
            yield from _strings(element)


def _literal(node: ast.expr) -> str | None:
    """Return the value of a string literal, a sum of them, or `literal.format(...)` with the fields left in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_literal(node.left) or "") + (_literal(node.right) or "") or None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _literal(node.func.value)
    return None


_FIELD_LINE = re.compile(r"^\s*\{\w+\}\s*$")  # a str.format field on a line of its own: text kept elsewhere
_RULE_LINE = re.compile(r"^\s*[-=~+|*#^_ ]{6,}\s*$")  # underlines and table borders
_DATA_LINE = re.compile(r"\S{120}")  # not English: base64, hexadecimal, packed tables
_LICENSE = re.compile(r"copyright|permission is hereby granted|licen[cs]ed? (under|to)|all rights reserved", re.I)


def _clean(text: str) -> str:
    """Return readable text: no trailing blanks, table borders, data lines, unfilled fields or license paragraphs."""
    text = text.encode("utf-8", "replace").decode()  # a docstring about surrogates may hold half of a pair
    lines = [line.rstrip().expandtabs() for line in text.splitlines()]
    kept = [
        line for line in lines if not (_FIELD_LINE.match(line) or _RULE_LINE.match(line) or _DATA_LINE.search(line))
    ]
    paragraphs = re.split(r"\n{2,}", "\n".join(kept).strip("\n"))
    return "\n\n".join(part for part in paragraphs if not _LICENSE.search(part) and _is_prose(part))


def _is_prose(paragraph: str) -> bool:
    """Return whether at least half of a long paragraph's visible characters are letters, unlike in a table."""
    visible = re.sub(r"\s", "", paragraph)
    return len(visible) < 200 or sum(map(str.isalpha, visible)) >= len(visible) / 2
