"""The command line: verbs, options, and how an error reaches the user.

Knows what can be asked, not how it is done: each verb is one function elsewhere, imported when it
is asked for, so that `plan`, `status` and `--help` start neither MPI nor torch.
"""

import argparse
import gc
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mpichunk import __version__
from mpichunk.errors import ExitCode, UserError
from mpichunk.words import parse_size

EPILOG = """\
exit codes: 0 every block done; 2 a mistake that you can fix; 3 blocks failed; 75 stopped before
the end, run again to go on; 1 anything else
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    options = _parser().parse_args(arguments)
    # Or every rank looks for plug-ins of pydantic in the metadata of every package there is.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        return int(_VERBS[options.verb](options))
    except UserError as error:
        print(f"mpichunk: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    except KeyboardInterrupt as error:
        return _say_interrupted(options.verb, *error.args)
    except ImportError as error:
        # What an extension makes of a Ctrl-C that meets it while it is being loaded.
        if not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        return _say_interrupted(options.verb)
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; nobody is there to be told.
        sys.stderr.close()
        return ExitCode.UNEXPECTED


def _say_interrupted(verb: str, *words: object) -> int:
    told = "".join(f"; {word}" for word in words) or _INTERRUPTED.get(verb, "")
    print(f"mpichunk: interrupted{told}", file=sys.stderr)
    return ExitCode.UNEXPECTED


def entry() -> NoReturn:
    """Run one verb and end the process with its exit code."""
    code = main()
    if code == ExitCode.UNEXPECTED and threading.active_count() > 1:
        # What was interrupted may compute on, and a framework's thread that wakes up while the
        # interpreter ends takes the process down with a dump of its stack.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="mpichunk",
        description="Run a 3D convolutional network over a volume of any size, on MPI ranks.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"mpichunk {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    run = _add_verb(
        verbs, "run", "run the network over the volume; resumes an earlier run by itself"
    )
    run.add_argument(
        "--fresh",
        action="store_true",
        help="set the journal aside and compute every block again, overwriting in place",
    )

    _add_plan(verbs)

    status = _add_verb(verbs, "status", "show the progress of a run, also while it runs")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--watch", action="store_true", help="repeat until the run ends")
    status.add_argument(
        "--check",
        action="store_true",
        help="exit with 0, 3 or 75 according to the journal: all done, blocks failed, not finished "
        "or not started",
    )

    _add_verb(verbs, "stop", "ask a running job to finish the blocks in progress, and end")

    verify = _add_verb(verbs, "verify", "re-read the output and compare it with the journal")
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.add_argument(
        "--repair",
        action="store_true",
        help="mark blocks that are missing or differ undone, so that the next run computes them",
    )

    _add_bench(verbs)
    _add_tune(verbs)
    return parser


def _add_plan(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb that looks ahead."""
    plan = _add_verb(
        verbs,
        "plan",
        "show what a run would do and cost, before it starts; runs no network, so only `bench` and "
        "`run` can check whether patch.shape suits it",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument(
        "--schema",
        action=_PrintSchema,
        nargs=0,
        help="print the JSON schema of configs, for editors, and exit",
    )
    plan.add_argument("--ranks", type=_positive, default=1, metavar="N", help="plan for N ranks")
    plan.add_argument(
        "--suggest",
        action="store_true",
        help="print block shapes that would be faster or fit the memory; changes nothing",
    )
    plan.add_argument(
        "--memory",
        type=_size,
        metavar="SIZE",
        help="with --suggest: memory that one rank may use where its network runs, e.g. 16GB "
        "(default: what is available on this machine, or was on the accelerator when it was "
        "measured)",
    )
    plan.add_argument(
        "--host-memory",
        type=_size,
        metavar="SIZE",
        help="with --suggest, for a network on an accelerator: host memory that one rank may use "
        "(default: what is available on this machine)",
    )


def _add_bench(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb that measures."""
    bench = _add_verb(verbs, "bench", "measure this machine: the network alone, the whole run")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.add_argument(
        "--repeats",
        type=_positive,
        default=3,
        metavar="N",
        help="repeat N times (default: %(default)s)",
    )
    bench.add_argument(
        "--blocks",
        type=_positive,
        metavar="N",
        help="blocks per rank and repeat (default: as many as take about half a minute)",
    )
    bench.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="folder for the output, which is removed afterwards (default: beside the real one)",
    )


def _add_tune(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb that tries variants."""
    tune = _add_verb(
        verbs, "tune", "try precisions, kernels, backends and batch sizes here; write the best"
    )
    tune.add_argument("--json", action="store_true", help="print JSON")
    tune.add_argument(
        "--repeats",
        type=_positive,
        default=5,
        metavar="N",
        help="repeat N times (default: %(default)s)",
    )
    tune.add_argument(
        "--tolerance",
        type=_positive_number,
        default=1e-3,
        metavar="SHARE",
        help="largest difference from float32, as a share of the range of the activated values "
        "(default: %(default)s)",
    )
    tune.add_argument(
        "--limit-seconds",
        type=_positive_number,
        default=600.0,
        metavar="S",
        help="start no variant after S seconds (default: %(default)g)",
    )
    tune.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="config file to write if a better variant is found (default: CONFIG-tuned.yaml); an "
        "existing file is refused",
    )


def _add_verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, help_text: str
) -> argparse.ArgumentParser:
    """Add a verb that takes a config and overrides."""
    verb = verbs.add_parser(name, help=help_text, description=help_text, epilog=EPILOG)
    verb.add_argument("config", type=Path, metavar="CONFIG", help="config file, YAML")
    verb.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one value of the config, YAML syntax; may be repeated",
    )
    return verb


