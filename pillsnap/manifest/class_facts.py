"""What the labels of a class say about the drug: name, EDI codes and attributes, the commonest value of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pillsnap.manifest.attributes import Attributes, to_attributes
from pillsnap.manifest.labels import Label


@dataclass(frozen=True)
class ClassFacts:
    """Names, EDI codes and attributes by K-code. `conflicts`: one line per attribute on which labels disagree."""

    names: dict[str, str] = field(default_factory=dict)
    edi_codes: dict[str, list[str]] = field(default_factory=dict)
    attributes: dict[str, Attributes] = field(default_factory=dict)
    conflicts: list[str] = field(default_factory=list)


def class_facts(codes: Sequence[str], labels: Iterable[Label]) -> ClassFacts:
    """Facts of `codes[i]` from `labels[i]`. Of different values the commonest counts; of equally common ones, the first
    in the order of their characters, so that the order of reading has no influence.
    """
    names: dict[str, Counter[str]] = {}
    edi_codes: dict[str, set[str]] = {}
    texts: dict[str, Counter[tuple[tuple[str, str], ...]]] = {}
    for code, label in zip(codes, labels, strict=True):
        if label.name:
            names.setdefault(code, Counter())[label.name] += 1
        edi_codes.setdefault(code, set()).update(label.edi_codes)
        if label.attributes:
            texts.setdefault(code, Counter())[label.attributes] += 1
    attributes: dict[str, Attributes] = {}
    conflicts: list[str] = []
    for code in sorted(texts):
        values: dict[str, Counter[str]] = {}
        for pairs, count in texts[code].items():
            for name, text in pairs:
                values.setdefault(name, Counter())[text] += count
        chosen = {name: _commonest(seen) for name, seen in values.items()}
        attributes[code] = to_attributes(sorted(chosen.items()))
        for name in sorted(values):
            if len(values[name]) > 1:
                found = ", ".join(f"{text!r} {count:,}" for text, count in sorted(values[name].items()))
                conflicts.append(f"{code} {name}: {found} labels; {chosen[name]!r} is kept")
    return ClassFacts(
        {code: _commonest(seen) for code, seen in names.items()},
        {code: sorted(seen) for code, seen in edi_codes.items()},
        attributes,
        conflicts,
    )


def _commonest(seen: Counter[str]) -> str:
    return min(seen, key=lambda text: (-seen[text], text))
