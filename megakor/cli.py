"""`megakor <verb> [<subverb>] key=value …`: the command line. Each verb's main is a module of its own."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterable

from megakor import __version__
from megakor.config.compose import main as run_verb
from megakor.config.verbs import VERBS, Verb, find_verb, subverbs

HELP = ("-h", "--help", "help")


def listed(verbs: Iterable[Verb]) -> str:
    """Verbs and what they do, one a line."""
    verbs = list(verbs)
    width = max(len(verb.name) for verb in verbs)
    return "\n".join(f"  {verb.name:<{width}}  {verb.summary}" for verb in verbs)


def usage() -> str:
    """The verbs in the order of the arc."""
    return (
        f"megakor {__version__}: Korean language models from raw text to a served model\n\n"
        f"usage: megakor <verb> key=value …      megakor <verb> --help shows its keys\n\n{listed(VERBS.values())}\n"
    )


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `megakor` command, and of the mains whose verb has subverbs.

    Args:
        arguments: the command line; None: `sys.argv`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        print(usage(), end="")
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    below = subverbs(arguments[0])
    if below and arguments[0] not in VERBS and arguments[1:2] and arguments[1] in HELP:
        name = arguments[0]
        print(f"usage: megakor {name} <subverb> key=value …      megakor {name} <subverb> --help shows its keys\n")
        print(listed(below))
        return
    try:
        verb, rest = find_verb(arguments)
    except ValueError as error:
        print(f"megakor: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    gc.disable()  # a third of the imports' time goes to it, for nothing; `run_verb` turns it on
    found = importlib.util.find_spec(verb.module)
    package = found is not None and found.submodule_search_locations is not None
    module = importlib.import_module(verb.module + ".__main__" if package else verb.module)
    run_verb(verb.name, module.run, rest)


if __name__ == "__main__":
    main()
