"""Prompt files of all forms -> examples: {"prompt": ..., and what else the file has of it}."""
import csv
import io
import json
import sys
from pathlib import Path

from support.weights import local

KEYS = ("prompt", "prompts", "caption", "text")


def read_prompts(path) -> list[dict]:
    """Return the examples of a file: .txt, a prompt a line; .jsonl, an object or a text a line;
    .json, a list of them; .csv or .tsv with a header. The prompt of an object or a row is the first
    of KEYS that it has, in any case; FILE:KEY names another. Optional: "reward_prompt", what the
    reward is told instead, and GenEval's metadata; the rest stays with the example."""
    file, _, key = str(path).rpartition(":")
    if not local(file).is_file():
        file, key = str(path), ""
    kind = Path(file).suffix.lower()
    if kind not in (".txt", ".jsonl", ".json", ".csv", ".tsv"):
        raise SystemExit(f"{path}: wanted .txt, .jsonl, .json, .csv or .tsv")
    try:
        text = local(file).read_text("utf-8-sig")
        rows = [line for line in text.split("\n") if line.strip()]
        if kind in (".csv", ".tsv"):
            try:
                rows = list(csv.DictReader(io.StringIO(text), delimiter=",\t"[kind == ".tsv"],
                                           strict=kind == ".tsv"))
            except csv.Error:       # a .tsv whose quotes are text, as PartiPrompts'
                rows = list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=3))
        elif kind != ".txt":
            rows = json.loads(text) if kind == ".json" else [json.loads(line) for line in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise SystemExit(f"{path}: cannot be read ({error})") from None

    examples = []
    for row in rows if isinstance(rows, list) else [rows]:
        row = {"prompt": row} if isinstance(row, str) else row
        names = {str(name).lower(): name for name in row} if isinstance(row, dict) else {}
        name = key or next((names[k] for k in KEYS if k in names), None)
        if not names or not isinstance(row.get(name), str):
            has = ", ".join(map(str, names.values())) or repr(row)
            raise SystemExit(f"{path}: number {len(examples) + 1} has no prompt, but {has[:99]}; "
                             f"name one: {file}:KEY")
        examples.append({**row, "prompt": row[name].strip()})
    return [e for e in examples if e["prompt"]] or sys.exit(f"{path}: there is no prompt in it")
