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
