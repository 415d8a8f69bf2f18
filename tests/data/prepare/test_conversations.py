"""Conversations prepared: the four forms in every kind of file, bad ones, and the same folder after interruptions."""

import csv
import json
import pickle
import shutil

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import lightlm
from lightlm.data.chat.conversation import ChatColumns, columns_of
from lightlm.data.folder import DataFolder
from lightlm.data.prepare.executors import ThreadEngine
from lightlm.data.prepare.run import prepare
from lightlm.data.select.filters import Filter
from lightlm.errors import DataError, UsageError

CHAT = ChatColumns("chat")
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
RECORDS = [
    {"messages": HI},
    {"conversations": SHARED},
    {"prompt": "Hi", "completion": "Hello"},
    {"instruction": "Hi", "input": "", "output": "Hello"},
    {"prompt": HI[:1], "completion": HI[1:]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, HI[1]]},
    {"messages": json.dumps(HI), "tools": "[]"},  # as a table writes lists
    {"messages": None, "prompt": "Hi", "completion": "Hello", "system": " "},  # a table with the columns of two forms
    {"messages": [HI[0] | {"role": " User"}, HI[1] | {"weight": 1, "tool_calls": None}]},
]
WRITTEN = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"


def talks(count, seed=0):
    generator = np.random.default_rng(seed)
    words = ["one", "two", "three", "four", "five"]
    for number in range(count):
        said = [" ".join(generator.choice(words, generator.integers(1, 12))) for _ in range(2)]
        yield [{"role": "user", "content": f"{number}: {said[0]}"}, {"role": "assistant", "content": said[1]}]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def prepared(source, out, **options):
    return prepare(str(source), "train:300", out, **{"text_column": CHAT, "val_fraction": 0.0} | options)


def shown(folder):
    return DataFolder.open(folder).beginnings(100)


def test_every_form_is_detected(tmp_path):
    manifest = prepared(write_lines(tmp_path / "a.jsonl", RECORDS), tmp_path / "a")
    assert shown(tmp_path / "a") == [WRITTEN] * len(RECORDS)
    assert manifest.chat.trained_tokens == {"train": 9 * 2, "val": 0}  # Hello is one token
    assert manifest.documents("train") == 9
    assert (manifest.chat.template, manifest.chat.added_tokens) == ("chatml", ["<|im_start|>", "<|im_end|>"])
    assert DataFolder.open(tmp_path / "a").tokenizer.settings["eos_token"] == "<|im_end|>"
    DataFolder.open(tmp_path / "a").verify()


