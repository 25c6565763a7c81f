"""Reading prompts, preferences and labelled texts: the good forms, and every bad input with the line it ends in."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plumbline.data.dataset import LabelledText, read_labelled, read_preferences, read_prompts, summarize
from plumbline.errors import DataError
from plumbline.records import Message, Prompt

Row = Mapping[str, object]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "How are you?"},
]


def jsonl(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refused(call: Callable[[], object], *parts: str) -> str:
    """The message of the DataError that `call` ends in: one line that holds all `parts`."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    return message


# Good forms


def test_a_row_becomes_a_prompt(tmp_path: Path) -> None:
    row = {"id": 7, "prompt": "Why?", "target": "So.", "chosen": "a", "rejected": "b", "kind": "x", "n": 1, "deep": [1]}
    (prompt,) = read_prompts(jsonl(tmp_path / "a.jsonl", [row]))
    assert prompt == Prompt(
        id="7",
        messages=(Message(role="user", content="Why?"),),
        target="So.",
        chosen="a",
        rejected=("b",),
        extra={"kind": "x", "n": 1},
    )


def test_messages_keep_their_turns(tmp_path: Path) -> None:
    (prompt,) = read_prompts(jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}]))
    assert [turn.role for turn in prompt.messages] == ["system", "user", "assistant", "user"]
    assert prompt.query == "How are you?"


def test_all_formats_give_the_same_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "a, b", "target": 'say "x"\nand y'}, {"prompt": "é", "target": "z"}]
    path = tmp_path / "a.jsonl"
    plain = read_prompts(jsonl(path, rows))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text('prompt,target\n"a, b","say ""x""\nand y"\né,z\n', encoding="utf-8-sig")
    for name in ("b.jsonl.gz", "c.parquet", "d.csv"):
        assert read_prompts(str(tmp_path / name)) == plain
    assert [prompt.id for prompt in plain] == ["1", "2"]


def test_columns_map_our_names_to_the_files(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"uid": "u", "question": "q", "answer": "a", "prompt": "unused"}])
    (prompt,) = read_prompts(path, columns={"id": "uid", "prompt": "question", "target": "answer"})
    assert (prompt.id, prompt.query, prompt.target, prompt.extra) == ("u", "q", "a", {"prompt": "unused"})


def test_a_mapped_column_decides_between_prompt_and_messages(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "messages": TURNS}])
    assert read_prompts(path, columns={"prompt": "prompt"})[0].query == "p"
    assert read_prompts(path, columns={"messages": "messages"})[0].query == "How are you?"


def test_where_reads_the_rows_that_have_its_values_alone(tmp_path: Path) -> None:
    rows = [{"prompt": p, "label": label} for p, label in (("a", 0), ("b", 1), ("c", 0), ("d", 1), ("e", 1))]
    path = jsonl(tmp_path / "p.jsonl", [*rows[:3], {"label": 0}, *rows[3:]])  # passed over: not even checked
    assert [prompt.query for prompt in read_prompts(path, where={"label": 1})] == ["b", "d", "e"]
    kept = read_prompts(path, where={"label": 1}, limit=2)
    assert [(prompt.query, prompt.id) for prompt in kept] == [("b", "2"), ("d", "5")]


def test_where_that_fits_no_row_says_what_there_is(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "label": "0"}, {"prompt": "b", "label": "1"}])
    refused(lambda: read_prompts(path, where={"label": 1}), "no row has {'label': 1}", "label is '0', '1'")
    refused(lambda: read_prompts(path, where={"lable": "1"}), "row 1", "no 'lable'", "did you mean 'label'?")


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\nbroken\n')
    assert [prompt.query for prompt in read_prompts(str(path), limit=2)] == ["a", "b"]


def test_blank_lines_keep_row_numbers_those_of_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n\n')
    assert [prompt.id for prompt in read_prompts(str(path))] == ["2", "4"]


def test_nulls_and_nan_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "target": null, "chosen": NaN, "id": null, "score": NaN}\n')
    (prompt,) = read_prompts(str(path))
    assert (prompt.id, prompt.target, prompt.chosen, prompt.extra) == ("1", None, None, {})


def test_saved_datasets_and_directories_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    table = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "files").mkdir()
    jsonl(tmp_path / "files" / "train.jsonl", [{"prompt": "a"}, {"prompt": "b"}])

    def queries(name: str, split: str = "train") -> list[str]:
        return [prompt.query for prompt in read_prompts(str(tmp_path / name), split=split)]

    assert queries("one") == queries("splits") == queries("files") == ["a", "b"]
    assert queries("splits", split="test") == ["b"]
    refused(lambda: queries("splits", split="valid"), "splits", "no split 'valid'", "train, test")
    refused(lambda: queries("files", split="valid"), "files", "'valid'", "train")


