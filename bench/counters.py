"""The table of bench/counters.sh: counters.py CASES CSV.

CASES has a line `name launches` for each case, CSV what ncu read of all launches in their order. Launches of
one kernel in a case are one line, with means. Stalls are the share of a warp's time between two
instructions that it waits for the reason named; waiting for its turn is none.
"""
import csv, sys

DURATION = "gpu__time_duration.sum"
COLUMNS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "lts__t_sector_hit_rate.pct": "l2 hit %",
}
STALL = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
NONE = "selected", "not_selected"


def launches(path):
    """Of every launch its kernel and counters."""
    with open(path) as file:
        lines = [line for line in file if line.startswith('"')]
    rows = csv.DictReader(lines)
    units = next(rows)
    assert units[DURATION] in ("ns", "nsecond"), units[DURATION]
    return list(rows)


def number(row, metric):
    text = row.get(metric, "").replace(",", "")
    return float(text) if text else float("nan")


def stalls(rows):
    """The two most frequent reasons of some launches."""
    reasons = [metric for metric in rows[0] if metric.startswith(STALL[0]) and metric.endswith(STALL[1])]
    mean = {m[len(STALL[0]) : -len(STALL[1])]: sum(number(row, m) for row in rows) for m in reasons}
    total = sum(value for value in mean.values() if value == value)
    named = sorted(((v, name) for name, v in mean.items() if name not in NONE and v == v), reverse=True)
    return ", ".join(f"{name} {100 * value / total:.0f} %" for value, name in named[:2]) if total else ""


def main():
    cases, path = sys.argv[1:]
    rows = launches(path)
    print(f"{'case':<34} {'kernel':<26} {'us':>9} " + " ".join(f"{c:>8}" for c in COLUMNS.values()) + "  stalls")
    at = 0
    for line in open(cases):
        case, count = line.split()
        of, at = rows[at : at + int(count)], at + int(count)
        assert len(of) == int(count), f"{case}: {len(of)} of {count} launches"
        kernels = {}
        for row in of:
            kernels.setdefault(row["Kernel Name"].split("(")[0], []).append(row)
        for kernel, same in kernels.items():
            mean = lambda metric: sum(number(row, metric) for row in same) / len(same)
            name = kernel if len(same) == 1 else f"{kernel} x{len(same)}"
            figures = " ".join(f"{mean(metric):>8.1f}" for metric in COLUMNS)
            print(f"{case:<34} {name[-26:]:<26} {mean(DURATION) / 1e3:>9.2f} {figures}  {stalls(same)}")
            case = ""
    assert at == len(rows), f"{len(rows) - at} launches of no case"


main()
