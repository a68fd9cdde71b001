"""Two processes search together: the first decides for both, one of them writes, both end equal."""

import json

from tests.accuracy_aware.loops_helpers import Training, adaptive, holds_up_to
from tests.integration.processes import as_rank, run_in_processes


def work(rank, folder):
    with as_rank(rank, folder):
        ideal = holds_up_to(0.62)
        # Each process measures something else, and would go its own way.
        training = Training(adaptive(patience_epochs=1), lambda t: ideal(t) - 5 * rank)
        loop = training.loop()
        training.run(loop, folder / "runs")
        result = {
            "rate": training.controller.compression_rate,
            "folder": str(loop.log_dir),
            "epochs": loop.statistics.to_dict()["epochs"],
            "weights": {name: float(value.double().sum()) for name, value in training.model.state_dict().items()},
        }
        (folder / f"{rank}.json").write_text(json.dumps(result))
        assert rank == 0 or not loop.statistics.epochs[-1].is_candidate or loop.statistics.epochs[-1].budget >= 0


def test_two_processes_search_together(tmp_path):
    run_in_processes(work, (tmp_path,), 2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    for epoch in (*first["epochs"], *second["epochs"]):
        del epoch["loss"]  # each has its own
    assert first == second
    assert 0.55 < first["rate"] < 0.63
    runs = list((tmp_path / "runs" / "accuracy_aware_training").iterdir())
    assert len(runs) == 1 and (runs[0] / "statistics.json").exists()
