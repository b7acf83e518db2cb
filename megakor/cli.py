"""`megakor <verb> key=value …`: the command line. Each verb's main is a module of its own."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys

from megakor import __version__
from megakor.config.compose import main as run_verb
from megakor.config.verbs import VERBS


def usage() -> str:
    """The verbs in the order of the arc."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb.name:<{width}}  {verb.summary}" for verb in VERBS.values())
    return (
        f"megakor {__version__}: Korean language models from raw text to a served model\n\n"
        f"usage: megakor <verb> key=value …      megakor <verb> --help shows its keys\n\n{verbs}\n"
    )


def main() -> None:
    """Entry point of the `megakor` command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return
    if arguments[0] == "--version":
        print(__version__)
        return
    verb = VERBS.get(arguments[0])
    if verb is None:
        near = difflib.get_close_matches(arguments[0], VERBS, n=1)
        hint = f"; nearest: {near[0]}" if near else ""
        print(f"megakor: error: verb {arguments[0]} must be one of {', '.join(VERBS)}{hint}", file=sys.stderr)
        raise SystemExit(2)
    found = importlib.util.find_spec(verb.module)
    package = found is not None and found.submodule_search_locations is not None
    module = importlib.import_module(verb.module + ".__main__" if package else verb.module)
    run_verb(verb.name, module.run, arguments[1:])


if __name__ == "__main__":
    main()
