"""The page of the command line: every command with its arguments, from the parser itself."""

from __future__ import annotations

import argparse

# What the commands are explained by.
EXPLAINED = {
    "check": "config.md",
    "choices": "plugins.md#choice-points",
    "compare": "export.md#compare-files-and-runtimes",
    "plan": "plan.md",
    "schema": "reference/config.md",
    "trace": "trace.md#the-command",
}


def cli_page(parser: argparse.ArgumentParser) -> str:
    """Returns the page.

    Args:
        parser: The parser of `compress-core`.
    """
    lines = [
        "# Command line",
        "",
        "Made from the parser by `python -m docs.make_reference`; `compress-core COMMAND --help` prints the same.",
        "A command ends with status 0, with 1 if it found a problem, and with 2 if its arguments are wrong.",
        "",
        "| command | what it does |",
        "| --- | --- |",
    ]
    commands = _commands(parser)
    lines += [f"| [`{name}`](#{name}) | {text} |" for name, (text, _) in commands.items()]
    lines.append("")
    for name, (text, command) in commands.items():
        lines += [f"## `{name}`", "", f"{text[:1].upper()}{text[1:]}.", "", "```text", _usage(command), "```", ""]
        if name in EXPLAINED:
            page = EXPLAINED[name].removeprefix("reference/")
            where = page if page != EXPLAINED[name] else f"../{page}"
            lines += [f"Explained under [{page.partition('.')[0].replace('_', ' ')}]({where}).", ""]
        if command.description and command.description.rstrip(".") != text:
            lines += [command.description, ""]
        rows = [_row(action) for action in command._actions if action.dest != "help"]
        if rows:
            lines += ["| argument | meaning |", "| --- | --- |", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def _commands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    help_of = {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {name: (help_of.get(name, ""), command) for name, command in sorted(action.choices.items())}


def _usage(command: argparse.ArgumentParser) -> str:
    """Returns the line of use, put together here because argparse breaks lines as wide as the terminal is."""
    shown = [(action, *_names(action)) for action in command._actions if action.dest != "help"]
    optional = [name if action.required else f"[{name}]" for action, name, _ in shown if action.option_strings]
    positional = [
        f"[{name}]" if action.nargs == "?" else name for action, name, _ in shown if not action.option_strings
    ]
    return " ".join([command.prog, *positional, *optional])


def _names(action: argparse.Action) -> tuple[str, list[str]]:
    """Returns how an argument is written, and its spellings."""
    if action.metavar is not None:
        word = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    elif action.choices is not None:
        word = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        word = action.dest.upper()
    if action.nargs == 0:
        word = ""
    elif action.nargs in ("+", "*"):
        word = f"{word} ..."
    if not action.option_strings:
        return word, [word]
    return f"{action.option_strings[-1]} {word}".strip(), [
        f"{option} {word}".strip() for option in action.option_strings
    ]


def _row(action: argparse.Action) -> str:
    text = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    if isinstance(action, argparse._AppendAction):
        text += "; may be given several times"
    spellings = ", ".join(f"`{name}`" for name in _names(action)[1])
    return f"| {_cell(spellings)} | {_cell(text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
