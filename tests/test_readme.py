"""The README's Python runs as it stands there, and its commands parse."""

import re
import shlex
from pathlib import Path

from dememo_jax import cli

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_python_runs(capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(r"\[\(0\.01, .*\), \(0\.05, .*\)\] [01]\.\d+\n", capsys.readouterr().out)


def test_commands_parse():
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("dememo ")]
    assert len(lines) == 8
    for line in lines:
        cli.parse(shlex.split(line)[1:])


def test_files_it_names_exist():
    for name in re.findall(r"\b(?:benchmarks|docs|experiments|tests)/[\w./-]+\w", README.read_text()):
        assert (README.parent / name).exists(), name