def test_the_real_files(shared: Path) -> None:
    assert len(read_prompts(str(shared / "data/comments/prompts_valid.jsonl.gz"))) == 1500
    pairs = read_preferences(str(shared / "data/hh_harmless/pairs.jsonl.gz"))
    assert len(pairs) == 1800
    assert summarize(pairs)["multi_turn_share"] == pytest.approx(1 - 514 / 1800)
    tests = read_prompts(str(shared / "data/xstest/prompts.jsonl.gz"))
    assert tests[0].id == "348"
    assert tests[0].extra["label"] == "safe"
    assert {row.label for row in read_labelled(str(shared / "data/comments/labelled_train.jsonl.gz"))} == {0.0, 1.0}


def test_summary(tmp_path: Path) -> None:
    rows = [{"prompt": "ab", "target": "x"}, {"messages": TURNS}, {"prompt": "abcd", "chosen": "x", "rejected": "y"}]
    prompts = read_prompts(jsonl(tmp_path / "a.jsonl", rows))
    assert summarize(prompts) == {
        "rows": 3,
        "multi_turn_share": pytest.approx(1 / 3),
        "with_target": 1,
        "with_preference": 1,
        "min_characters": 2,
        "mean_characters": pytest.approx((2 + 29 + 4) / 3),
        "max_characters": 29,
    }
    assert summarize([])["rows"] == 0


# Bad rows: what the line says after the file's name

BAD_ROWS: list[tuple[str, Row, list[str]]] = [
    ("no prompt", {"qid": 1, "promt": "x"}, ["no `prompt`", "it has qid, promt", "columns: {prompt: promt}"]),
    ("a synonym", {"question": "x"}, ["no `prompt`", "columns: {prompt: question}"]),
    ("nothing near", {"zzz": "x"}, ["no `prompt`", "it has zzz", "columns: {prompt: ...}"]),
    ("no keys", {}, ["no `prompt`", "it has nothing"]),
    ("null prompt", {"prompt": None}, ["prompt: is empty", "remove the row"]),
    ("empty prompt", {"prompt": ""}, ["prompt: is blank", "remove the row"]),
    ("blank prompt", {"prompt": " \n\t"}, ["prompt: is blank", "remove the row"]),
    ("prompt is a number", {"prompt": 3}, ["prompt: is an int, not text", "string"]),
    ("prompt is words", {"prompt": ["a", "b"]}, ["prompt: turn 1 is a str", "role and content"]),
    ("half a character", {"prompt": "a\ud800"}, ["prompt: holds half a character", "at 1"]),
    (
        "both",
        {"prompt": "x", "messages": TURNS},
        ["has `messages` too, in which no user says it", "columns: {prompt: prompt}"],
    ),
    ("id is a list", {"prompt": "x", "id": [1]}, ["id: is a list", "text or a number"]),
    ("half an id", {"prompt": "x", "id": "\ud800"}, ["id: holds half a character"]),
    ("half of another", {"prompt": "x", "note": "a\ud800"}, ["note: holds half a character", "at 1"]),
    ("half a name", {"prompt": "x", "n\ud800": 1}, ["'n\\ud800': its name holds half a character"]),
    ("blank id", {"prompt": "x", "id": ""}, ["id: is blank", "leave the key out"]),
    ("messages is text", {"messages": "hi"}, ["messages: is a str", "{role, content}"]),
    ("no messages", {"messages": []}, ["messages: is empty", "{role, content}"]),
    ("a turn is text", {"messages": ["hi"]}, ["messages: turn 1 is a str", "role and content"]),
    ("no value", {"messages": [{"from": "human", "content": "x"}]}, ["turn 1 has from, content", "role and content"]),
    (
        "unknown role",
        {"messages": [{"role": "bishop", "content": "x"}]},
        ["turn 1", "'bishop'", "system, user, assistant"],
    ),
    ("role is a list", {"messages": [{"role": ["user"], "content": "x"}]}, ["turn 1", "unknown role ['user']"]),
    ("blank turn", {"messages": [{"role": "user", "content": ""}]}, ["messages: content of turn 1 is blank"]),
    ("turn is no text", {"messages": [{"role": "user", "content": 5}]}, ["content of turn 1 is an int, not text"]),
    ("two answers", {"messages": [*TURNS[:3], TURNS[2]]}, ["ends with a turn of the assistant before any answer"]),
    ("an answer alone", {"messages": [TURNS[2]]}, ["messages: is an answer that no user's turn stands before"]),
    ("system last", {"messages": [TURNS[0]]}, ["messages: ends with a turn of the system", "with the user's"]),
    ("late system", {"messages": [TURNS[1], TURNS[0], TURNS[3]]}, ["turn 2 is a system turn", "only the first"]),
]


