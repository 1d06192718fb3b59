"""Trains with one hyper-parameter changed at a time, and keeps what it does to the return and to the health metrics.

From the repository's root, after the README's installation (half an hour on two cores; goes on where it was stopped)::

    python tests/learning/vary.py

``results/vary.json`` has, for each change, the command, the final return of each seed (a mean over the same 20
episodes), and the means of the health metrics over the last quarter of the training, seed by seed.
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "vary.json"
SEEDS = 3
COMMON = ["--seeds", str(SEEDS), "--baseline", "none", "--episodes", "20", "--evaluation-episodes", "2"]
#: Without a change: the shipped dataset, and the command line's defaults for it.
CHANGES = [
    "",
    *("--expectile 0.5", "--expectile 0.9", "--expectile 0.99"),
    *("--temperature 0", "--temperature 0.5", "--temperature 10"),
    *("--reward-scale 1", "--no-normalize-observations", "--discount 0.9"),
    *("--n-steps 2000", "--hidden-sizes 16 16"),
]
HEALTH = (
    "effective_sample_size",
    "share_at_max_weight",
    "share_value_above_q",
    "mean_value",
    "mean_qvalue",
    "entropy",
)


def learn(change: str) -> dict[str, Any]:
    """Trains all seeds, and returns what is kept."""
    given = [*change.split(), *COMMON]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "iql_plugins.cli", "train", *given, "--run-dir", str(run), "--json"]
        document = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        health: dict[str, list[float]] = {name: [] for name in HEALTH}
        for seed in range(SEEDS):
            with (run / f"seed-{seed}" / "metrics.csv").open() as file:
                rows = list(csv.DictReader(file))
            for name, values in health.items():
                values.append(statistics.mean(float(row[name]) for row in rows[-len(rows) // 4 :]))
    return {
        "change": change,
        "command": " ".join(["iql-plugins", "train", *given]),
        "final_mean_return": [unit["final_mean_return"] for unit in document["by_seed"]],
        "health": health,
        "versions": document["environment"]["packages"],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results in Markdown, as ``examples/choosing_hyperparameters.md`` shows them."""
    names = ("effective_sample_size", "share_at_max_weight", "share_value_above_q", "entropy")
    lines = [
        "| change | final return of each seed | effective sample size | at max weight | V above Q | entropy | mean V |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in results:
        change = f"`{entry['change']}`" if entry["change"] else "none"
        returns = ", ".join(f"{value:.0f}" for value in entry["final_mean_return"])
        means = {name: statistics.mean(values) for name, values in entry["health"].items()}
        cells = [change, returns, *(f"{means[name]:.3f}" for name in names), f"{means['mean_value']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    known = {entry["change"] for entry in done}
    for change in (change for change in CHANGES if change not in known):
        done.append(learn(change))
        RESULTS.write_text(json.dumps(done, indent=1) + "\n")
        sys.stdout.write(f"{done[-1]['change'] or 'no change'}: {done[-1]['final_mean_return']}\n")
    sys.stdout.write(f"{table(done)}\n")


if __name__ == "__main__":
    main()
