"""Writes benchmarks/README.md from the committed results."""

from __future__ import annotations

import json
from pathlib import Path

HEAD = """# Benchmarks

`make benchmarks` runs them all; each prints a table and writes `results/NAME.json`. This page is made from those
files by `python benchmarks/_readme.py`.
"""


def main() -> None:
    folder = Path(__file__).parent
    parts = [HEAD]
    for path in sorted((folder / "results").glob("*.json")):
        result = json.loads(path.read_text())
        machine = result["machine"]
        parts.append(
            f"## {result['name']}\n\n`{result['command']}` on {machine['cores']} cores ({machine['cpu']}), "
            f"{machine['memory_gib']} GiB, {result['date'][:10]}, commit {result['commit'][:12]}.\n"
        )
        parts.append("| target | figure | wanted | holds |\n|---|---|---|---|")
        for target in result["targets"]:
            holds = "yes" if target["holds"] else "**no**"
            parts.append(f"| {target['what']} | {target['figure']:.2f} | {target['target']} | {holds} |")
        parts.append("")
    (folder / "README.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