@pytest.mark.parametrize(("row", "parts"), [case[1:] for case in BAD_ROWS], ids=[case[0] for case in BAD_ROWS])
def test_a_bad_row_is_named(tmp_path: Path, row: Row, parts: list[str]) -> None:
    path = jsonl(tmp_path / "bad.jsonl", [{"prompt": "good"}, row])
    refused(lambda: read_prompts(path), "bad.jsonl, row 2", *parts)


@pytest.mark.parametrize("target", [None, "", " \n", 4, ["a"], "a\ud800"])
def test_a_column_is_checked_where_it_is_read(tmp_path: Path, target: object) -> None:
    """Null and blank are alike: nothing where a target may be missing, and refused where one is needed."""
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "target": "b"}, {"prompt": "x", "target": target}])
    assert [prompt.target for prompt in read_prompts(path)] == ["b", None]
    refused(lambda: read_prompts(path, target="needed"), "a.jsonl, row 2, target: ")
    if target is None or (isinstance(target, str) and not target.strip()):
        assert [prompt.target for prompt in read_prompts(path, target="read")] == ["b", None]
    else:
        refused(lambda: read_prompts(path, target="read"), "a.jsonl, row 2, target: ")


def test_answers_that_nobody_reads_are_not_checked(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "chosen": TURNS, "rejected": [3, "y", ""]}, {"prompt": "z"}]
    [first, _] = read_prompts(jsonl(tmp_path / "a.jsonl", rows))
    assert (first.chosen, first.rejected, first.row) == (None, ("y",), 1)
    refused(lambda: read_preferences(str(tmp_path / "a.jsonl")), "row 1, chosen: ends with a turn of the user")
    refused(lambda: read_prompts(str(tmp_path / "a.jsonl"), target="needed"), "row 1: no `target`")


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"prompt": "x"', ["broken JSON", "column 15", "one JSON object on a line"]),
        (b"{'prompt': 'x'}", ["broken JSON", "column 2"]),
        (b"[" * 100_000, ["broken JSON"]),
        (b'["x"]', ["a list, not an object", "{...}"]),
        (b'"x"', ["text, not an object"]),
        (b"null", ["null, not an object"]),
        (b"12", ["the value 12, not an object"]),
        ('{"prompt": "é"}'.encode("latin-1"), ["not UTF-8 at byte 28", "save it as UTF-8"]),
        (b'{"prompt": "x"}\0', ["zero bytes", "save it as UTF-8"]),
    ],
)
def test_a_line_that_is_no_row(tmp_path: Path, line: bytes, parts: list[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' + line + b"\n")
    refused(lambda: read_prompts(str(path)), "bad.jsonl, row 2", *parts)


def test_utf16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "wide.jsonl"
    path.write_text('{"prompt": "x"}\n', encoding="utf-16")
    refused(lambda: read_prompts(str(path)), "wide.jsonl, row 1", "not UTF-8 at byte 0", "save it as UTF-8")


def test_a_repeated_id_names_both_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"id": "x", "prompt": "a"}, {"prompt": "b"}, {"id": "x", "prompt": "c"}])
    refused(lambda: read_prompts(path), "a.jsonl, row 3, id", "'x' is row 1's already", "id of its own")
    path = jsonl(tmp_path / "b.jsonl", [{"id": 2, "prompt": "a"}, {"prompt": "b"}])
    refused(lambda: read_prompts(path), "b.jsonl, row 2, id", "'2' is row 1's already")


def test_a_mapping_that_cannot_be_right(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])

    def read(columns: dict[str, str]) -> Callable[[], object]:
        return lambda: read_prompts(path, columns=columns)

    refused(read({"promt": "question"}), "a.jsonl", "'promt'", "did you mean 'prompt'")
    refused(read({"prompt": "qestion"}), "a.jsonl, row 1", "no 'qestion'", "columns: {prompt: question}")
    typo = {"prompt": "question", "target": "anwser"}
    refused(read(typo), "a.jsonl", "maps target to 'anwser'", "did you mean 'answer'")
    refused(lambda: read_prompts(path, limit=0), "limit is 0", "1 or more")


