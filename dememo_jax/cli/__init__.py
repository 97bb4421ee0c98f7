"""The command line: parse, run, and turn every expected failure into one sentence and an exit code.

Imports stand inside the functions, so that Ctrl-C ends the process in words from its first moment on, and --help and bad
arguments answer at once.
"""

import sys
from collections.abc import Sequence
from typing import Any

DESCRIPTION = "Model dememorization: protect data, train, unlearn, audit the forgetting, certify its depth."
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
STOPPED = "interrupted; the same command goes on from the last checkpoint"


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The configuration that the arguments spell; exits with the usage on unknown ones, and with the version on --version."""
    if list(sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        from dememo_jax import __version__

        print(f"dememo {__version__}")
        sys.exit(0)
    import tyro

    from dememo_jax.cli import configs

    return tyro.extras.subcommand_cli_from_dict(configs.COMMANDS, prog="dememo", description=DESCRIPTION, args=arguments)


def execute(config: Any) -> dict:
    """Run one command and show its result; raises as the library does."""
    from dememo_jax import report
    from dememo_jax.cli import checks, console, quickstart, runs
    from dememo_jax.errors import BadInput

    checks.check(config)
    runs.start_devices()
    every = {**quickstart.WORK, **quickstart.STAGES}
    refused = False
    try:
        done = every[type(config)](config)
    except BadInput:
        refused = True
        raise
    finally:
        runs.leave(refused=refused)
    for table in report.sections(done)[0].tables:
        console.table(table)
    console.announce(done)
    if (config.run / "result.json").exists():
        console.say(f"page: {config.run / 'report.html'}   numbers: {config.run / 'result.json'}")
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """`dememo` with these arguments, by default those of the process. Leaves by SystemExit unless all went well."""
    try:
        if arguments is None:
            from dememo_jax.cli import interrupts

            interrupts.end_at_once(INTERRUPTED, f"error: {STOPPED}\n")
        code = _run(arguments)
    except KeyboardInterrupt:  # before that, or of a caller of ours, who handles the signal
        print(f"error: {STOPPED}", file=sys.stderr)
        code = INTERRUPTED
    if code:
        sys.exit(code)


def _run(arguments: Sequence[str] | None) -> int:
    """The command's exit code, its failures told in a sentence each."""
    from dememo_jax.cli import console

    console.prepare()
    try:
        config = parse(arguments)
    except OSError as error:  # of the usage, which nobody could read
        console.OUT.lose(error)
        return FAILED
    from dememo_jax.cli import failures

    try:
        execute(config)
    except failures.EXPECTED as error:
        console.error(failures.sentence(error, config.run))
        return failures.code(error)
    finally:
        lost = console.flush()
    if lost:
        console.error(f"cannot write to the standard output: {lost}. The result is in {config.run}")
    return FAILED if lost else 0


if __name__ == "__main__":
    main()
