import subprocess

import pytest

from open_lm.data.patterns import expand


@pytest.mark.parametrize(
    "pattern",
    [
        "a.tar",
        "s3://b/shard_{00..11}.tar",
        "{8..11}{a,b}",
        "x{1..9..4}y",
        "{5..1}",
        "{010..8}",
        "{a..d}/{x,y{1..3},}.tar",
        "{{a,b},c}",
        "{a}{}",
        "{a{1..2}",
        "a}b{1,2}",
        "{-2..1}",
        "{x,y}{",
    ],
)
def test_braces_expand_as_in_bash(pattern):
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True
    )
    assert expand(pattern) == words.stdout.splitlines()


def test_patterns_are_joined_and_commands_kept():
    assert expand("a{0..1}::b") == ["a0", "a1", "b"]
    command = "pipe:aws s3 cp s3://b/{0..1}.tar - | awk '{print}'"
    assert expand(command) == [command.replace("{0..1}", n) for n in "01"]


def test_a_name_with_colons_is_no_two_patterns():
    for pattern in ("s3://b/x::y.tar", "s3://b/x{0..1}::y{0..1}.tar", "pipe:aws s3 cp s3://b/x::y.tar -"):
        rest = "…" if pattern.startswith("pipe:") else "y"
        with pytest.raises(
            ValueError, match=rf"`::` joins shards, and '{rest}.*' is no URL .* write \./{rest}.* manifest"
        ):
            expand(pattern)
    joined = (
        "s3://b/x.tar::s3://b/y.tar",
        "s3://b/x.tar::./y.tar",
        "s3://b/x.tar::pipe:cat y.tar",
        "x.tar::y.tar",
    )
    assert [len(expand(pattern)) for pattern in joined] == [2, 2, 2, 2]