# Bad files


def test_files_that_are_not_there_or_not_data(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none"):
        refused(lambda name=name: read_prompts(str(tmp_path / name)), name, "no such file", ".jsonl.gz, .parquet, .csv")
    (tmp_path / "a.json").write_text("[]")
    refused(lambda: read_prompts(str(tmp_path / "a.json")), "a.json", "'.json'", "call it .jsonl")
    (tmp_path / "a.txt").write_text("x")
    refused(lambda: read_prompts(str(tmp_path / "a.txt")), "a.txt", "unknown suffix '.txt'", ".jsonl, .jsonl.gz")
    refused(lambda: read_prompts("s3://bucket/a.jsonl"), "s3://bucket/a.jsonl", "copy it to a disk")


def test_directories_that_are_no_dataset(tmp_path: Path) -> None:
    refused(lambda: read_prompts(str(tmp_path)), tmp_path.name, "a directory without data files", ".jsonl")
    (tmp_path / "x.bin").write_bytes(b"x")
    refused(lambda: read_prompts(str(tmp_path)), tmp_path.name, "a directory without data files")
    (tmp_path / "state.json").write_text("{}")
    refused(lambda: read_prompts(str(tmp_path)), tmp_path.name, "cannot be loaded as a dataset")


def test_a_hub_name_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refused(lambda: read_prompts("nobody/no-such-set"), "nobody/no-such-set", "no such file here", "cannot be reached")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    refused(lambda: read_prompts(str(tmp_path / name)), name, "the file is empty", "at least one row")


def test_a_file_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n \n")
    (tmp_path / "a.csv").write_text("prompt,target\n")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    for name in ("a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"):
        refused(lambda name=name: read_prompts(str(tmp_path / name)), name, "no rows in it", "at least one")


def test_damaged_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(jsonl_bytes(2000))
    for content in (whole[: len(whole) // 2], b'{"prompt": "x"}\n', whole[:500] + b"\xff" * 40 + whole[540:]):
        path.write_bytes(content)
        refused(lambda: read_prompts(str(path)), "a.jsonl.gz", "damaged gzip", "compress the .jsonl again")


def test_gzip_without_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(jsonl_bytes(3)))
    refused(lambda: read_prompts(str(path)), "a.jsonl, row 1", "not UTF-8", "call it .jsonl.gz")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["x"] * 1000}), path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"PAR1 is not enough", whole[:4] + b"\xff" * 30 + whole[34:]):
        path.write_bytes(content)
        refused(lambda: read_prompts(str(path)), "a.parquet", "damaged Parquet", "write the file again")


def test_parquet_that_cannot_be_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)
    refused(lambda: read_prompts(str(path)), "a.parquet: it names column 'prompt' twice; rename one")
    pq.write_table(pa.table({"prompt": ["a"], "at": pa.array([2**62], pa.timestamp("us"))}), path)
    refused(lambda: read_prompts(str(path)), "a.parquet, after row 0", "a value that cannot be read")


def test_a_picture_that_is_none(tmp_path: Path) -> None:
    import datasets

    parts = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"prompt": datasets.Value("string"), "photo": parts})
    rows = {"prompt": ["a"], "photo": [{"bytes": b"no picture", "path": None}]}
    table = datasets.Dataset.from_dict(rows, features=features).data.table
    features = datasets.Features({"prompt": datasets.Value("string"), "photo": datasets.Image()})
    datasets.Dataset(table, info=datasets.DatasetInfo(features=features)).save_to_disk(str(tmp_path / "saved"))
    refused(lambda: read_prompts(str(tmp_path / "saved")), "saved, after row 0", "a value that cannot be read")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("prompt,target\na,b\nc,d,e\n", ["row 2", "3 cells where the header has 2", "double quotes"]),
        ("prompt,target\na\n", ["row 1", "1 cells where the header has 2"]),
        ('prompt,target\n"a,b\n', ["broken CSV", ".jsonl"]),
        ("prompt,prompt\na,b\n", ["'prompt' twice", "rename"]),
        ("prompt,target\n,b\n", ["row 1, prompt: is empty"]),
        ("question\na\n", ["row 1: no `prompt`", "columns: {prompt: question}"]),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "a.csv").write_text(text)
    refused(lambda: read_prompts(str(tmp_path / "a.csv")), "a.csv", *parts)


def test_csv_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("prompt\né\n".encode("latin-1"))
    refused(lambda: read_prompts(str(tmp_path / "a.csv")), "a.csv, line 2", "not UTF-8 at byte 7", "save it as UTF-8")


