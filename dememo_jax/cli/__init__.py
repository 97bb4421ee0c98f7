"""The command line: parse, run, and turn every expected failure into one sentence and an exit code."""

import sys
from collections.abc import Sequence
from typing import Any

import tyro

from dememo_jax.cli import configs
from dememo_jax.errors import BadInput, NonFinite

DESCRIPTION = "Model dememorization: protect data, train, unlearn, audit the forgetting, certify its depth."
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The configuration that the arguments spell; exits with the usage on unknown ones."""
    return tyro.extras.subcommand_cli_from_dict(configs.COMMANDS, prog="dememo", description=DESCRIPTION, args=arguments)


def execute(config: Any) -> dict:
    """Run one command and show its result; raises as the library does."""
    # Only now, so that --help and bad arguments answer at once.
    from dememo_jax import report
    from dememo_jax.cli import console, quickstart

    every = {**quickstart.WORK, **quickstart.STAGES}
    done = every[type(config)](config)
    for table in report.section(done["sections"][0]).tables:
        console.table(table)
    console.announce(done)
    if (config.run / "result.json").exists():
        console.say(f"page: {config.run / 'report.html'}   numbers: {config.run / 'result.json'}")
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    config = parse(arguments)
    from dememo_jax.cli import console

    try:
        execute(config)
    except BadInput as error:
        console.error(str(error))
        sys.exit(BAD_INPUT)
    except NonFinite as error:
        console.error(f"{error}. The last good checkpoint is kept in {config.run}")
        sys.exit(FAILED)
    except OSError as error:
        console.error(
            f"cannot write to {config.run}: {error}. Free space or choose another --run; the same command then goes on"
        )
        sys.exit(FAILED)
    except KeyboardInterrupt:
        console.error("interrupted; the same command goes on from the last checkpoint")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