@pytest.mark.parametrize("kind", ["json", "parquet", "csv"])
def test_every_kind_of_file_is_read(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "json":
        path.write_text(json.dumps(RECORDS, indent=1), encoding="utf-8")
    elif kind == "csv":
        path.write_text('instruction,input,output\nHi,,Hello\n"H\ni",x,Hello\n', encoding="utf-8")
    else:
        rows = [{"id": 1, "messages": HI}, {"id": 2, "messages": None}, {"id": 3, "messages": HI}]
        rows.append({"id": 4, "prompt": "Hi", "completion": "Hello"})
        rows = [dict.fromkeys(("messages", "prompt", "completion")) | row for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    manifest = prepared(path, tmp_path / "out")
    found = shown(tmp_path / "out")
    assert found[0] == WRITTEN
    assert len(found) == {"json": 9, "csv": 2, "parquet": 3}[kind]
    assert manifest.dropped == ({"null": 1} if kind == "parquet" else {})
    if kind == "csv":
        assert found[1] == WRITTEN.replace("Hi", "H\ni\n\nx")


def test_a_named_form_and_column(tmp_path):
    both = {"messages": HI, "prompt": "no", "completion": "no", "deep": {"talk": [*HI, *HI]}}
    path = write_lines(tmp_path / "a.jsonl", [both])
    prepared(path, tmp_path / "a", text_column=ChatColumns("prompt"))
    assert "no<|im_end|>⟧" in shown(tmp_path / "a")[0]
    prepared(path, tmp_path / "b", text_column=ChatColumns("chat:deep.talk"))
    assert shown(tmp_path / "b") == [WRITTEN * 2]


def test_a_system_prompt_beside_the_messages(tmp_path):
    system = [{"role": "system", "content": "Be kind."}]
    records = [record | {"system": "Be kind."} for record in RECORDS[:4]]
    records += [{"messages": system + HI, "system": "no"}, {"messages": [system[0] | {"role": "developer"}, *HI]}]
    prepared(write_lines(tmp_path / "a.jsonl", records), tmp_path / "a")
    assert shown(tmp_path / "a") == ["<|im_start|>system\nBe kind.<|im_end|>\n" + WRITTEN] * 6


def test_a_csv_of_messages_and_a_filter_before_the_check(tmp_path):
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "messages"], ["1", json.dumps(HI)], ["2", json.dumps(SHARED)]])
    prepared(tmp_path / "a.csv", tmp_path / "a")
    assert shown(tmp_path / "a") == [WRITTEN] * 2
    path = write_lines(tmp_path / "b.jsonl", [{"messages": HI, "turns": 2}, {"messages": [], "turns": 0}])
    assert prepared(path, tmp_path / "b", filter=Filter("turns > 1")).dropped == {"filtered": 1}
    with (tmp_path / "c.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["messages", "turns"], [json.dumps(HI), "2"], ["[]", "0"]])
    assert prepared(tmp_path / "c.csv", tmp_path / "c", filter=Filter("turns > 1")).dropped == {"filtered": 1}


def test_a_csv_of_prompts_and_completions_that_are_lists_of_messages(tmp_path):
    rows = [["prompt", "completion"], [json.dumps(HI[:1]), json.dumps(HI[1:])], ["Hi", "Hello"]]
    people = json.dumps([{"name": "Bob", "age": 3}])
    rows += [["[1, 2]", people]]  # JSON that is what was asked
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    prepared(tmp_path / "a.csv", tmp_path / "a")
    *lists, last = shown(tmp_path / "a")
    assert lists == [WRITTEN] * 2
    assert "user\n[1, 2]<" in last
    assert people in last


def test_an_instruction_that_is_null_is_not_written(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"instruction": None, "input": "Summarize this.", "output": "ok"}])
    with pytest.raises(DataError, match="message 1"):
        prepared(path, tmp_path / "a")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_half_a_surrogate_pair_in_messages_as_json_becomes_the_replacement_character(tmp_path, kind):
    talk, path = json.dumps([HI[0] | {"content": "Hi \ud83d"}, HI[1]]), tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_lines(path, [{"messages": talk}])
    elif kind == "parquet":
        parquet.write_table(pyarrow.table({"messages": [talk]}), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["messages"], [talk]])
    prepared(path, tmp_path / "out")
    assert shown(tmp_path / "out") == [WRITTEN.replace("Hi", "Hi \ufffd")]


def test_bytes_of_a_conversation_in_csv_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"instruction,output\nHi,Hello\ncaf\xe9,Hello\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: not UTF-8: byte 0xe9"):
        prepared(tmp_path / "a.csv", tmp_path / "a")


def test_another_template_in_the_same_process_is_used(tmp_path):
    """Also one in the folder of the tokenizer, which keeps its name."""
    path, out = write_lines(tmp_path / "a.jsonl", RECORDS[:1]), tmp_path / "out"
    prepared(path, out)
    (folder := tmp_path / "own").mkdir()
    shutil.copyfile(out / "tokenizer.json", folder / "tokenizer.json")
    for number, text in enumerate("xy"):
        template = f"{text}{{% for m in messages %}}{{{{ m.content + eos_token }}}}{{% endfor %}}"
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}), encoding="utf-8"
        )
        if number:
            with pytest.raises(DataError, match=r"other settings .*chat_template"):
                prepare(str(path), str(folder), out, text_column=CHAT, val_fraction=0.0)
        prepare(str(path), str(folder), out, text_column=CHAT, val_fraction=0.0, overwrite=True)
        assert shown(out) == [f"{text}Hi<|im_end|>⟦Hello<|im_end|>⟧"]


