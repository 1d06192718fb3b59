"""Runs a full training of the command line, and keeps what came of it as JSON beside this file.

From the repository's root, after the README's installation (minutes for each)::

    python tests/learning/run.py shipped
    python tests/learning/run.py reagent-pendulum --data ../shared/data

``results/NAME.json`` has the table, the returns of each seed, the versions, and the command that made it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Options of ``iql-plugins train`` by the name of the run.
RUNS = {
    "shipped": ["--seeds", "5", "--stack", "1"],
    "reagent-pendulum": [
        *("--dataset", "{data}/reagent_pendulum_mixed.npz", "--env", "Pendulum-v1", "--preset", "pendulum"),
        *("--n-steps", "8000", "--seeds", "5", "--stack", "1", "--episodes", "100"),
    ],
    "reagent-cartpole": [
        *("--dataset", "{data}/reagent_cartpole_mixed.npz", "--env", "CartPole-v0", "--preset", "pendulum"),
        *("--n-steps", "3000", "--seeds", "5", "--stack", "1"),
    ],
}
RESULTS = Path(__file__).parent / "results"


def learn(name: str, data: str, extra: list[str]) -> dict[str, Any]:
    """Trains, and returns what is worth keeping."""
    options = [option.format(data=data) for option in RUNS[name]] + extra
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "iql_plugins.cli", "train", *options, "--run-dir", f"{folder}/run", "--json"]
        document = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    kept = ("env", "adapter", "seeds", "episodes", "n_steps", "results", "seconds", "environment")
    by_seed = [
        {key: unit[key] for key in ("seed", "method", "final_mean_return", "best_mean_return", "best_step", "seconds")}
        | {"curve": [[step, sum(returns) / len(returns)] for step, returns in unit["evaluations"]]}
        for unit in document["by_seed"]
    ]
    return {
        "command": " ".join(["iql-plugins", "train", *options]),
        **{key: document[key] for key in kept},
        "by_seed": by_seed,
    }


def summary(document: dict[str, Any]) -> dict[str, Any]:
    """What is claimed of a run: whether IQL is above behaviour cloning and above the data, and how clearly."""
    results = document["results"]
    final, cloning, data = results["IQL final"], results["behaviour cloning"], results["data"]
    means: dict[str, dict[int, float]] = {}
    for unit in document["by_seed"]:
        means.setdefault(unit["method"], {})[unit["seed"]] = unit["final_mean_return"]
    return {
        "above_behaviour_cloning": final["mean_return"] > cloning["mean_return"],
        "above_data": final["mean_return"] > data["mean_return"],
        "intervals_do_not_overlap": final["confidence_95"][0] > cloning["confidence_95"][1],
        "above_both_at_every_seed": all(
            mean > max(means["behaviour cloning"][seed], data["mean_return"]) for seed, mean in means["IQL"].items()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=RUNS)
    parser.add_argument("--data", default="../shared/data", help="folder of the datasets of others")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    arguments, extra = parser.parse_known_args()
    document = learn(arguments.name, arguments.data, extra)
    document = {"command": document.pop("command"), "summary": summary(document), **document}
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / f"{arguments.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    sys.stdout.write(f"{json.dumps(document['results'], indent=1)}\n{json.dumps(document['summary'])}\n")


if __name__ == "__main__":
    main()
