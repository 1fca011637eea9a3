"""What commands found out, as lines for a terminal. Computes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from mtserve.golden import GoldenReport
from mtserve.tuning import Report


def golden(reports: Sequence[GoldenReport]) -> dict[str, dict[str, Any]]:
    """Reports by task, JSON-ready; a difference that is no finite number is None."""
    return {
        r.task: {
            "rows": r.rows,
            "difference": r.difference if math.isfinite(r.difference) else None,
            "ok": r.reproduced,
        }
        for r in reports
    }


def facts(facts: dict[str, Any]) -> list[str]:
    """What `mtserve inspect` found."""
    lines: list[str] = []
    trunk, mib = facts["trunk"], {name: size / 2**20 for name, size in facts["bytes"].items()}
    longest = "rows of any length" if trunk["max_length"] is None else f"rows up to {trunk['max_length']} tokens"
    if (exported := facts["exported"]) is not None:
        how = f"{exported['dtype']} {exported['variant']}".rstrip()
        lines.append(f"a bundle in {how}, opset {exported['opset']}, of checkpoint {exported['checkpoint'][:12]}")
    lines.append(f"{facts['folder']}: format {facts['format']}, written by {facts['written_by']}")
    lines.append(
        f"trunk: {trunk['family']} from {trunk['source']}, {trunk['parameters'] / 1e6:.1f}M parameters, {longest}"
    )
    lines.append(f"fingerprint: {trunk['fingerprint']}")
    lines.append(f"on disk: {mib['all']:.1f} MiB, of which trunk {mib['trunk']:.1f} and heads {mib['heads']:.2f}")
    for name, profile in facts["profiles"].items():
        lines.append(f"profile {name}: {_profile_facts(profile)}")
    for task in facts["tasks"]:
        labels = f" of {', '.join(task['labels'])}" if task["labels"] else ""
        lines.append(f"\n{task['name']}: {task['kind']}{labels}")
        options = {name: value for name, value in task["options"].items() if name not in {"labels", "preparation"}}
        lines.append("  options: " + ", ".join(f"{name} {json.dumps(value)}" for name, value in options.items()))
        alone = "" if task["shares_passes"] else " (its own: it shares no passes with the other tasks)"
        if task["preparation"] or alone:
            lines.append(f"  preparation: {', '.join(task['preparation']) or 'none'}{alone}")
        if task["metrics"]:
            lines.append("  metrics: " + ", ".join(f"{name} {value:.3f}" for name, value in task["metrics"].items()))
        lines.append(f"  rows: {task['golden_rows']} golden, {task['calibration_rows']} calibration")
        report = facts.get("golden", {}).get(task["name"])
        if report:
            verdict = "reproduced" if report["ok"] else "NOT reproduced"
            difference = "not finite" if report["difference"] is None else f"{report['difference']:.2g}"
            lines.append(f"  golden rows {verdict}, largest difference {difference}")
    for chain in facts["chains"]:
        own = {name: value for name, value in chain.items() if name not in ("name", "link", "first", "then")}
        said = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in own.items())
        lines.append(f"\n{chain['name']}: chain of {chain['first']} and {chain['then']} by {chain['link']}\n  {said}")
    for name, reports in facts.get("golden_by_profile", {}).items():
        wrong = [task for task, report in reports.items() if not report["ok"]]
        lines.append(
            f"\nprofile {name}: golden rows " + (f"NOT reproduced: {', '.join(wrong)}" if wrong else "reproduced")
        )
    if "against" in facts:
        lines.append("\nagainst the other model: " + json.dumps(facts["against"], ensure_ascii=False, indent=1))
    return lines


def _profile_facts(profile: dict[str, Any]) -> str:
    tolerance = f"tolerance {profile['tolerance']:.2g}"
    compared = f", {profile['flips']} flips in {profile['rows']} rows" if profile["rows"] else ""
    rates = (f", {speed['tokens_per_s']:.0f} tokens/s on {key}" for key, speed in profile["speeds"].items())
    return tolerance + compared + "".join(rates)


def tuning(report: Report) -> list[str]:
    """The tables of a tuning, and what is to be said about them."""
    lines = [("profile", "tokens/s", "x fp32", "flips", "share", "at most", "tolerance", "verdict")]
    for one in report.verdicts:
        share = (f"{one.flips}/{one.rows}", f"{one.flips / one.rows:.2%}") if one.tasks else ("", "")
        bound = "" if one.most_flips is None or not one.tasks else f"{one.most_flips:.2%}"
        speed, fp32 = one.tokens_per_s, report.verdicts[0].tokens_per_s
        rates = (f"{speed:.0f}", f"{speed / fp32:.2f}") if speed and fp32 else ("", "")
        verdict = "accepted" if one.accepted else f"refused: {one.reason}"
        lines.append((one.name, *rates, *share, bound, f"{one.tolerance:.2g}" if speed else "", verdict))
    said = [*aligned(lines), ""]
    tasks = [("profile", "task", "metric", "fp32", "change", "95% of it", "flips")]
    for one in report.verdicts:
        for task, of in one.tasks.items() if one.name != "fp32" else ():
            span = f"{of.low:+.4f} to {of.high:+.4f}"
            flips = f"{of.flips}/{of.rows}"
            tasks.append((one.name, task, of.metric, f"{of.fp32:.4f}", f"{of.change:+.4f}", span, flips))
    if len(tasks) > 1:
        said += [*aligned(tasks), ""]
    work = f"medians of {report.rounds} rounds of {report.work_tokens} tokens each, interleaved"
    said.append(f"on {report.hardware}, {report.cores} cores; speeds are {work}")
    if report.threads:
        by_count = ", ".join(f"{count}: {rate:.0f}" for count, rate in report.threads.items())
        said.append(f"{report.chosen} by threads, tokens/s: {by_count}; recorded: {report.best_threads}")
    if report.kept_memory:
        off, on = report.kept_memory[False], report.kept_memory[True]
        kept = "kept" if report.keep_memory else "given back"
        said.append(
            f"{report.chosen} with freed memory given back {off:.0f}, kept {on:.0f} (best rounds); recorded: {kept}"
        )
    said += report.notes
    end = "recorded" if report.recorded else "not recorded (--dry-run)"
    return [*said, f"serving here takes {report.chosen}; {end}"]


def exported(report: dict[str, Any]) -> list[str]:
    """What `mtserve export` tried and wrote."""
    lines = [("graphs", "weights", "short request", "ONNX fp32", "flips", "tolerance", "verdict")]
    tasks = [("graphs", "task", "metric", "PyTorch", "ONNX", "flips", "largest difference")]
    for one in report["tried"]:
        verdict = one["verdict"]
        times = f"{one['short_ms']:.1f} ms", f"{one['fp32_ms']:.1f} ms"
        flips, size = f"{verdict['flips']}/{verdict['rows']}", f"{one['bytes'] / 2**20:.1f} MiB"
        ends = "accepted" if verdict["accepted"] else f"refused: {verdict['reason']}"
        lines.append((one["variant"], size, *times, flips, f"{verdict['tolerance']:.2g}", ends))
        for task, of in verdict["tasks"].items():
            off = "not finite" if of["difference"] is None else f"{of['difference']:.1e}"
            scores = f"{of['fp32']:.4f}", f"{of['fp32'] + of['change']:.4f}"
            tasks.append((one["variant"], task, of["metric"], *scores, f"{of['flips']}/{of['rows']}", off))
    said = [*aligned(lines), "", *(aligned(tasks) if len(tasks) > 1 else [])]
    if report["bundle"] is None:
        return [*said, "", "nothing is written, as none answers like the checkpoint"]
    return [*said, "", f"{report['bundle']}: {report['bytes'] / 2**20:.1f} MiB"]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, columns side by side."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
