"""The tables of what `loss.py` measured.

    python benchmarks/speed/loss_report.py benchmarks/results/loss.csv

Writes them to the Markdown file of that name, after its line "## Tables"; what
is above stays.
"""

import argparse
import csv
import pathlib

SECTION = "## Tables"
ORDERS = (1, 5)


def read(path):
    """Return `{(backend, program): {cell: {loss: row}}}`, the newest rows."""
    tables = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            cells = tables.setdefault((row["backend"], row["program"]), {})
            cell = (int(row["classes"]), int(row["batch"]), row["form"])
            cells.setdefault(cell, {})[row["loss"]] = row
    return tables


def ratio(row, clock):
    """Return a ratio and its quartiles as text."""
    low, middle, high = (
        float(row[f"{clock}_{part}"]) for part in ("low", "ratio", "high")
    )
    return f"**{middle:.2f}** [{low:.2f}, {high:.2f}]"


def times(cells):
    """Return the lines of the table of ratios."""
    columns = [f"{name} M={m}" for m in ORDERS for name in ("PTLoss", "before")]
    lines = [
        "| C | batch | form | KL, µs | "
        + " | ".join(f"{name} | CPU" for name in columns)
        + " | cross-entropy |",
        "|---" * (5 + 2 * len(columns)) + "|",
    ]
    for cell, rows in cells.items():
        fastest = min(
            float(row["wall_us"])
            for name, row in rows.items()
            if name.endswith("KL")
        )
        parts = [f"{cell[0]:,}", f"{cell[1]:,}", cell[2], f"{fastest:,.0f}"]
        for name in columns:
            known = name in rows
            parts.append(ratio(rows[name], "wall") if known else "-")
            parts.append(
                f"{float(rows[name]['cpu_ratio']):.2f}" if known else "-"
            )
        parts.append(f"{float(rows['Keras cross-entropy']['wall_ratio']):.2f}")
        lines.append(f"| {' | '.join(parts)} |")
    return lines


def counts(cells):
    """Return a sentence on how many cells are within the goal."""
    ratios = {
        m: [
            float(rows[f"PTLoss M={m}"]["wall_ratio"])
            for rows in cells.values()
        ]
        for m in ORDERS
    }
    texts = [
        f"order {m}: {sum(x <= 1.05 for x in values)} of {len(values)} cells "
        f"at most 1.05, the largest {max(values):.2f}, the median "
        f"{sorted(values)[len(values) // 2]:.2f}"
        for m, values in ratios.items()
    ]
    return f"By the wall, {'; '.join(texts)}."


def passes(cells):
    """Return the lines of the table of passes, at the cell that is nearest."""
    lines = [
        "| form | loss | passes | bytes a value | exp, log a value |",
        "|---" * 5 + "|",
    ]
    for (classes, batch, form), rows in cells.items():
        if (classes, batch) == (1000, 256):
            lines += [
                f"| {form} | {name} | {row['passes']} | {row['bytes']} | "
                f"{row['transcendentals']} |"
                for name, row in rows.items()
            ]
    return lines


def main():
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("csv", type=pathlib.Path)
    path = parser.parse_args().csv
    lines = [SECTION]
    for (backend, program), cells in read(path).items():
        facts = {
            row["facts"] for rows in cells.values() for row in rows.values()
        }
        lines += ["", f"### {backend}: {program}", "", *sorted(facts), ""]
        lines += [counts(cells), "", *times(cells), ""]
        lines += ["At C = 1,000, batch 256:", "", *passes(cells)]
    report = path.with_suffix(".md")
    text = report.read_text() if report.exists() else ""
    above = text.split(f"\n{SECTION}\n")[0].rstrip("\n")
    report.write_text(f"{above}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
