"""Data sets on the Hub, read through the real client libraries from a loopback server that fails on order."""

import gzip
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet as parquet
import pytest

from lightlm.data.chat.conversation import CHAT, ChatColumns
from lightlm.data.readers import parquet as footers
from lightlm.data.readers.texts import Unit
from lightlm.data.select.filters import Filter
from lightlm.data.sources.hub import files as hub_files
from lightlm.data.sources.hub.client import HubError, persistently
from lightlm.data.sources.registry import open_source
from lightlm.errors import DataError, LightLMError
from tests.corpus import read_unit
from tests.data.sources.test_local import write_parquet
from tests.hub import Fault, Hub, Repository
from tests.hub_data import DOCUMENTS, REPO, make_fineweb_edu, read, source


def row_groups(files: int, groups: int) -> list[str]:
    return [
        f"sample/10BT/{file:03d}_00000.parquet#row_group={group}" for file in range(files) for group in range(groups)
    ]


def test_the_sample_is_read_in_order_by_row_groups_at_one_commit(hub: Hub, fineweb_edu: Path) -> None:
    commit = hub.add(REPO, fineweb_edu)
    opened = source()
    units = list(opened.units())
    assert [unit.id for unit in units] == row_groups(3, 3) == [unit.id for unit in source().units()]
    restored: list[Unit] = pickle.loads(pickle.dumps(units))
    assert [text for unit in restored for text in read_unit(unit)] == DOCUMENTS
    assert opened.revision == commit
    assert (opened.name, opened.spec) == ("fineweb-edu", f"hf:{REPO}:sample-10BT")
    # Each row group is one request, and of the repository nothing is looked at but what the configuration names.
    contents = [r for r in hub.requests if "/cdn/" in r.path]
    assert len(contents) == 3 + 9  # and a footer a file, kept from then on
    assert all("sample/10BT" in r.path for r in contents)
    assert not any(re.search("/tree/[^/]+/data", r.path) for r in hub.requests)


@pytest.mark.parametrize(
    ("spec", "first", "name"),
    [
        ("fineweb-edu:100BT", f"sample-100BT {DOCUMENTS[0]}", "fineweb-edu-100BT"),
        ("fineweb-edu:full", f"2013 {DOCUMENTS[0]}", "fineweb-edu-full"),
        ("fineweb-edu:CC-MAIN-2013-20", f"2013 {DOCUMENTS[0]}", "fineweb-edu-CC-MAIN-2013-20"),
        (f"hf:{REPO}", f"2013 {DOCUMENTS[0]}", "fineweb-edu"),
        (f"hf:{REPO}:sample-10BT@v1", DOCUMENTS[0], "fineweb-edu-sample-10BT"),
    ],
)
def test_configurations_and_revisions(hub: Hub, fineweb_edu: Path, spec: str, first: str, name: str) -> None:
    hub.add(REPO, fineweb_edu)
    hub.add(REPO, fineweb_edu, branch="v1")
    opened = source(spec)
    assert next(iter(read_unit(next(opened.units())))) == first
    assert opened.name == name


FAULTS = [
    Fault("status", r"GET /api/datasets/.*/revision/main", times=2, status=503),
    Fault("status", "GET .*README", times=2),
    Fault("status", "HEAD .*README", times=2),
    Fault("close", r"/api/datasets/.*/revision/main"),
    Fault("drop", r"/paths-info/", times=3),
    Fault("status", r"/resolve/.*10BT", times=4, status=429),
    Fault("status", r"/cdn/", times=4, status=500),
    Fault("status", r"/cdn/.*001_00000", times=2, status=504),
    Fault("drop", r"/cdn/.*002_00000", times=4),
    Fault("close", r"/cdn/.*000_00000", times=4),
    Fault("slow", r"/cdn/.*001_00000", seconds=1.0),
    Fault("short", r"/cdn/.*001_00000", times=3),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f.kind}-{f.status}-{f.match}")
def test_a_fault_that_passes_changes_nothing(hub: Hub, fineweb_edu: Path, fault: Fault) -> None:
    hub.add(REPO, fineweb_edu)
    hub.faults.append(Fault(**vars(fault)))
    assert read(source()) == DOCUMENTS
    assert hub.faults[0].times == 0  # it did happen


def test_a_line_that_drops_repeatedly_costs_single_requests_and_repeats_no_document(
    hub: Hub, fineweb_edu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_files, "REQUEST_BYTES", 20_000)
    hub.add(REPO, fineweb_edu)
    answered = 0

    def every_third(line: str) -> None:
        nonlocal answered
        answered += "/cdn/" in line
        if "/cdn/" in line and answered % 3 == 0:
            hub.faults.append(Fault("drop", "/cdn/"))

    hub.before_request = every_third
    assert read(source()) == DOCUMENTS
    ranges = [tuple(map(int, re.findall(r"\d+", r.range or ""))) for r in hub.requests if "/cdn/" in r.path]
    assert len(ranges) > 30
    assert all(end - start < 20_000 for start, end in ranges)


