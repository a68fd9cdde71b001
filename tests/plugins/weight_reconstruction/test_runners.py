"""Forwards that pause: one at a time, and gone afterwards."""

import threading

import pytest
import torch

from compress_weight_reconstruction.runners import Runner, Surroundings, closing


def forward(log, name, stops=2):
    def run(runner):
        for number in range(stops):
            log.append((name, number))
            runner.pause(str(number), number)
        log.append((name, "end"))
        return name

    return run


def alive():
    return [t for t in threading.enumerate() if t.name == "weight reconstruction"]


def test_runners_run_only_when_they_are_told_to():
    log = []
    first, second = (Runner(forward(log, name), Surroundings()) for name in "ab")
    with closing([first, second]):
        assert first.advance().key == "0"
        assert second.advance().value == 0
        assert first.advance().key == "1"
        assert first.advance() is None
        assert first.result == "a" and first.is_finished and not second.is_finished
        assert log == [("a", 0), ("b", 0), ("a", 1), ("a", "end")]
    assert not alive()
    assert ("b", "end") not in log


def test_an_exception_of_a_forward_comes_out_where_it_is_advanced():
    def fail(runner):
        runner.pause("here", None)
        raise ValueError("no")

    runner = Runner(fail, Surroundings())
    with closing([runner]):
        runner.advance()
        with pytest.raises(ValueError, match="no"):
            runner.advance()
    assert not alive()


def test_a_forward_that_catches_everything_is_ended_as_well():
    def stubborn(runner):
        for number in range(3):
            try:
                runner.pause(str(number), None)
            except BaseException:  # what a careless model might do
                continue

    runner = Runner(stubborn, Surroundings())
    with closing([runner]):
        runner.advance()
    assert not alive()


def test_surroundings_of_the_thread_are_those_of_its_creator():
    class Mode(torch.overrides.TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Mode.seen += 1
            return func(*args, **(kwargs or {}))

    def look(runner):
        return (
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.empty(1).device,
            torch.empty(1).dtype,
        )

    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"), Mode():
            runner = Runner(look, Surroundings())
            Mode.seen = 0
            assert runner.advance() is None
            assert Mode.seen > 0
    finally:
        torch.set_default_dtype(torch.float32)
    assert runner.result == (False, True, torch.bfloat16, torch.device("meta"), torch.float64)


def test_each_runner_draws_its_own_random_numbers_and_the_global_generator_stays():
    def draw(runner):
        first = torch.rand(2)
        runner.pause("here", None)
        return torch.cat([first, torch.rand(2)])

    before = torch.get_rng_state()
    runners = [Runner(draw, Surroundings()) for _ in range(2)]
    with closing(runners):
        for runner in [*runners, *runners]:
            runner.advance()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runners[0].result, runners[1].result)
    assert torch.equal(runners[0].result, torch.rand(4))
    torch.set_rng_state(before)


def test_context_variables_hold_in_the_thread():
    import contextvars

    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)
    runners = [Runner(lambda runner: variable.get(), Surroundings()) for _ in range(2)]
    with closing(runners):
        assert [runner.advance() or runner.result for runner in runners] == [7, 7]