def test_conversations_read_as_text_are_a_hint(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", RECORDS[:1])
    with pytest.raises(DataError, match=r"no column 'text'.* If these are conversations, add --format chat"):
        prepared(path, tmp_path / "a", text_column="text")


def test_a_form_without_messages_takes_no_column():
    with pytest.raises(UsageError, match="alpaca reads instruction and output; leave it out"):
        columns_of("alpaca", "talk", "assistant")
    with pytest.raises(UsageError, match="'alpacca' is unknown; known are text, chat, messages"):
        columns_of("alpacca", "text", "assistant")
    assert columns_of("sharegpt", "talk", "assistant") == "sharegpt:talk"


def test_a_folder_leaves_out_what_holds_no_conversation(tmp_path):
    (tmp_path / "src").mkdir()
    write_lines(tmp_path / "src" / "a.jsonl", [RECORDS[0]])
    (tmp_path / "src" / "README.md").write_text("About this.", encoding="utf-8")
    (tmp_path / "src" / "settings.json").write_text('{"a": 1}', encoding="utf-8")
    manifest = prepared(tmp_path / "src", tmp_path / "out")
    assert manifest.files_left_out == {".md without conversations": 1, ".json without conversations": 1}
    with pytest.raises(DataError, match="plain text holds no conversations"):
        prepared(tmp_path / "src" / "README.md", tmp_path / "other")
    with pytest.raises(DataError, match="pydocs holds texts and no conversations"):
        prepared("pydocs", tmp_path / "other")


def test_weights_of_what_is_not_trained_on(tmp_path):
    """SlimOrca's layout. With --train-on all a question's weight would count, and an answer's always does."""
    talk = [{"from": "system", "value": "Be kind", "weight": None}]
    talk += [message | {"weight": weight} for message, weight in zip(SHARED, (0, 1), strict=True)]
    path = write_lines(tmp_path / "a.jsonl", [{"conversations": talk}])
    for train_on in ("assistant", "last"):
        prepared(path, tmp_path / train_on, train_on=train_on)
        [text] = shown(tmp_path / train_on)
        assert text.endswith(WRITTEN)
    with pytest.raises(DataError, match=r"message 2 has the weight 0, .* with --train-on all"):
        prepared(path, tmp_path / "all", train_on="all")
    with pytest.raises(DataError, match=r"message 2 has the weight 0"):
        lightlm.prepare(path, out=tmp_path / "all", tokenizer="train:300", format="chat", train_on="all")
    assert pickle.loads(pickle.dumps(columns_of("chat", "text", "all"))).train_on == "all"  # as for a worker of Ray


BAD = {
    "no message of an assistant": {"messages": HI[:1]},
    "unknown role 'narrator'": {"messages": [{"role": "narrator", "content": "x"}, *HI]},
    r"message 2 \(assistant\) is empty": {"messages": [HI[0], {"role": "assistant", "content": " \n"}]},
    r"message 1 \(user\) holds no text": {"messages": [{"role": "user", "content": [{"type": "image"}]}, HI[1]]},
    "message 2 uses a tool": {"messages": [HI[0], {"role": "tool", "content": "4"}, HI[1]]},
    "message 1 uses a tool": {"messages": [{"role": "Function", "content": "4"}, *HI]},
    "has tools": {"messages": HI, "tools": [{"name": "f"}]},
    "has history": {"instruction": "Hi", "output": "Hello", "history": [["a", "b"]]},
    "has the weight 0": {"messages": [HI[0], HI[1] | {"weight": 0}]},
    "a JSON object was expected, with the columns messages": HI[0]["content"],
    "a list of messages was expected": {"messages": "[{'role'"},
    "no conversation: the columns messages, or conversations": {"text": "Hi"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_conversations_are_one_message_with_its_place(tmp_path, message):
    path = write_lines(tmp_path / "a.jsonl", [RECORDS[0], BAD[message]])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{message}.*--skip-bad"):
        prepared(path, tmp_path / "a")
    manifest = prepared(path, tmp_path / "a", skip_bad=True)
    assert manifest.dropped == {"unreadable": 1}
    assert len(manifest.bad) == 1
    assert len(shown(tmp_path / "a")) == 1


def test_a_template_that_refuses_a_conversation(tmp_path):
    template = (
        "{% for m in messages %}{% if m.content == 'Bye' %}{{ raise_exception('no Bye') }}{% endif %}"
        "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    path = write_lines(tmp_path / "a.jsonl", [RECORDS[0], {"prompt": "Bye", "completion": "now"}])
    with pytest.raises(DataError, match=r"the conversation that begins 'Bye': .*no Bye.*--skip-bad"):
        prepared(path, tmp_path / "a", chat_template=template)
    manifest = prepared(path, tmp_path / "a", chat_template=template, skip_bad=True)
    assert shown(tmp_path / "a") == ["user: Hi\n⟦assistant: Hello\n⟧"]  # its prompt does not begin an answer
    assert (manifest.chat.template, manifest.dropped) == ("file", {"unreadable": 1})
    with pytest.raises(DataError, match="not valid in line 1"):
        prepared(path, tmp_path / "b", chat_template="{% for %}")
    with pytest.raises(UsageError, match="add --format chat"):
        prepared(path, tmp_path / "c", chat_template=template, text_column="prompt")


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dedup", [None, "exact"])
def test_workers_and_interruptions_do_not_change_a_byte(tmp_path, dedup, monkeypatch):
    """Blocks of 2 kB, shards of 1,000 tokens; every conversation of the source twice."""
    monkeypatch.setattr("lightlm.data.prepare.blocks.BLOCK_BYTES", 2_000)
    (tmp_path / "src").mkdir()
    for part in range(6):
        write_lines(tmp_path / "src" / f"{part}.jsonl", [{"messages": talk} for talk in talks(40, part // 2)])
    options = {"val_fraction": 0.2, "shard_tokens": 1_000, "dedup": dedup}
    manifest = prepared(tmp_path / "src", tmp_path / "whole", workers=1, **options)
    assert manifest.dropped == ({"duplicate": 120} if dedup else {})
    assert manifest.documents("train") + manifest.documents("val") == (120 if dedup else 240)
    monkeypatch.setattr("lightlm.data.prepare.assembly.SAVE_TOKENS", 300)

    class Failing(ThreadEngine):
        def __call__(self, job, blocks, report):
            for number, encoded in enumerate(super().__call__(job, blocks, report)):
                if number == 2:
                    raise KeyboardInterrupt
                yield encoded

    for failures in range(30):  # noqa: B007
        try:
            prepared(tmp_path / "src", tmp_path / "resumed", engine=Failing(3), **options)
            break
        except KeyboardInterrupt:
            pass
    assert failures > 1
    assert folder_bytes(tmp_path / "resumed") == folder_bytes(tmp_path / "whole")
    opened = DataFolder.open(tmp_path / "whole")
    opened.verify()
    firsts = {tuple(document[:2]) for split in ("train", "val") for document in opened.split(split).documents()}
    assert len(firsts) == 1  # each begins with <|im_start|>user: none is cut
    (tmp_path / "whole" / "train_000000.mask").write_bytes(b"\1" * 1_000)
    with pytest.raises(DataError, match=r"train_000000\.mask: checksum"):
        opened.verify()
    (tmp_path / "whole" / "train_000000.mask").write_bytes(b"\1" * 999)
    with pytest.raises(DataError, match=r"train_000000\.mask: 999 bytes, but its shard has 1000 tokens"):
        DataFolder.open(tmp_path / "whole")


def test_without_one_for_validation_the_last_conversations_move(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks(20)])
    every = prepared(path, tmp_path / "every").tokens("train")
    manifest = prepared(path, tmp_path / "a", val_fraction=1e-9)
    assert 0 < manifest.tokens("val") < manifest.tokens("train")
    assert manifest.tokens("val") + manifest.tokens("train") == every
    assert manifest.documents("val") + manifest.documents("train") == 20
    for split in ("train", "val"):
        assert all("assistant" in text for text in [DataFolder.open(tmp_path / "a").beginnings(1)[0]])
        assert DataFolder.open(tmp_path / "a").split(split).mask.slice(0, 1)[0] == 2


def test_max_tokens_and_the_settings_decide(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk} for talk in talks(50)])
    manifest = prepared(path, tmp_path / "a", max_tokens=200)
    assert 200 <= manifest.tokens("train") < 300
    with pytest.raises(DataError, match="train_on: assistant there, last now"):
        prepared(path, tmp_path / "a", max_tokens=200, train_on="last")
    assert prepared(path, tmp_path / "a", max_tokens=200).already_prepared
