"""Data sets of other trainers as sources, with their split, template and trained roles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from packhorse.errors import UserError
from packhorse.recipe.importers.draft import Draft, node_of, trainers
from packhorse.yaml_source.nodes import Node, plain, show

DATA_ENDINGS = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst"}
DATASET_INFO = "dataset_info.json"
ENTRY_FIELDS = {"name": "subset", "config": "subset", "subset": "subset", "split": "split", "revision": "revision"}
READ_AS_FILE = {"json", "csv", "parquet", "arrow", "text"}
DEFAULTS_OF_ENTRIES = {"train_on_eos": "turn", "shards": 1}
SHAREGPT = {"messages": "conversations", "role": "from", "content": "value"}
Entry = dict[str, Any]


def translate_data(draft: Draft) -> None:
    """Translate rows, split, template and the trained part of a chat.

    Raises:
        UserError: The file names no data set.
    """
    files = draft.take_field("data.sources[0].path")
    rows = draft.take("rows") or files or draft.take("pretraining_dataset")
    sources = _sources(draft, rows) if rows else []
    if rows is None or not sources:
        raise UserError(
            f"{draft.file} names no data set." if rows is None else f"the data set of {draft.file} is {show(rows)}.",
            "a recipe has at least one source of rows.",
            f"add one to {draft.file}, or import it and add data.sources: start from `packhorse recipes`.",
            rows.where if rows else f"{draft.file}:1",
        )
    _template(draft, sources)
    _trained_part(draft, sources)
    draft.set("data.sources", [node_of(source, rows) for source in sources])
    _held_out(draft)


def _sources(draft: Draft, rows: Node) -> list[Entry]:
    value: Any = plain(rows)
    entries: list[Any]
    if draft.trainer == "llamafactory":
        names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
        entries = [_registered(draft, str(name).strip()) for name in names]
    elif isinstance(value, dict) and isinstance(value.get("datasets"), list):
        entries = value["datasets"]
        for key in value.keys() - {"datasets"}:
            draft.omit(f"dataset_mixture.{key}", node_of(value[key], rows))
    elif isinstance(value, dict) and "_component_" not in value and "path" not in value and "source" not in value:
        entries = [{"path": name, "weight": weight} for name, weight in value.items()]  # dataset_mixer of TRL
    else:
        entries = value if isinstance(value, list) else [value if isinstance(value, dict) else {"path": value}]
    single = {
        key: node.value
        for key in ("dataset_config", "dataset_train_split", "dataset_text_field")
        if (node := draft.take(key))
    }
    sources = []
    for index, given in enumerate(entries):
        entry = given if isinstance(given, dict) else {"path": given}
        common = {key.removeprefix("dataset_").removeprefix("train_"): value for key, value in single.items()}
        named = {"field" if key == "text_field" else key: value for key, value in common.items()}
        sources += _source(draft, {**named, **entry}, f"datasets.{index}", rows)
    if (samples := draft.take("max_samples")) is not None:
        note = "rows is exact: a smaller data set is refused, so remove it there"
        sources = [{**source, "rows": source.get("rows", samples.value)} for source in sources]
        draft.note("data.sources", note)
    return sources


def _source(draft: Draft, entry: Entry, where: str, rows: Node) -> list[Entry]:
    """Return the sources of one entry: one for each of its files."""
    entry = {key: value for key, value in entry.items() if value not in (None, "", [], {})}
    name, row_format = _place_and_format(draft, entry, where, rows)
    files = entry.pop("data_files", [])
    read_as = str(entry.pop("ds_type", ""))
    files = files if isinstance(files, list) else [files]
    source: Entry = {}
    for key, ours in ENTRY_FIELDS.items():
        if key in entry:
            source[ours] = str(entry.pop(key))
    if isinstance(entry.get("columns"), list):
        row_format = row_format or ("messages" if "messages" in entry.pop("columns") else "")
    columns, roles = _columns(entry, row_format), _roles(entry)
    if row_format or columns.keys() & {"messages", "role", "content"}:
        source["format"] = row_format or "messages"
    source |= {key: value for key, value in (("columns", columns), ("roles", roles)) if value}
    if (weight := entry.pop("weight", 1)) not in (1, 1.0):
        why = "a share of this data set, where rows is a number of rows, and weight a share of the mix"
        draft.omit(f"{where}.weight", node_of(weight, rows), why)
    if (num_rows := entry.pop("num_samples", None)) is not None:
        source["rows"] = num_rows
    _trained_roles(draft, entry.pop("roles_to_train", None), rows)
    for key, value in entry.items():
        if value is not False and value != DEFAULTS_OF_ENTRIES.get(key):
            draft.omit(f"{where}.{key}", node_of(value, rows))
    local = (
        bool(read_as) or Path(name).suffix in DATA_ENDINGS or name.startswith(("/", ".", "~")) or Path(name).exists()
    )
    if files and (name in READ_AS_FILE or local):
        return [{"path": str(Path(name) / file) if Path(name).is_dir() else str(file), **source} for file in files]
    if files:
        draft.omit(
            f"{where}.data_files", node_of(files, rows), "download the files, and give each as data.sources.path"
        )
    if local:
        source = {key: value for key, value in source.items() if key not in ("subset", "split", "revision")}
    return [{"path" if local else "id": name, **source}]


def _place_and_format(draft: Draft, entry: Entry, where: str, rows: Node) -> tuple[str, str]:
    """Return the path or hub name, and the format of the rows; remove both from the entry."""
    builders, formats = trainers()["builders"], trainers()["formats"]
    builder = str(entry.pop("_component_", "")).rpartition(".")[2]
    default, row_format, trains_on_prompt = builders.get(builder, ["", "", False])
    name = next((entry.pop(key) for key in ("path", "id", "source") if key in entry), default)
    if not name:
        raise UserError(
            f"the data set {builder or json.dumps(entry)} names no rows.",
            "a source is a file, a folder or a data set on the hub.",
            f"add {'source' if draft.trainer == 'torchtune' else 'path'} to it in {draft.file}.",
            rows.where,
        )
    kind = next((entry.pop(key) for key in ("type", "formatting", "conversation_style") if key in entry), None)
    if isinstance(kind, dict):
        entry |= {key: value for key, value in kind.items() if key.startswith("field_")}
        for key in kind.keys() - entry.keys():
            reason = "write the prompt as a Jinja file, and name it in data.template"
            draft.omit(f"{where}.type.{key}", node_of(kind[key], rows), reason)
        row_format = "alpaca"
    elif kind is not None:
        row_format = formats.get(str(kind).split(".")[0].split(":")[0], "")
        if not row_format:
            draft.omit(f"{where}.type", node_of(kind, rows), "the format is detected from the first rows")
    if trains_on_prompt:
        entry.setdefault("train_on_input", True)
    _entry_switches(draft, entry, rows)
    return str(name), str(row_format)


def _entry_switches(draft: Draft, entry: Entry, rows: Node) -> None:
    """Move what torchtune and axolotl write beside a data set to the keys of the whole file."""
    for key, ours in (("packed", "packed"), ("train_on_input", "train_on_inputs"), ("chat_template", "chat_template")):
        if key in entry:
            draft.keys.setdefault(ours, (key, node_of(entry.pop(key), rows)))


def _columns(entry: Entry, row_format: str) -> dict[str, str]:
    """Return the keys of the rows by our keys, without those that are equal; remove them from the entry."""
    given = {key: entry.pop(key) for key in list(entry) if key in trainers()["columns"]}
    for key in ("message_property_mappings", "column_map", "columns"):
        given |= mapping if isinstance(mapping := entry.pop(key, None), dict) else {}
    tags = entry.pop("tags", None)
    if isinstance(tags, dict):
        given |= {key: tags.pop(key) for key in ("role_tag", "content_tag") if key in tags}
        entry["roles"] = {key.removesuffix("_tag"): value for key, value in tags.items()}
    ours_of: dict[str, str] = trainers()["columns"]
    pairs = {ours_of.get(key, key): str(theirs) for key, theirs in given.items()}
    if row_format == "sharegpt":
        pairs = {SHAREGPT.get(ours, ours): theirs for ours, theirs in pairs.items()}
    return {ours: theirs for ours, theirs in pairs.items() if ours != theirs}


def _roles(entry: Entry) -> dict[str, str]:
    """Return our role for each role of the rows that is not ours; remove them from the entry."""
    roles = entry.pop("roles", None)
    if not isinstance(roles, dict):
        return {}
    names = {"observation": "tool", "function": "assistant"}
    pairs = [
        (str(theirs), names.get(str(role), str(role))) for role, listed in roles.items() for theirs in _list(listed)
    ]
    known = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    return {theirs: role for theirs, role in pairs if theirs != role and known.get(theirs) != role}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _trained_roles(draft: Draft, roles: object, rows: Node) -> None:
    known = {"gpt": "assistant", "model": "assistant", "human": "user"}
    trained = list(dict.fromkeys(known.get(str(role), str(role)) for role in _list(roles))) if roles else []
    if trained and trained != ["assistant"]:
        draft.set("data.train_on.roles", trained, rows)


def _registered(draft: Draft, name: str) -> Entry:
    """Return the entry of a data set of LLaMA-Factory, which registers them in dataset_info.json."""
    folder = str(draft.keys["dataset_dir"][1].value) if "dataset_dir" in draft.keys else "data"
    for parent in (Path(folder), Path(draft.file).parent / folder):
        info = parent / DATASET_INFO
        try:
            entry = json.loads(info.read_text(encoding="utf-8"))[name]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(entry, dict):
            file = entry.pop("file_name", None)
            hub = entry.pop("hf_hub_url", None)
            entry.pop("ms_hub_url", None)
            return {"formatting": "alpaca", **entry, "path": hub or str(parent / str(file))}
    draft.note("data.sources", f"{folder}/{DATASET_INFO} does not describe {name} here: check its path and format")
    return {"path": str(Path(folder) / f"{name}.json")}


def _template(draft: Draft, sources: list[Entry]) -> None:
    node, jinja = draft.take("chat_template"), draft.take("chat_template_jinja")
    draft.take("dataset_dir")
    name = str(node.value) if node else ""
    known = trainers()["templates"].get(name)
    if draft.trainer == "axolotl" and all(source.get("format") == "alpaca" for source in sources):
        draft.set(
            "data.template", "alpaca", node, "rows of type alpaca have the Alpaca prompt, without a chat template"
        )
        if node is not None:
            draft.omit("chat_template", node, "the rows have type alpaca")
    elif node is not None and Path(name).suffix == ".jinja" and "\n" not in name:
        draft.set("data.template", node)
    elif known:
        note = "" if known == name else f"from {name}; `packhorse check` shows what the model sees"
        draft.set("data.template", known, node, note)
    elif node is not None or jinja is not None:
        why = "the tokenizer's own template is used; for another one, save it as a Jinja file and name it here"
        draft.set("data.template", "tokenizer", node or jinja, why)
        draft.omit("chat_template", jinja or node or Node(name, draft.file), "see data.template")


def _trained_part(draft: Draft, sources: list[Entry]) -> None:
    """Say where the other trainer also trains on the prompt."""
    only = draft.take("assistant_only_loss")
    if draft.trainer == "trl" and not (only and only.value is True):
        why = "TRL trains on every turn of a chat without assistant_only_loss; add user and system for that"
        draft.set("data.train_on.roles", ["assistant"], only, why)
    if draft.trainer == "trl" and not any(source.keys() & {"format", "columns"} for source in sources):
        why = "the format is detected from the first rows; where they have a key text, TRL trains on it: format: text"
        draft.note("data.sources", why)


def _held_out(draft: Draft) -> None:
    share, rows = draft.take_field("data.split.validation"), draft.take("validation_rows")
    split, strategy = draft.take("dataset_test_split"), draft.keys.get("eval_strategy")
    sources = _sources(draft, rows) if rows is not None else []
    if split is not None and strategy is not None and strategy[1].value not in ("no", False):
        sources = [{**plain(node), "split": split.value} for node in draft.values["data.sources"].value]  # type: ignore[dict-item]
    if sources:
        draft.set("data.validation", [node_of(source, rows or split or Node(None, draft.file)) for source in sources])
    elif share is not None and type(share.value) in (int, float) and 0 < share.value < 1:
        draft.set("data.split.train", round(1 - share.value, 6), share)
        draft.set("data.split.validation", share)
    elif share is not None and share.value == 0:
        note = "no held-out rows, as in the file; without this line Packhorse also holds out validation and test rows"
        draft.set("data.split.train", 1.0, share, note)
    elif share is not None:
        draft.omit("val_set_size", share, "data.split.validation is a share from 0 to 1, not a number of rows")
