"""Check what the demonstration reports: it learnt the task, and the merge kept what training scored."""

import json
import sys
from pathlib import Path

REPORT = Path(__file__).resolve().parent.parent / "runs" / "demo" / "report.json"


def main() -> None:
    """Print each figure beside its bound; exit with 1 if one is out of bounds."""
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    match, merged = report["exact_match"], report["kl_reference_vs_merged"]
    checks = [
        ("exact match, tuned", match["tuned"], ">= 0.95", match["tuned"] >= 0.95),
        ("exact match, base", match["base"], "<= 0.5", match["base"] <= 0.5),
        ("held-out questions", match["questions"], ">= 60", match["questions"] >= 60),
        ("KL to training, merged", merged, "<= 0.005", merged <= 0.005),
        (
            "KL to training, usual merge",
            report["kl_reference_vs_naive_merge"],
            f"> {5 * merged:.5f}",
            report["kl_reference_vs_naive_merge"] > 5 * merged,
        ),
        (
            f"tokens/s, {report['concurrent_streams']} streams",
            report["concurrent_tokens_per_second"],
            f"> {report['stream_tokens_per_second']:.0f}",
            report["concurrent_tokens_per_second"] > report["stream_tokens_per_second"],
        ),
        (
            "speed of one stream with the draft, of none",
            report["draft_gain"]["1"],
            "> 1",
            report["draft_gain"]["1"] > 1,
        ),
    ]
    for name, value, bound, holds in checks:
        print(f"{'ok    ' if holds else 'FAILED'} {name}: {value:.5g} (must be {bound})")
    if not all(holds for *_, holds in checks):
        sys.exit(f"The demonstration is not what it should be; its report is {REPORT}.")


if __name__ == "__main__":
    main()
