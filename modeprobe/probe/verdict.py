"""The one sentence that answers the question."""

from __future__ import annotations

from modeprobe.probe.report import Report, Site

# What eval() turns off: one of it, several of it.
_TURNED_OFF = {
    "module_dropout": ("one dropout module", "{} dropout modules"),
    "functional_dropout": ("one functional dropout call", "{} functional dropout calls"),
    "attention_dropout": ("dropout inside one attention call", "dropout inside {} attention calls"),
    "stochastic_depth": ("stochastic depth in one place", "stochastic depth in {} places"),
    "random_noise": ("random noise in one place", "random noise in {} places"),
}


def verdict(report: Report) -> str:
    if report.effect == "unknown":
        first = report.failures[0] if report.failures else None
        reason = f": {first.error} ({first.phase}, {first.mode} mode)" if first else ""
        return f"The model could not be run{reason}."
    always = [failure for failure in report.failures if not failure.sometimes]
    if len({failure.mode for failure in always}) == 1:
        failure = always[0]
        other = "eval" if failure.mode == "train" else "train"
        return f"The model runs in {other} mode only: in {failure.mode} mode it raises {failure.error}."
    sentence = _nothing(report) if report.effect == "none" else _something(report)
    sometimes = dict.fromkeys(failure.mode for failure in report.failures if failure.sometimes)
    raises = "".join(f" In {mode} mode it raises with some seeds." for mode in sometimes)
    return sentence + raises + _generation(report)


def _nothing(report: Report) -> str:
    none = "the module does not act" if report.modules == 1 else f"none of {report.modules} modules acts"
    text = f"eval() changes nothing here: {none} on its mode"
    if report.eval_is_random:
        names = ", ".join(dict.fromkeys(site.what for site in report.ungated)) or "chance"
        text += f", but outputs are random in both modes ({names})"
    elif report.train_is_random:
        text += ", though training is random"
    return text + "."


def _something(report: Report) -> str:
    counts = {cause: sum(_weight(s) for s in report.sites if s.cause == cause) for cause in report.causes}
    off = [
        one if counts[cause] <= 1 else several.format(counts[cause])
        for cause, (one, several) in _TURNED_OFF.items()
        if cause in counts
    ]
    parts = [f"turns off {_join(off)}"] if off else []
    if "batch_statistics" in counts:
        n = max(counts["batch_statistics"], 1)
        layers = "one normalisation layer" if n == 1 else f"{n} normalisation layers"
        parts.append(f"makes {layers} use stored instead of batch statistics")
    if "branch" in counts:
        n = max(counts["branch"], 1)
        parts.append("runs other code in one place" if n == 1 else f"runs other code in {n} places")
    if "opaque" in counts:
        parts.append("acts through something that could not be seen")
    what = "side outputs only" if report.main_output_same else "outputs"
    text = f"eval() changes the {what}: it {_join(parts)}"
    if report.eval_is_random:
        text += "; outputs stay random in eval mode"
    return text + "."


def _weight(site: Site) -> int:
    return 1 if site.cause in ("random_noise", "branch", "opaque") else site.calls


def _generation(report: Report) -> str:
    if report.generation_same is not False or report.train_is_random:
        return ""
    if report.checkpointing:
        return " But generate() gives other text in train mode: activation checkpointing turns the cache off."
    return " But generate() gives other text in train mode."


def _join(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