@pytest.mark.parametrize(
    ("kind", "reason"), [("status", "500"), ("drop", "peer closed connection"), ("slow", "timed out")]
)
def test_a_fault_that_stays_ends_in_one_message(hub: Hub, fineweb_edu: Path, kind: str, reason: str) -> None:
    hub.add(REPO, fineweb_edu)
    units = list(source().units())
    hub.clear()
    hub.faults.append(Fault(kind, r"/cdn/.*001_00000", times=99, seconds=0.8))  # type: ignore[arg-type]
    assert len(list(read_unit(units[2]))) == 10
    with pytest.raises(HubError, match=f"Reading {REPO}/sample/10BT/001_00000.parquet .*failed 5 times.*{reason}"):
        list(read_unit(units[3]))
    assert sum("001_00000" in r.path and "/cdn/" in r.path for r in hub.requests) == 5 or kind == "slow"


def test_what_is_refused_is_asked_for_once(hub: Hub, fineweb_edu: Path) -> None:
    hub.add(REPO, fineweb_edu)
    units = list(source().units())
    hub.clear()
    hub.faults.append(Fault("status", "/resolve/|/cdn/", times=99, status=403))
    with pytest.raises(HubError, match=r"refuses access to HuggingFaceFW/fineweb-edu.*hf auth login"):
        list(read_unit(units[0]))
    assert len(hub.requests) == 2  # the address of the content, which may have expired, and the Hub


def test_the_hub_is_asked_once_for_a_files_address_and_again_when_that_expires(hub: Hub, fineweb_edu: Path) -> None:
    hub.add(REPO, fineweb_edu)
    units = list(source().units())
    asked = [r.path for r in hub.requests if r.path.endswith(".parquet") and "/resolve/" in r.path]
    assert len(asked) == 3
    hub.clear()
    hub.faults.append(Fault("status", "/cdn/.*001_0", status=403))
    assert [text for unit in units for text in read_unit(unit)] == DOCUMENTS
    assert ["001_0" in r.path for r in hub.requests if "/resolve/" in r.path] == [True]


def test_a_later_run_fetches_what_is_missing(hub: Hub, fineweb_edu: Path) -> None:
    hub.add(REPO, fineweb_edu)
    done = [unit.id for unit in source().units()][:7]
    footers._footer.cache_clear()
    hub.clear()
    rest = [text for unit in source().units() if unit.id not in done for text in read_unit(unit)]
    assert rest == DOCUMENTS[-20:]
    fetched = [r for r in hub.requests if "/cdn/" in r.path]
    assert len(fetched) == 3 + 2  # three footers, two row groups
    assert [r.sent for r in fetched if "002_" not in r.path] == [65536, 65536]


def test_a_branch_that_moves_is_not_followed(hub: Hub, fineweb_edu: Path, tmp_path: Path) -> None:
    before = hub.add(REPO, fineweb_edu)
    other = make_fineweb_edu(tmp_path / "other", [f"new {text}" for text in DOCUMENTS], files=4)
    opened = source()
    moved = False

    def move(line: str) -> None:
        nonlocal moved
        if "/cdn/" in line and "001_00000" in line and not moved:
            moved = True
            hub.add(REPO, other)

    hub.before_request = move
    assert read(opened) == DOCUMENTS
    assert moved
    assert opened.revision == before
    assert read(source().at_revision(before)) == DOCUMENTS  # a resumed run, which knows the commit
    assert read(source())[0] == f"new {DOCUMENTS[0]}"


def test_a_branch_that_moves_during_the_look_up_gives_one_version(hub: Hub, fineweb_edu: Path, tmp_path: Path) -> None:
    commits = [hub.add(REPO, fineweb_edu)]
    other = make_fineweb_edu(tmp_path / "other", DOCUMENTS[:40], files=1)

    def move(line: str) -> None:
        if "README" in line and len(commits) == 1:
            commits.append(hub.add(REPO, other))

    hub.before_request = move
    opened = source()
    assert read(opened) == DOCUMENTS
    assert opened.revision == commits[0] != commits[1]


def test_content_that_changes_under_a_commit_is_noticed(hub: Hub, fineweb_edu: Path) -> None:
    commit = hub.add(REPO, fineweb_edu)
    units = list(source().units())
    files = hub.repositories[f"datasets/{REPO}"].commits[commit]
    files["sample/10BT/001_00000.parquet"] += b"more"
    with pytest.raises(HubError, match=r"001_00000\.parquet has .* bytes at commit .*If HF_ENDPOINT is a mirror"):
        list(read_unit(units[3]))


