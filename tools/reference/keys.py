"""Pages of the YAML keys: one per section of the configuration, a heading per key, so that a search finds the key itself."""

from __future__ import annotations

import json
from collections.abc import Iterable

from megatron.config.catalog import KeyInfo, catalog
from megatron.config.frozen import thaw
from megatron.config.neox_keys import NO_EFFECT, neox_keys, refused_values
from megatron.config.nested import nested_catalog
from tools.reference.markdown import page, table

FOLDER = "reference/keys"
SOURCE = "the fields of megatron/config and of the mixers"
# section -> title and first sentence of its page
SECTIONS: dict[str, tuple[str, str]] = {
    "model": ("Model", "Sizes, layers, norms, positions and initialisation of the model."),
    "layers": ("Token mixers", "Options of a token mixer: its name, an underscore, and a field of its `Config`."),
    "parallel": ("Parallelism", "The mesh of processes and how the state is sharded over it."),
    "optimizer": ("Optimizer", "The optimizer and what it leaves out."),
    "schedule": ("Learning rate schedule", "Length of training and the learning rate over it."),
    "batch": (
        "Batch size",
        "Global batch = micro batch x accumulation steps x data-parallel ranks; the missing ones are derived.",
    ),
    "precision": ("Precision", "Dtypes of weights, states and sums."),
    "training": ("Training loop", "Steps, objective, kernels and memory of the training loop."),
    "data": ("Data", "Corpora, their mixture, packing and order."),
    "tokenizer": ("Tokenizer", "The tokenizer of the corpus."),
    "checkpoint": ("Checkpoints", "What is saved when, and what a start loads."),
    "evaluation": ("Evaluation", "Validation during training, and eval.py."),
    "generation": ("Generation", "Sampling of generate.py."),
    "logging": ("Logging", "Run folder, metrics and their sinks."),
    "reliability": ("Reliability", "Stop signals, skipped steps, hangs."),
    "launch": ("Launching", "Hosts, launcher and environment of a job."),
}
OTHER = "without-effect"


def _limits(info: KeyInfo) -> str:
    """Bounds of a number in words, such as `at least 1`; an upper bound that no run reaches is left out."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    parts = [inner for part in info.limits for inner in (part, *getattr(part, "metadata", ()))]
    bounds = {name: getattr(part, name) for name in words for part in parts if getattr(part, name, None) is not None}
    if bounds.get("le", 0) >= 1 << 24:
        del bounds["le"]
    return " and ".join(f"{words[name]} {value}" for name, value in bounds.items())


def _facts(info: KeyInfo) -> str:
    """Type, bounds, default and origin of a key in one line."""
    bounds = _limits(info)
    if info.name in neox_keys():
        origin = "A key of GPT-NeoX."
    else:
        origin = "A key of older GPT-NeoX files." if info.origin == "older NeoX" else "Not in GPT-NeoX."
    kind = info.type_name + (f", {bounds}" if bounds else "")
    return f"**Type:** {kind}. **Default:** `{json.dumps(thaw(info.default))}`. {origin}"


def _entry(info: KeyInfo) -> str:
    """Heading, meaning and facts of one key, with the entries of a dictionary."""
    lines = [f"### `{info.name}`", info.doc or "Accepted as in GPT-NeoX.", _facts(info)]
    if info.status != "implemented":
        lines.append(f"Status: {info.status_text}.")
    if refused := refused_values().get(info.name):
        lines.append("Refused values: " + "; ".join(f"`{value}` ({reason})" for value, reason in refused.items()) + ".")
    inner = [i for name, i in nested_catalog().items() if name.startswith(f"{info.name}.") and i.doc != NO_EFFECT]
    if inner:
        rows = (
            (f"`{i.name.removeprefix(info.name)[1:]}`", i.type_name, f"`{json.dumps(thaw(i.default))}`", i.doc) for i in inner
        )
        lines.append(table(("entry", "type", "default", "meaning"), rows).strip())
    return "\n\n".join(lines)


def _keys_of(section: str) -> list[KeyInfo]:
    return [info for info in catalog().values() if info.section == section]


def _section_page(section: str) -> str:
    title, sentence = SECTIONS[section]
    keys = _keys_of(section)
    blocks = [sentence]
    if section == "layers":
        for mixer in dict.fromkeys(info.section_layer for info in keys):
            blocks += [f"## {mixer}", *(_entry(info) for info in keys if info.section_layer == mixer)]
    else:
        blocks += map(_entry, keys)
    return page(f"Keys: {title}", SOURCE, *blocks)


def _other_page() -> str:
    """Keys that no part reads: spellings, and keys of GPT-NeoX that are ignored or refused."""
    keys = _keys_of("")
    texts = {
        "alias": ("Other spellings", ("key", "is"), lambda i: (f"`{i.name}`", f"`{i.reason}`")),
        "ignored": ("Ignored", ("key", "why"), lambda i: (f"`{i.name}`", i.reason)),
        "refused": (
            "Refused",
            ("key", "default", "why"),
            lambda i: (f"`{i.name}`", f"`{json.dumps(thaw(i.default))}`", i.reason),
        ),
    }
    notes = {
        "alias": "Accepted for the key that they name.",
        "ignored": "Accepted without effect on the result; one line of warning when set to something else than the default.",
        "refused": "A value other than the default stops a run before it starts.",
    }
    blocks = ["Keys of GPT-NeoX that have no effect here, or that are refused."]
    for status, (title, headings, row) in texts.items():
        blocks += [f"## {title}", notes[status], table(headings, (row(i) for i in keys if i.status == status))]
    rest = [i for i in keys if i.status == "implemented"]
    if rest:
        blocks += ["## Without a section", *map(_entry, rest)]
    return page("Keys: without effect, or refused", SOURCE, *blocks)


def _index() -> str:
    rows = [
        (f"[{title}]({section}.md)", str(len(_keys_of(section))), sentence) for section, (title, sentence) in SECTIONS.items()
    ]
    rows.append((f"[Without effect, or refused]({OTHER}.md)", str(len(_keys_of(""))), "Keys of GPT-NeoX that do nothing here."))
    intro = (
        f"{len(catalog())} keys. A YAML is flat: every key stands at the top level, whatever its section. A hyphen equals an "
        "underscore. `--set KEY=VALUE` overrides a file; `python deepy.py train.py CONFIG --explain KEY` prints one entry with "
        "the value of that run and the line it comes from. [Keys by status](../../keys.md) sorts them by what becomes of "
        "each; `configs/schema.json` is a JSON Schema for editors."
    )
    alphabet = "Alphabetical: " + ", ".join(_links(catalog().values()))
    return page("YAML keys", SOURCE, intro, table(("page", "keys", "contents"), rows), "## All keys", alphabet)


def _links(keys: Iterable[KeyInfo]) -> list[str]:
    """A link to every key that has a heading, by name."""
    named = sorted((i for i in keys if i.section), key=lambda i: i.name)
    return [f"[`{i.name}`]({i.section}.md#{anchor(i.name)})" for i in named]


def anchor(name: str) -> str:
    """The anchor of a key's heading, as MkDocs and GitHub make it."""
    return name.lower()


def pages() -> dict[str, str]:
    """Path below docs/ -> text."""
    assert {info.section for info in catalog().values()} - {""} == set(SECTIONS), "a section without a page"
    texts = {f"{FOLDER}/{section}.md": _section_page(section) for section in SECTIONS}
    return {f"{FOLDER}/index.md": _index(), **texts, f"{FOLDER}/{OTHER}.md": _other_page()}
