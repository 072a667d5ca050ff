import json

import pytest

from client_ends.data import load_examples
from splitfl.errors import ConfigError, DataError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize(
    ("row", "kind", "columns", "read"),
    [
        ({"text": "a", "id": 3}, "text", None, {"text": "a"}),
        ({"prompt": "p", "completion": "c", "text": "x"}, "completion", None, {"prompt": "p", "completion": "c"}),
        ({"messages": TURNS}, "chat", None, {"messages": TURNS}),
        ({"text": "a", "label": 1}, "classification", None, {"text": "a", "label": 1}),
        ({"text": "a", "text_pair": "b", "label": "x"}, "classification", None,
         {"text": "a", "text_pair": "b", "label": "x"}),
        ({"question": "q", "answer": "w", "text": "x"}, "completion", {"prompt": "question", "completion": "answer"},
         {"prompt": "q", "completion": "w"}),
        ({"sentence": "s", "label": 0}, "classification", {"text": "sentence", "label": "label"},
         {"text": "s", "label": 0}),
        ({"sentence": "s", "label": 0}, "text", {"text": "sentence"}, {"text": "s"}),
    ],
)  # fmt: skip
def test_kinds_and_columns(tmp_path, row, kind, columns, read):
    examples = load_examples(jsonl(tmp_path / "a.jsonl", row, row), columns=columns)
    assert examples.kind == kind
    assert examples.rows == [read, read]
    assert examples.lines == [1, 2]
    assert not examples.running


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_newline(tmp_path):
    content = b'\xef\xbb\xbf\r\n{"text": "a"}\r\n\r\n   \n{"text": "b"}'
    examples = load_examples(write(tmp_path / "a.jsonl", content))
    assert [row["text"] for row in examples.rows] == ["a", "b"]
    assert examples.lines == [2, 5]
    text = load_examples(write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo"))
    assert text.rows == [{"text": "one\n\ntwo\n"}]
    assert text.running
    tsv = load_examples(write(tmp_path / "a.tsv", b"\xef\xbb\xbftext\tlabel\r\nx\t1\r\n\r\n"))
    assert tsv.rows == [{"text": "x", "label": "1"}]


def test_tsv_quotes_are_plain_characters(tmp_path):
    content = 'sentence\tlabel\n"unbalanced , it \'s \t0\nsays "" yes"\t1\n'
    examples = load_examples(write(tmp_path / "a.tsv", content), columns={"text": "sentence", "label": "label"})
    assert [row["text"] for row in examples.rows] == ["\"unbalanced , it 's ", 'says "" yes"']


def test_csv_quotes_hold_commas_lines_and_quotes(tmp_path):
    content = 'text,label\r\n"a, ""b""\r\nc",pos\r\nplain,neg\r\n'
    examples = load_examples(write(tmp_path / "a.csv", content))
    assert examples.rows == [{"text": 'a, "b"\nc', "label": "pos"}, {"text": "plain", "label": "neg"}]
    assert examples.lines == [2, 4]


def test_a_format_may_be_named(tmp_path):
    assert load_examples(write(tmp_path / "data", "text\nx\n"), format="csv").rows == [{"text": "x"}]
    with pytest.raises(ConfigError, match="txt, jsonl, csv or tsv"):
        load_examples(tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', 2, "not JSON .*column"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', 2, "no object"),
        ("a.jsonl", '{"text": "a"}\n{"txt": "b"}\n', 2, "no 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"text": null}\n', 2, "no text but null"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": 5}\n', 3, "no text but int"),
        ("a.jsonl", '{"text": "a"}\n{"text": " "}\n', 2, "empty"),
        ("a.jsonl", '{"prompt": "a", "completion": ""}\n', 1, "'completion' is empty"),
        ("a.jsonl", '{"text": "a", "label": 1.5}\n', 1, "1.5 is neither"),
        ("a.jsonl", '{"text": "a", "label": true}\n', 1, "True is neither"),
        ("a.jsonl", '{"messages": []}\n', 1, "no list of turns"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}\n', 1, "role and content"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2, "byte 11 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\x00"}\n', 2, "NUL"),
        ("a.jsonl", "[" * 100_000, 1, "not JSON"),
        ("a.jsonl", r'{"text": "a\u0000"}', 1, "NUL"),
        ("a.jsonl", r'{"prompt": "\ud83d", "completion": "x"}', 1, "surrogate"),
        ("a.jsonl", r'{"messages": [{"role": "user", "content": "\udc00"}]}', 1, "surrogate"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", 1, "not JSON"),
        ("a.txt", "fine\nb\x00d\n", 2, "NUL"),
        ("a.txt", "text".encode("utf-16"), 1, "UTF-16"),
        ("a.txt", b"ok\n\xe9t\xe9\n", 2, "byte 1 is not UTF-8"),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", 3, "1 fields where the header has 2"),
        ("a.csv", "text,text\nx,y\n", 1, "repeated"),
        ("a.csv", 'text,label\nx,1\n"y"z,1\n', 3, "not CSV"),
        ("a.csv", 'text,label\nx,1\n"open\nand on\n', 3, "not CSV"),
        ("a.csv", "text,label\nx,\n", 2, "neither"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name, content, line, words):
    with pytest.raises(DataError, match=rf"{name}, line {line}: .*{words}"):
        load_examples(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv", "a.txt"])
def test_empty_and_missing_files(tmp_path, name):
    with pytest.raises(DataError, match="no file"):
        load_examples(tmp_path / name)
    with pytest.raises(DataError, match="holds no"):
        load_examples(write(tmp_path / name, "\n \n"))


def test_mistaken_mappings(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a"})
    with pytest.raises(DataError, match=r"'question', 'answer'.*map them"):
        load_examples(path)
    with pytest.raises(DataError, match=r"no column 'reply'.*it has 'question', 'answer'"):
        load_examples(path, columns={"prompt": "question", "completion": "reply"})
    with pytest.raises(ConfigError, match="not to 'input'"):
        load_examples(path, columns={"input": "question"})
    with pytest.raises(ConfigError, match="no kind of data"):
        load_examples(path, columns={"prompt": "question"})
    with pytest.raises(ConfigError, match="no columns"):
        load_examples(write(tmp_path / "a.txt", "x"), columns={"text": "x"})


def test_a_long_running_text_is_kept_in_pieces_that_make_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr("client_ends.data.readers._PIECE", 10)
    content = "".join(f"line {i}\n" for i in range(7))
    examples = load_examples(write(tmp_path / "a.txt", content))
    assert len(examples) > 2
    assert "".join(row["text"] for row in examples.rows) == content
    assert examples.lines == [1, 3, 5, 7]