def _positive(text: str) -> int:
    """Return a whole number above zero."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above zero")
    return int(text)


def _positive_number(text: str) -> float:
    """Return a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return value


def _size(text: str) -> int:
    """Return a number of bytes."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _run(options: argparse.Namespace) -> int:
    # What is imported stays: looking for garbage among it took 8 % of the CPU time of a start.
    gc.disable()
    from mpichunk.verbs.run import run

    gc.enable()
    return run(options.config, options.overrides, fresh=options.fresh)


def _plan(options: argparse.Namespace) -> int:
    from mpichunk.verbs.plan import Options, preview

    return preview(
        options.config,
        options.overrides,
        Options(
            num_ranks=options.ranks,
            as_json=options.json,
            suggest=options.suggest,
            memory_nbytes=options.memory,
            host_memory_nbytes=options.host_memory,
        ),
    )


def _status(options: argparse.Namespace) -> int:
    from mpichunk.verbs.status import status

    return status(
        options.config,
        options.overrides,
        as_json=options.json,
        watch=options.watch,
        check=options.check,
    )


def _stop(options: argparse.Namespace) -> int:
    from mpichunk.verbs.status import stop

    return stop(options.config, options.overrides)


def _verify(options: argparse.Namespace) -> int:
    from mpichunk.verbs.verify import verify

    return verify(options.config, options.overrides, repair=options.repair, as_json=options.json)


def _bench(options: argparse.Namespace) -> int:
    from mpichunk.verbs.bench import Options, bench

    return bench(
        options.config,
        options.overrides,
        Options(
            num_repeats=options.repeats,
            num_blocks=options.blocks,
            scratch=options.scratch,
            as_json=options.json,
        ),
    )


def _tune(options: argparse.Namespace) -> int:
    from mpichunk.verbs.tune import Options, tune

    return tune(
        options.config,
        options.overrides,
        Options(
            num_repeats=options.repeats,
            tolerance=options.tolerance,
            limit_seconds=options.limit_seconds,
            write=options.write,
            as_json=options.json,
        ),
    )


class _PrintSchema(argparse.Action):
    """Like `--help`: needs no config, prints and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from mpichunk.config.file import json_schema

        print(json_schema())
        parser.exit()


_INTERRUPTED = {
    "run": "; the same command goes on where it stopped",
    "tune": "; no config was written",
}
"""What an interrupt means to a verb, where that is not plain and it says nothing else."""

_VERBS = {
    "run": _run,
    "plan": _plan,
    "status": _status,
    "stop": _stop,
    "verify": _verify,
    "bench": _bench,
    "tune": _tune,
}