# Preferences and labels


def test_preferences_need_both_answers(tmp_path: Path) -> None:
    good = {"prompt": "x", "chosen": "a", "rejected": "b"}
    (prompt,) = read_preferences(jsonl(tmp_path / "a.jsonl", [good]))
    assert (prompt.chosen, prompt.rejected) == ("a", ("b",))
    for key in ("chosen", "rejected"):
        path = jsonl(tmp_path / "b.jsonl", [good, {k: v for k, v in good.items() if k != key}])
        refused(lambda path=path: read_preferences(path), "b.jsonl, row 2", f"no `{key}`", "columns")


def test_labelled_texts(tmp_path: Path) -> None:
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 0.0, "prompt": "Say."}, {"text": "x", "label": True}]
    assert read_labelled(jsonl(tmp_path / "a.jsonl", rows)) == [
        LabelledText(text="good", label=1.0),
        LabelledText(text="bad", label=0.0, messages=(Message(role="user", content="Say."),)),
        LabelledText(text="x", label=1.0),
    ]
    (tmp_path / "a.csv").write_text("review,stars\nfine,1\n")
    columns = {"text": "review", "label": "stars"}
    assert read_labelled(str(tmp_path / "a.csv"), columns=columns) == [LabelledText(text="fine", label=1.0)]


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "x", "label": 2}, ["label: is 2", "0 or 1"]),
        ({"text": "x", "label": 0.5}, ["label: is 0.5", "0 or 1"]),
        ({"text": "x", "label": "good"}, ["label: is 'good'", "0 or 1"]),
        ({"text": "x", "label": [1]}, ["label: is [1]", "0 or 1"]),
        ({"text": "x"}, ["no `label`", "it has text"]),
        ({"review": "x", "label": 1}, ["no `text`", "columns: {text: review}"]),
        ({"text": "", "label": 1}, ["text: is blank", "remove the row"]),
        ({"text": 5, "label": 1}, ["text: is an int, not text"]),
    ],
)
def test_a_bad_labelled_row_is_named(tmp_path: Path, row: Row, parts: list[str]) -> None:
    path = jsonl(tmp_path / "bad.jsonl", [{"text": "good", "label": 1}, row])
    refused(lambda: read_labelled(path), "bad.jsonl, row 2", *parts)


def jsonl_bytes(rows: int) -> bytes:
    return b"".join(json.dumps({"prompt": f"question {row * 7919 % 10007}"}).encode() + b"\n" for row in range(rows))


def test_a_cell_above_csvs_own_limit_is_read(tmp_path: Path) -> None:
    text = "a" * 300_000
    (tmp_path / "a.csv").write_text(f'prompt,target\n"{text}",b\n')
    assert [(prompt.query, prompt.target) for prompt in read_prompts(str(tmp_path / "a.csv"))] == [(text, "b")]


def test_a_csv_says_where_the_broken_row_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt,target\na,b\n"c,d\ne,f\n')
    refused(lambda: read_prompts(str(path)), "a.csv, line 3: broken CSV", "no closing quote")
    path.write_bytes(b"prompt,target\ra,b\r")
    refused(lambda: read_prompts(str(path)), "a.csv, line 1: broken CSV", "end in \\r alone")
    path.write_bytes(b'\xef\xbb\xbfprompt,target\r\n"a\r\nb",c\r\n')
    assert read_prompts(str(path))[0].query == "a\r\nb", "a byte order mark and line ends of Windows"


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("first", ["a", "b"])
def test_a_folder_is_read_whatever_file_has_nulls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, first: str
) -> None:
    """The file without any target is the first, or the last; a bad row is named by its own file."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()

    def write(name: str, row: Row) -> None:
        path = folder / f"{name}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.Table.from_pylist([dict(row)]), path)
        elif suffix == "csv":
            path.write_text(f"prompt,target\n{row['prompt'] or ''},{row['target'] or ''}\n")
        else:
            line = (json.dumps(row) + "\n").encode()
            path.write_bytes(gzip.compress(line) if suffix.endswith("gz") else line)

    write(first, {"prompt": "p", "target": None})
    write("b" if first == "a" else "a", {"prompt": "q", "target": "t"})
    assert {(p.query, p.target) for p in read_prompts(str(folder))} == {("p", None), ("q", "t")}
    assert [p.id for p in read_prompts(str(folder))] == ["1", "2"]
    write("c", {"prompt": None, "target": "t"})
    refused(lambda: read_prompts(str(folder)), f"rows/c.{suffix}, row 1, prompt: is empty")
