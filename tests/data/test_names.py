import pytest

from open_lm.data.names import name_entries


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        (["/c/books/manifest.jsonl", "/c/code/manifest.jsonl"], ["books", "code"]),
        (["/c/books/held_out/manifest.jsonl", "/c/code/held_out/manifest.jsonl"], ["books", "code"]),
        (["a/x/held/m.jsonl", "a/x/test/m.jsonl", "a/y/held/m.jsonl"], ["x-held", "x-test", "y-held"]),
        (["s3://b1/m.jsonl", "s3://b2/m.jsonl"], ["b1", "b2"]),
        (["/c/manifest.jsonl", "/c/books/manifest.jsonl"], ["manifest", "books"]),
        (["pipe:aws s3 cp s3://b/books/s.tar -", "pipe:aws s3 cp s3://b/code/s.tar -"], ["books", "code"]),
        (["pipe:cat /c/books/s.tar | cat -", "/c/code/m.jsonl"], ["books", "code"]),
        (["pipe:", "/c/m.jsonl"], ["entry", "c"]),
        (["/c/a_{00..03}.tar", "/c/b_{00..03}.tar"], ["a_-00..03", "b_-00..03"]),
        (["pipe:cat x=1.tar", "pipe:cat y=2.tar"], ["x-1", "y-2"]),
        (["/c/same.tar", "/c/same.tar"], ["same-0", "same-1"]),
    ],
)
def test_names_say_what_differs(entries, names):
    assert name_entries(entries) == names
