"""Reads the output of `make demo` and refuses it where its last line is not what a newcomer is promised."""

import json
import pathlib
import sys

answer = json.loads(sys.stdin.read().splitlines()[-1])
missing = {"run", "report", "rows"} - set(answer)
if missing or not answer["rows"] or not pathlib.Path(answer["report"]).exists():
    sys.exit(
        f"make demo must end with the JSON line of evaluate (run, report, rows) and leave its report; got {answer}"
    )
rows = {row["name"]: row for row in answer["rows"]}
full = rows["full"]["label_agreement"]
adaptive = [
    row
    for row in rows.values()
    if row["macs_saved"] >= 0.25 and row["label_agreement"] >= full - 0.03 and "equal_macs_to" not in row
]
print(f"demo: full compute agrees on {full:.1%}; {len(adaptive)} rows save 25 % of MACs at a loss of 3 points at most")
for row in adaptive:  # a time is told, not asserted
    print(f"demo: {row['name']} saves {row['macs_saved']:.1%} of MACs and {row['time_saved']:.1%} of time")
if full < 0.95 or not adaptive or not any("equal_macs_to" in row for row in rows.values()):
    sys.exit(
        "make demo must reach 95 % label agreement, have an adaptive row that keeps it, and the fewer-steps baseline"
    )
