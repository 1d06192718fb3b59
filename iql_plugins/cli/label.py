"""``iql-plugins label``: what an agent makes of each transition, as a file for other people's trainings."""

import json
from typing import Any

import numpy as np

from iql_plugins import checkpoint
from iql_plugins.cli.arguments import Label
from iql_plugins.cli.errors import imported, mistakes
from iql_plugins.cli.output import Result, new_file
from iql_plugins.cli.policies import load_agent
from iql_plugins.cli.settings import load_source
from iql_plugins.ope.labels import labels

__all__ = ["run"]


def run(arguments: Label) -> Result:
    """Writes a row for each transition.

    Raises:
        UserError: for a policy or dataset that cannot be read, that do not fit together, or a file that cannot be
            written.
    """
    pyarrow, parquet = imported("pyarrow", "parquet"), imported("pyarrow.parquet", "parquet")
    output = new_file("--output", arguments.output, ".parquet")
    agent = load_agent(arguments.policy, arguments.adapter, arguments.trust_pickle)
    source = load_source(
        arguments.dataset,
        trust_pickle=arguments.trust_pickle,
        discrete=agent.spaces.discrete,
        memmap_dir=arguments.memmap_dir,
    )
    count = len(source.tensors)
    document: dict[str, Any] = {
        "policy": arguments.policy,
        "dataset": arguments.dataset,
        "dataset_sha256": source.sha256,
        "reward_scale": float(agent.normalizers.get_buffer("reward_scale")),
        "reward_shift": float(agent.normalizers.get_buffer("reward_shift")),
        **agent.config.of("loss", "target"),
        "inverse_temperature": float(agent.loss.inverse_temperature),
    }
    floats = [(name, pyarrow.float32()) for name in ("value", "qvalue", "advantage", "weight")]
    fields = [*floats, *((name, pyarrow.int64()) for name in ("episode", "step", "row"))]
    schema = pyarrow.schema(fields, metadata={"iql_plugins": json.dumps(document)})
    totals = dict.fromkeys(("value", "qvalue", "advantage", "weight"), 0.0)
    written = 0
    with (
        mistakes(ValueError, OSError),
        checkpoint.replaced(output) as file,
        parquet.ParquetWriter(file, schema) as writer,
    ):
        for columns in labels(agent, source.tensors):
            rows = np.arange(written, written + len(columns["step"]))
            columns["row"] = rows if source.rows is None else source.rows[rows].numpy()
            writer.write_table(pyarrow.table(columns, schema=schema))
            written += len(rows)
            totals = {name: total + float(columns[name].sum(dtype=np.float64)) for name, total in totals.items()}
    document |= {"output": str(output), "rows": count, "dropped": source.dropped}
    document["means"] = {name: total / count for name, total in totals.items()}
    means = ", ".join(f"{name} {mean:.4g}" for name, mean in document["means"].items())
    lines = [f"wrote {output}: {count:,} rows; mean {means}"]
    if source.rows is not None:
        lines.append("some rows of the source are no transitions: column 'row' has the source's row of each")
    return Result(document, lines)
