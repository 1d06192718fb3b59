"""The tables in ``examples/choosing_hyperparameters.md``, from what is declared; prints them."""

from dataclasses import MISSING, fields

from iql_d3rlpy import IQLConfig as D3rlpyConfig
from iql_d3rlpy.algorithm import named
from iql_plugins.config import IQLConfig, hyperparameters
from iql_plugins.losses.objectives import SHIPPED
from iql_sb3.conversion import NAMES, NETWORK_NAMES, OWN

#: Where d3rlpy has them, if not in a field of the configuration.
D3RLPY = {
    "actor_schedule": "`actor_schedule_steps`",
    "hidden_sizes": "encoder factories",
    "actor_dropout": "`actor_encoder_factory`",
    "max_grad_norm": "optimiser factories",
    "normalize_observations": "`observation_scaler`",
    "reward_scale": "`reward_scaler`",
    "reward_shift": "`reward_scaler`",
    "compile": "`compile_graph`",
}


def table() -> str:
    """In Markdown."""
    lines = [
        "| hyper-parameter | default | must be | Stable-Baselines3 | d3rlpy | what it is |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    d3rlpy = {name: f"`{theirs}`" for name, theirs in named(D3rlpyConfig).items()} | D3RLPY
    for each in fields(IQLConfig):
        name, text = each.name, each.metadata["description"]
        default = each.default if each.default is not MISSING else {}
        default = "-".join(map(str, default)) if isinstance(default, tuple) else default
        cells = [f"`{name}`", f"{default}", each.metadata["range"].words, sb3(name), d3rlpy[name], text.rstrip(".")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def options_table() -> str:
    """Of the objectives that have options, in Markdown."""
    lines = ["| objective | option | default | must be | what it is |", "| --- | --- | --- | --- | --- |"]
    for entry in SHIPPED:
        for name, option in entry.options.items():
            text = option.description.rstrip(".")
            cells = [f"`{entry.name}`", f"`{name}`", f"{option.default}", option.range.words, text]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sb3(name: str) -> str:
    """Where Stable-Baselines3's model has one."""
    if name in OWN:
        return f"`{NAMES.get(name, name)}`"
    if name in hyperparameters("networks"):
        return f'`policy_kwargs["{NETWORK_NAMES.get(name, name)}"]`'
    return "`learning_rate`"


if __name__ == "__main__":
    print(table(), options_table(), sep="\n\n")  # noqa: T201
