"""Plugins that tests make up."""

from compress_core import Algorithm, Plan, Stage, hookimpl


class Nothing(Algorithm):
    name = "nothing"
    stage = Stage.STRUCTURE

    @hookimpl
    def compress_plan(self):
        return Plan(())

    @hookimpl
    def compress_commit(self):
        pass


def plugin(**members):
    return type("Plugin", (), {name: hookimpl(f) if callable(f) else f for name, f in members.items()})()


def contributing(*classes):
    return plugin(compress_algorithms=lambda self: list(classes))


def algorithm(**members):
    return type("Mine", (Nothing,), {"name": "mine", **members})