def test_another_commits_content_of_the_same_size_is_noticed(
    hub: Hub, fineweb_edu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, other = hub.add(REPO, fineweb_edu), "f" * 40
    units = list(source().units())
    commits = hub.repositories[f"datasets/{REPO}"].commits
    commits[other] = dict(commits[commit])
    monkeypatch.setattr(Repository, "commit_of", lambda *_: other)
    monkeypatch.setattr("lightlm.data.sources.hub.files._locations", {})  # the addresses that the footers came from
    with pytest.raises(HubError, match=f"served .* bytes of commit {other}"):
        list(read_unit(units[3]))


def test_a_filter_fetches_no_row_group_that_holds_nothing_for_it(hub: Hub, tmp_path: Path) -> None:
    rows = [{"text": text, "score": number // 10} for number, text in enumerate(DOCUMENTS)]
    folder = tmp_path / "corpus"
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=10, compression="none")
    hub.add("some/corpus", folder)
    units = list(open_source("hf:some/corpus", "text", Filter("score in [2, 7]")).units())
    hub.clear()
    rejected: list[DataError] = []
    found = [text for unit in units for texts in unit.texts(rejected.append) for text in texts.array.to_pylist()]
    assert found == DOCUMENTS[20:30] + DOCUMENTS[70:80]
    assert sum(error.records for error in rejected) == 70  # type: ignore[attr-defined]
    assert sum("/cdn/" in r.path for r in hub.requests) <= 2 * 2  # the columns of two row groups of nine


def test_rows_that_datasets_streams_are_filtered(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = "".join(f"document {n},{n % 3}\n" for n in range(30))
    (folder / "a.csv").write_text(f"text,score\n{lines}", encoding="utf-8")
    hub.add("some/corpus", folder)
    opened = open_source("hf:some/corpus", "text", Filter("score >= 2"))
    rejected: list[DataError] = []
    found = [t for unit in opened.units() for texts in unit.texts(rejected.append) for t in texts.array.to_pylist()]
    assert found == [f"document {n}" for n in range(2, 30, 3)]
    assert sum(error.records for error in rejected) == 20  # type: ignore[attr-defined]


def test_a_bad_row_that_datasets_streams_leaves_the_others(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    (folder / "a.csv").write_text("prompt,completion\nA?,B\n,D\nE?,F\n", encoding="utf-8")
    hub.add("some/chats", folder)
    rejected: list[DataError] = []
    units = open_source("hf:some/chats", ChatColumns(CHAT)).units()
    found = [text for unit in units for texts in unit.texts(rejected.append) for text in texts.array.to_pylist()]
    assert ["A?" in found[0], "E?" in found[1]] == [True] * len(found)
    assert ["some/chats/a.csv, row 2" in str(error) for error in rejected] == [True]


def test_a_data_set_without_a_readme_is_read_file_by_file(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "corpus" / "data"
    folder.mkdir(parents=True)
    write_parquet(folder / "train-00000-of-00002.parquet", ["one", "two", None])
    write_parquet(folder / "train-00001-of-00002.parquet", ["three"])
    hub.add("some-org/corpus", tmp_path / "corpus")
    opened = source("hf:some-org/corpus")
    assert read(opened) == ["one", "two", "three"]
    assert [unit.id for unit in opened.units()] == [
        "data/train-00000-of-00002.parquet#row_group=0",
        "data/train-00000-of-00002.parquet#row_group=1",
        "data/train-00001-of-00002.parquet#row_group=0",
    ]
    with pytest.raises(DataError, match="no column 'body'; there are: id, text"):
        read(source("hf:some-org/corpus", "body"))
    with pytest.raises(DataError, match=r"corpus.*: the column 'id' holds int64, not text"):
        read(source("hf:some-org/corpus", "id"))
    with pytest.raises(DataError, match=r"cannot be opened: .*nonesuch"):
        read(source("hf:some-org/corpus:nonesuch"))


def test_a_mirror_without_ranges_is_read(hub: Hub, fineweb_edu: Path) -> None:
    hub.add(REPO, fineweb_edu)
    hub.ranges = False
    assert read(source()) == DOCUMENTS


def gate(hub: Hub) -> None:
    hub.repositories[f"datasets/{REPO}"].gated = True


def lock_readme(hub: Hub) -> None:
    """Taken for a repository without a README, it would be read with all its files."""
    hub.faults.append(Fault("status", "README", times=99, status=403))


def script(hub: Hub) -> None:
    commit = hub.repositories[f"datasets/{REPO}"].branches["main"]
    files = hub.repositories[f"datasets/{REPO}"].commits[commit]
    files["fineweb-edu.py"] = b"print()"


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        ("hf:some/thing", None, r"no data set 'some/thing' on the Hub, or it is private\. .*hf auth login"),
        ("fineweb-edu:nope", None, r"no configuration 'nope'; there are: default, sample-10BT, sample-100BT, CC-MAIN"),
        ("fineweb-edu@v9", None, r"no branch, tag or commit 'v9'\. There are: main\."),
        ("fineweb-edu", lock_readme, r"refuses access to HuggingFaceFW/fineweb-edu .*hf auth login"),
        ("fineweb-edu", gate, r"open only to those who accepted its terms, at https.*fineweb-edu\. .*hf auth login"),
        ("fineweb-edu", script, r"is a program, .* try hf:HuggingFaceFW/fineweb-edu@refs/convert/parquet"),
        ("python-edu", None, r"python-edu cannot be prepared: it lists files .* holds no text"),
        ("hf:a/b/c", None, r"write a Hub data set as hf:organization/name"),
        ("hf:a/b:", None, r"write a Hub data set as hf:organization/name"),
    ],
)
def test_what_is_missing_or_refused_is_one_message(
    hub: Hub, fineweb_edu: Path, spec: str, change: Callable[[Hub], None] | None, message: str
) -> None:
    hub.add(REPO, fineweb_edu)
    if change:
        change(hub)
    with pytest.raises(LightLMError, match=message):
        list(source(spec).units())


def test_a_gated_data_set_is_read_with_a_token_that_stays_on_the_hub(
    hub: Hub, fineweb_edu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(REPO, fineweb_edu)
    gate(hub)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert read(source()) == DOCUMENTS  # the server's other host answers 400 to a request that carries the token


def test_a_split_or_a_column_that_is_not_there_is_named(hub: Hub, fineweb_edu: Path, tmp_path: Path) -> None:
    hub.add(REPO, fineweb_edu)
    with pytest.raises(DataError, match=r"fineweb-edu/sample/10BT/000.*no column 'body'; there are: text, id, url"):
        read(source(text_column="body"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "test.jsonl").write_text('{"text": "x"}\n', encoding="utf-8")
    declared = "---\nconfigs:\n- config_name: a\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    (other / "README.md").write_text(declared, encoding="utf-8")
    hub.add("org/tests", other)
    with pytest.raises(DataError, match=r"no train split; there are: test"):
        list(source("hf:org/tests").units())


def json_lines(*documents: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


def test_other_formats_are_read_file_by_file_through_faults(hub: Hub, tmp_path: Path) -> None:
    repositories = {
        "lines": {"train-1.jsonl": json_lines("a", "b"), "train-2.jsonl.gz": gzip.compress(json_lines("c"))},
        "json": {"data/train.json": json_lines(*"abc"), "README.md": b"# No metadata\n"},
        "tables": {
            "x.tsv": b"n\ttext\n1\ta\n2\tb\n",
            "y.tsv": b"n\ttext\n3\tc\n",
            "README.md": b'---\nconfigs:\n- config_name: one\n  data_files: "*.tsv"\n  sep: "\\t"\n---\n',
        },
    }
    for name, files in repositories.items():
        for path, content in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(content)
        hub.add(f"org/{name}", tmp_path / name)
        opened = source(f"hf:org/{name}")
        data = [path for path in files if path != "README.md"]
        assert [unit.id.partition("#")[0] for unit in opened.units()] == data
        hub.faults.append(Fault("drop", f"GET /(cdn/)?datasets/org/{name}.*{data[0]}"))
        units = pickle.loads(pickle.dumps(list(opened.units())))
        assert [text for unit in units for text in read_unit(unit)] == ["a", "b", "c"]
        assert hub.faults.pop().times == 0


def test_a_streamed_file_that_stays_unreachable_is_not_bad_data(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.csv").write_text("text\nrow\n", encoding="utf-8")
    hub.add("org/x", tmp_path / "x")
    (unit,) = source("hf:org/x").units()
    hub.faults.append(Fault("drop", "x.csv", times=999))
    with pytest.raises(HubError, match=r"org/x/x\.csv: cannot be read"):
        list(read_unit(unit))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 1.0),
        ({"Retry-After": "7"}, 7.0),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": '"api";r=20;t=55'}, 1.0),  # not what the answer is about
        ({"Retry-After": "9999"}, 300.0),
    ],
)
def test_the_wait_is_as_long_as_the_hub_asks(
    headers: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RateLimitError(OSError):
        response = SimpleNamespace(status_code=429, headers=headers)

    waited: list[float] = []
    monkeypatch.setattr("lightlm.data.sources.hub.client.time.sleep", waited.append)
    monkeypatch.setattr("lightlm.data.sources.hub.client.RETRY_DELAYS", (1.0,))
    outcomes = iter([RateLimitError(), None])

    def once_limited() -> None:
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome

    persistently("Reading", once_limited)
    assert waited == [seconds]
